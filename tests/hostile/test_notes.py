"""What the program writes for itself, spoilt: read by one rule, or made again. And what becomes of errors."""

import dataclasses
import io
import json
import sys

import pytest
from etils import epath

from imagen_jax.cli import main as cli
from imagen_jax.errors import UserError
from imagen_jax.parallel.watchdog import Life, Phase, Verdict
from imagen_jax.text.shards import ShardReport
from imagen_jax.training.metrics import trim_lines
from tests.cli.verbs import FakeVerb
from tests.hostile.mutations import DEEP, JSON_KINDS, mutated_json

STRICT = ("wrong type", "a text for a number", "a number for a text", "null", "missing", "not finite")


@pytest.mark.parametrize("kind", STRICT)
@pytest.mark.parametrize(
    "posted",
    [
        Life(beat=1, step=2, phase=Phase.STEP, who="process 0"),
        Verdict(message="gone", code=75, process=1),
    ],
    ids=["life", "verdict"],
)
def test_what_a_process_posts(posted, kind):
    content = dataclasses.asdict(posted)
    assert type(posted).from_json(json.dumps(content), "process 1") == posted
    for what, text in mutated_json(content, kind):
        with pytest.raises(UserError, match=f"process 1.*'{what.partition(' ')[0]}'"):
            type(posted).from_json(text, "process 1")
    with pytest.raises(UserError, match="'phase' must be one of"):
        Life.from_json('{"phase": 7, "beat": 1, "step": 1, "who": "x", "done": false}', "process 1")


@pytest.mark.parametrize("kind", [each for each in STRICT if each in JSON_KINDS and each != "null"])
def test_the_report_of_a_shard(kind, place):
    (file,) = (place / "records" / "job").glob("*.json")
    content = json.loads(file.read_text())
    optional = ("unknown", "encoded", "computed", "cut", "samples", "identity", "min_side")
    for what, text in mutated_json(content, kind):
        path = what.partition(" ")[0]
        field = path.partition(".")[0]
        file.unlink()
        file.write_text(text)
        if kind == "missing" and path in optional:
            ShardReport.read(epath.Path(file))
            continue
        with pytest.raises(UserError, match=field):
            ShardReport.read(epath.Path(file))


def test_lines_of_metrics_that_are_none(tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    good = [b'{"step": 1, "loss": "\\u2028"}', '{"step": 2, "x": "\u2028\x85"}'.encode()]
    bad = [
        b"",
        b"\xff",
        b"7",
        b"[]",
        b'{"step": "1"}',
        b'{"step": true}',
        b'{"loss": 1}',
        b"[" * DEEP,
        b'{"step": 1',
    ]
    path.write_bytes(b"\n".join([bad[0], good[0], *bad[1:], good[1], b'{"step": 3}']))
    trim_lines(path, 2)
    assert path.read_bytes() == b"\n".join([*good, b""])


def raising(error):
    def work():
        raise error

    return FakeVerb(work)


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (MemoryError(), 1, "error: this machine has too little memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1, "error: the device has too little memory"),
        (OSError(28, "No space left on device", "x"), 1, "error: [Errno 28] No space left on device: 'x'"),
        (UserError("a\nb\x1b[31m"), 1, "error: a b [31m"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_at_the_top_are_one_line(error, code, part, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_module", lambda verb: raising(error))
    assert cli.main(["quickstart"]) == code
    said = capsys.readouterr().err.strip("\n")
    assert part in said and "\n" not in said
    if code == 1:
        with pytest.raises(type(error)):
            cli.main(["quickstart", "--debug"])


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("x"), TypeError("x"), RecursionError("x"), RuntimeError("x")]
)
def test_errors_of_the_program_show_where_they_are_from(error, monkeypatch):
    monkeypatch.setattr(cli, "_module", lambda verb: raising(error))
    with pytest.raises(type(error)):
        cli.main(["quickstart"])


def test_an_interrupt_during_imports(monkeypatch, capsys):
    def interrupted(verb):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_module", interrupted)
    assert cli.main(["quickstart"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_name_that_the_terminal_cannot_show(monkeypatch, tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)

    def say():
        print("一 → \ud800")
        return 0

    monkeypatch.setattr(cli, "_module", lambda verb: FakeVerb(say))
    assert cli.main(["quickstart"]) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u4e00 \\u2192 \\ud800\n"


@pytest.mark.parametrize(
    "flag", ["--model=", "--model= ", "--out=", "--steps=--", "--model=--", "--prompts_file="]
)
def test_a_flag_without_a_value(flag, run):
    name = flag.partition("=")[0]
    assert not run("sample", "x", "--model=model", "--out=out", flag).fault(name)
