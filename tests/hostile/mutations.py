"""What a stranger, a crash or a slip of the finger makes of a good input, by kind."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HALF = "\ud800"  # half of a character, which no UTF-8 file can hold
HUGE = 10**9
DEEP = 100_000  # brackets: far beyond any parser's recursion
MISSING = object()

Path_ = tuple[str | int, ...]  # of a field in nested JSON


def json_fields(content: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every field of nested JSON with its value, objects and lists included; the first item stands for a list's."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))[:1]
    for name, value in items:
        yield (*path, name), value
        yield from json_fields(value, (*path, name))


def with_field(content: Any, path: Path_, value: Any) -> Any:
    """A copy with one field replaced, or removed where the value is `MISSING`."""
    made = copy.deepcopy(content)
    group = made
    for name in path[:-1]:
        group = group[name]
    if value is MISSING:
        del group[path[-1]]
    else:
        group[path[-1]] = value
    return made


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# Kind of a mutation → the values that a field with this good value gets; none: it does not apply.
JSON_KINDS: dict[str, Callable[[Any], list[Any]]] = {
    "wrong type": lambda good: [[None], {"x": {}}] if not isinstance(good, (list, dict)) else ["x", 7],
    "a text for a number": lambda good: ["x"] if _number(good) or isinstance(good, bool) else [],
    "a number for a text": lambda good: [7] if isinstance(good, str) else [],
    "null": lambda good: [None] if good is not None else [],
    "missing": lambda good: [MISSING],
    "huge": lambda good: [HUGE, 10**30] if isinstance(good, int) and not isinstance(good, bool) else [],
    "negative": lambda good: [-7] if _number(good) else [],
    "not finite": lambda good: [float("nan"), float("inf"), float("-inf")] if _number(good) else [],
    "half a character": lambda good: [HALF] if isinstance(good, str) else [],
    "NUL": lambda good: ["a\0b"] if isinstance(good, str) else [],
    "outside path": lambda good: ["/etc/passwd", "../../x"] if isinstance(good, str) else [],
}


def mutated_json(content: Any, kind: str, limit: int = 1000) -> Iterator[tuple[str, str]]:
    """(field and value in words, JSON text) for every field that a kind of mutation applies to."""
    for path, good in list(json_fields(content))[:limit]:
        for value in JSON_KINDS[kind](good):
            shown = "missing" if value is MISSING else repr(value)
            # A number that no float holds is spelt out: json.dumps would write "Infinity".
            text = json.dumps(with_field(content, path, value))
            yield f"{'.'.join(map(str, path))} = {shown}", text


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _half(path: Path) -> None:
    content = path.read_bytes()
    _replace(path, content[: len(content) // 2])


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


# Kind of damage to a file → what it does to it.
FILE_KINDS: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: _replace(path, b""),
    "truncated": _half,
    "not UTF-8": lambda path: _replace(path, b"\xff\xfe\x00\x80" * 20),
    "zeros": lambda path: _replace(path, bytes(1000)),
    "deep JSON": lambda path: _replace(path, b"[" * DEEP + b"]" * DEEP),
    "deep objects": lambda path: _replace(path, b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "a list": lambda path: _replace(path, b"[1]"),
    "a number": lambda path: _replace(path, b"7"),
    "an empty object": lambda path: _replace(path, b"{}"),
    "a number of 5000 digits": lambda path: _replace(path, b"[" + b"9" * 5000 + b"]"),
    "a pipe": _pipe,
    "a device": _device,
    "a folder": _folder,
    "a link to itself": _loop,
    "a Git LFS pointer": lambda path: _replace(
        path, b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    ),
}

# Texts for flags by what the flag takes, as `argparse` knows it.
BAD_WHOLE = ("x", "", "1.5", "nan", "1e400", "-7", str(HUGE), "9" * 30)
BAD_REAL = ("x", "", "nan", "inf", "1e400", "-7", "1e300")
BAD_TEXT = ("", " ", "\udcff", "x" * 5000, "\n", "--")
