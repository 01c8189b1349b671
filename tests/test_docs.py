"""The documentation: it builds as a site, its links lead somewhere, and its words are those of the commands."""

import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from imagen_jax.cli.main import VERBS, verb_parser
from imagen_jax.config_help import describe
from imagen_jax.training.config import TrainConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site; a broken link ends the build."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_all_pages_are_reached(site):
    home = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}/"' in home, page


def test_the_page_of_commands_has_all_of_them(site):
    page = (site / "commands" / "index.html").read_text()
    for verb in VERBS:
        assert f'id="{verb}"' in page
    assert "--negative_prompt NEGATIVE_PROMPT" in page


def test_the_api_says_what_docstrings_say(site):
    page = (site / "api" / "imagen_jax.sampling" / "index.html").read_text()
    assert 'id="imagen_jax.sampling.cascade.Imagen.generate"' in page
    text = (site / "api" / "imagen_jax.diffusion" / "index.html").read_text()
    assert "Weight of a noise level for a loss in the given space" in text


@pytest.mark.parametrize(
    ("link", "faults"),
    [
        ("[a](other.md#two) ![b](b.png)", 0),
        ("[a](nowhere.md)", 1),
        ("[a](other.md#nowhere)", 1),
        ("[a](#nowhere)", 1),
        ("![a](nowhere.png)", 1),
    ],
)
def test_a_broken_link_is_a_fault(link, faults, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "b.png").write_bytes(b"")
    for name, text in {"index": f"# One\n\n{link}\n", "other": "# Two\n"}.items():
        (docs / f"{name}.md").write_text(text)
    config = load_config(
        str(ROOT / "mkdocs.yml"),
        docs_dir=str(docs),
        site_dir=str(tmp_path / "site"),
        nav=["index.md", "other.md"],
        hooks=[],
        plugins=[],
        strict=True,
    )
    if faults:
        with pytest.raises(Abort, match=f"Aborted with {faults} warning"):
            build(config)
    else:
        build(config)


def _here() -> list[str]:
    """The right-hand columns of the migration page's tables."""
    lines = (ROOT / "docs" / "migration.md").read_text().splitlines()
    return [line.rstrip(" |").rpartition(" | ")[2] for line in lines if line.startswith("| `")]


def test_the_fields_of_the_migration_page_are_there():
    fields = set(re.findall(r"^(config\.[\w.]+)", describe(TrainConfig), re.M))
    named = {name for cell in _here() for name in re.findall(r"config\.[\w.]*\w", cell)}
    assert len(named) > 20
    assert named <= fields


def test_the_flags_of_the_migration_page_are_there():
    flags = set()
    for verb in VERBS:
        flags.update(flag for action in verb_parser(verb)._actions for flag in action.option_strings)
    named = {name for cell in _here() for name in re.findall(r"--\w+", cell)}
    assert len(named) > 15
    assert named <= flags
