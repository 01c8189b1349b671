"""Commands that README and docs print: all parsed, and README's run from an empty folder (`make test-readme`)."""

import dataclasses
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from imagen_jax.cli.main import VERBS, make_parser, verb_parser
from imagen_jax.data.shapes import scene
from imagen_jax.data.shapes_render import render
from imagen_jax.training.config import find_config_file, parse_override

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
ONLY_PARSED = re.compile(r"<!-- needs .* -->\s*$")  # before a block: what it needs is not on every machine

# What a run on a small machine without network has instead; the rest of the command stays.
INSTEAD = {
    "--text_encoder=google/t5-v1_1-xxl": "--text_encoder=demo",
    "--config=imagen/sr256.py": "--config=imagen/sr256.py:debug",
    "--topology=v5e:16x16": "--topology=v5e:2x2",
}
ALSO = {
    "train": ("--config.train.steps=3", "--config.data.batch_size=8", "--config.train.sample_count=2"),
    "sample": ("--steps=2",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A block of commands or code."""

    language: str
    text: str
    only_parsed: bool

    @property
    def commands(self) -> list[list[str]]:
        """Words of its commands."""
        if self.language not in ("", "sh", "bash"):
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := _words(line))]


def _words(line):
    line = re.sub(r"\$\w+", "0", line.strip().removesuffix("&"))  # a loop's variable
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # no command: a table, a path with an apostrophe
        return []


def blocks(path):
    text = path.read_text()
    return [
        Block(
            language=match[2],
            text=match[3],
            only_parsed=bool(ONLY_PARSED.search(text[: match.start()])),
        )
        for match in _FENCE.finditer(text)
    ]


def printed(program, in_sentences=False):
    """Words of all printed commands of a program, those in blocks or those in sentences, which leave things out."""
    found = []
    for path in PAGES:
        commands = [words for block in blocks(path) for words in block.commands]
        if in_sentences:
            prose = _FENCE.sub("", path.read_text())
            commands = [_words(text) for text in re.findall(r"`([^`\n]+)`", prose)]
        commands = [words for words in commands if words[:1] == [program] and len(words) > 1]
        found += [pytest.param(words, id=f"{path.stem}-{i}-{words[1]}") for i, words in enumerate(commands)]
    return found


@pytest.mark.parametrize("words", printed("imagen-jax", in_sentences=True))
def test_a_command_in_a_sentence_has_such_flags(words):
    verb = words[1]
    if verb == "COMMAND":
        return
    known = {flag for action in verb_parser(verb)._actions for flag in action.option_strings}
    named = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert {flag for flag in named if not flag.startswith("--config.")} <= known


@pytest.mark.parametrize("words", printed("imagen-jax"))
def test_a_printed_command_is_understood(words):
    verb = words[1]
    assert verb in VERBS
    if words[-1] in ("--help", "--help_config"):
        with pytest.raises(SystemExit) as end:
            make_parser(verb).parse_args(words[1:])
        assert end.value.code == 0
        return
    parsed, rest = make_parser(verb).parse_known_args(words[1:])
    for argument in rest:
        assert verb in ("train", "plan"), argument
        parse_override(argument)
    configs = getattr(parsed, "config", None) or []
    for spec in [configs] if isinstance(configs, str) else configs:
        find_config_file(spec.partition(":")[0])


@pytest.mark.parametrize("words", printed("make"))
def test_a_printed_target_is_there(words):
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *words[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_printed_extras_are_there():
    known = set(re.findall(r'^        "([\w-]+)": \[', (ROOT / "setup.py").read_text(), re.M))
    named = {
        extra
        for path in PAGES
        for found in re.findall(r"(?:imagen_jax|\.)\[([\w,-]+)\]'", path.read_text())
        for extra in found.split(",")
    }
    assert named and named <= known


def write_tar(path, count=24):
    """Captioned pictures as img2dataset leaves them."""
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            image = io.BytesIO()
            Image.fromarray(render(scene(i), 160)).save(image, "PNG")
            for suffix, content in (("png", image.getvalue()), ("txt", scene(i).caption.encode())):
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.readme
def test_the_commands_of_readme_in_order(tmp_path):
    """From a folder that has nothing but somebody's pictures."""
    write_tar(tmp_path / "data" / "00000.tar")
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "IMAGEN_JAX_CACHE": str(tmp_path / "cache"),
    }

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"

    ran = []
    for block in blocks(ROOT / "README.md"):
        if block.only_parsed:
            continue
        if block.language == "python":
            run(sys.executable, "-c", block.text)
            ran.append("python")
        for words in block.commands:
            if words == ["make", "quickstart"]:
                words = ["imagen-jax", "quickstart", "--out=runs/quickstart", "--scale=smoke"]
            if words[0] == "imagen-jax":
                run(*(INSTEAD.get(word, word) for word in words), *ALSO.get(words[1], ()))
                ran.append(words[1])
            else:  # installs, or runs this suite
                assert words[:2] in (["pip", "install"], ["make", "test"]), words
    assert {"python", "quickstart", "sample", "precompute", "train", "export", "plan"} <= set(ran)
    assert len(list((tmp_path / "pictures").glob("*.png"))) > 5
    assert (tmp_path / "circle.png").is_file()
