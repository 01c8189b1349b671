"""MkDocs hooks: pages of the site that are made of what stands elsewhere in the repository.

README becomes the first page, `imagen-jax COMMAND --help` of all commands the page of commands, and every subpackage
gets a page of its public modules' docstrings.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "imagen_jax"
# Links in README that lead out of docs/, by where they lead on the site; others lose their link.
PAGES = {"imagen_jax/demo/README.md": "demo.md"}
_LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are no files in docs/."""
    pages = {
        "index.md": site_links((ROOT / "README.md").read_text(encoding="utf-8")),
        "demo.md": (PACKAGE / "demo" / "README.md").read_text(encoding="utf-8"),
        "commands.md": commands(),
        **dict(api_pages()),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the API's pages where the navigation has `api/`."""
    names = [path for path, _ in api_pages()]
    nav: list[Any] = config.nav or []
    config.nav = [{"API": names} if entry == {"API": "api/"} else entry for entry in nav]
    return config


def site_links(markdown: str) -> str:
    """README with its links as they are on the site."""

    def replaced(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if target.startswith("docs/"):
            return f"{text}({target.removeprefix('docs/')})"
        if target in PAGES:
            return f"{text}({PAGES[target]})"
        if "://" in target or target.startswith("#"):
            return match[0]
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"README links to {target}, which is not there")
        return f"`{text[1:-1]}`"

    return _LINK.sub(replaced, markdown)


def commands() -> str:
    """The page of commands, from the parsers."""
    from imagen_jax.cli.main import VERBS, verb_parser

    parts = ["# Commands", "`imagen-jax COMMAND --help` shows the same."]
    # As wide as a page, and without a terminal's colours.
    with mock.patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"):
        for verb, summary in VERBS.items():
            text = verb_parser(verb).format_help().rstrip()
            parts += [f"## {verb}", f"{summary[0].upper()}{summary[1:]}.", f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def api_pages() -> Iterator[tuple[str, str]]:
    """Path and text of the pages of the API, a page a subpackage."""
    folders = [PACKAGE, *sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists())]
    for folder in folders:
        modules = list(_modules(folder))
        if modules:
            name = ".".join(folder.relative_to(ROOT).parts)
            title = f"# {name}\n\n"
            yield f"api/{name}.md", title + "\n\n".join(f"::: {module}" for module in modules) + "\n"


def _modules(folder: Path) -> Iterator[str]:
    """Names of the public modules of a package and of packages in it; of imagen_jax itself only its files."""
    for path in sorted(folder.glob("*.py") if folder == PACKAGE else folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not parts[-1].startswith("_"):
            yield ".".join(parts)
