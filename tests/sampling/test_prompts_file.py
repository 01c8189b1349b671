"""Lists of prompts as they come from editors, documents and pipes, and arguments that are no text."""

import io
import os
import subprocess
import sys
import types

import pytest

from imagen_jax.cli import sample
from imagen_jax.cli.main import main
from imagen_jax.cli.sample import read_prompts
from imagen_jax.errors import UserError

BREAKS = ("\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r")


@pytest.fixture
def read(tmp_path):
    def run(content):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content)
        return read_prompts([], str(path))

    return run


@pytest.mark.parametrize("character", BREAKS, ids=ascii)
def test_only_a_newline_ends_a_prompt(read, character):
    content = f"a circle{character}on blue\na star\n{character}\n"
    assert read(content.encode()) == ["a circle on blue", "a star"]


def test_lines_of_other_systems_and_a_byte_order_mark(read):
    assert read("\ufeffone\r\n\r\n two  words \r\n一个\r\nlast".encode()) == [
        "one",
        "two  words",
        "一个",
        "last",
    ]
    assert read(b"") == read(b"\n\n") == []


def test_comments(read):
    assert read(b"# a list\n#\n#1 fan\n  # too\na # b\n#red\n") == ["#1 fan", "a # b", "#red"]


@pytest.mark.parametrize(
    "content", [b"good\ncaf\xe9\n", b"good\n\xed\xa0\xbc\n", "good\ngut".encode("utf-16")], ids=ascii
)
def test_what_is_not_utf8_is_named_with_its_line(read, tmp_path, content):
    with pytest.raises(UserError) as raised:
        read(content)
    said = str(raised.value)
    line = 1 if content.startswith((b"\xff", b"\xfe")) else 2
    assert said.startswith(f"--prompts_file {tmp_path / 'prompts.txt'} is not UTF-8 text: line {line}")


def test_what_is_no_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b"x" * 100_001)
    monkeypatch.setattr(sample, "_PROMPTS_BYTES", 100_000)  # more than a folder has
    for name, said in (
        ("pipe", "a pipe or a device"),
        ("gone", "there is no such file"),
        ("", "Is a directory"),
        ("nul\0", "there is no such file"),
        ("long", "100001 bytes, where at most 100000 are read"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            read_prompts([], str(tmp_path / name))
        assert str(raised.value).startswith(f"--prompts_file {tmp_path / name}")
    with pytest.raises(UserError, match=r"--prompts_file /dev/zero: a pipe or a device"):
        read_prompts([], "/dev/zero")
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"x" * 100_001)))
    with pytest.raises(UserError, match="standard input: more than 100000 bytes"):
        read_prompts(["-"], None)


def test_standard_input_is_read_as_a_file_is(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa\xc2\x85b\n# c\n"), "ascii"))
    assert read_prompts(["x", "-"], None) == ["x", "a b"]
    for stream in (io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"), io.StringIO("caf\ud83c")):
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(UserError, match="standard input is not UTF-8 text: line 1"):
            read_prompts([], "-")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "caf\udce9"], r"imagen-jax sample: error: the argument 'caf\udce9' is not UTF-8 text"),
        (["sample", "x", "--out=a\udce9"], r"imagen-jax sample: error: --out 'a\udce9' is not UTF-8 text"),
        (["serve", "--model", "\udce9"], r"imagen-jax serve: error: the argument '\udce9' is not UTF-8 text"),
        (["train", "--config.x=\ud83c"], r"imagen-jax train: error: --config.x '\ud83c' is not UTF-8 text"),
        (["\udce9"], r"imagen-jax: error: the argument '\udce9' is not UTF-8 text"),
    ],
)
def test_arguments_that_are_not_utf8(arguments, said, capsys):
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"{said}\n"


def test_such_bytes_from_a_shell(subprocess_env):
    command = [sys.executable, "-m", "imagen_jax", "sample", b"caf\xe9", "--out=x"]
    done = subprocess.run(command, env=subprocess_env(), capture_output=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"is not UTF-8 text" in done.stderr


def test_a_message_is_one_line_whatever_it_quotes(tmp_path, capsys):
    assert main(["sample", "--out=x", f"--prompts_file={tmp_path}/a\nb\x1b[31m"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said
