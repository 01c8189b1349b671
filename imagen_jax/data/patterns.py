"""The files that a SPEC names: glob patterns, braces and URLs; opening them."""

import contextlib
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from etils import epath

from imagen_jax.data.examples import one_line
from imagen_jax.errors import UserError
from imagen_jax.files import check_regular

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MAX_FILES = 1_000_000  # that braces may stand for
_SECONDS = 60  # without an answer of a server


def expand_braces(pattern: str) -> list[str]:
    """`{00000..00010}` and `{a,b}` written out as a shell does; other braces stay.

    Raises:
      UserError: they stand for more than a million files.
    """
    names = [pattern]
    while True:
        expanded: list[str] = []
        for name in names:
            parts = _expand_once(name)
            expanded += parts
            if len(parts) * len(names) > _MAX_FILES:
                raise UserError(f"--source: {pattern!r} stands for more than {_MAX_FILES} files")
        if expanded == names:
            return list(dict.fromkeys(names))
        names = expanded


def _expand_once(name: str) -> list[str]:
    """The name with its first braces written out; the name alone if it has none."""
    for match in _BRACES.finditer(name):
        choices: list[str] = match[1].split(",")
        if numbers := _RANGE.fullmatch(match[1]):
            first, last = int(numbers[1]), int(numbers[2])
            if abs(last - first) >= _MAX_FILES:
                raise UserError(f"--source: {name!r} stands for more than {_MAX_FILES} files")
            padded = any(len(end) > 1 and end.startswith("0") for end in numbers.groups())
            digits = max(map(len, numbers.groups())) if padded else 1
            step = 1 if first <= last else -1
            choices = [f"{number:0{digits}d}" for number in range(first, last + step, step)]
        elif len(choices) == 1:
            continue
        return [name[: match.start()] + choice + name[match.end() :] for choice in choices]
    return [name]


def is_url(name: str) -> bool:
    """Whether a name is one of a web server's."""
    return name.startswith(("http://", "https://"))


def expand_pattern(pattern: str, suffixes: tuple[str, ...] = (".tar",)) -> list[epath.Path]:
    """The files of a glob pattern with braces, sorted; wildcards in folder names are allowed.

    A file that has exactly this name comes before any meaning of its characters.

    Args:
      pattern: local or cloud path.
      suffixes: of the files that a folder stands for.

    Raises:
      UserError: a file that braces name is missing, or one of the files is a pipe or a device.
    """
    literal = epath.Path(pattern).expanduser()
    check_regular(literal)
    if literal.is_file():
        return [literal]
    names = expand_braces(pattern)
    files: dict[epath.Path, None] = {}
    for name in names:
        found = _glob(epath.Path(name).expanduser(), suffixes)
        for file in found:
            check_regular(file)
        if not found and len(names) > 1:
            raise UserError(f"--source: no file matches {name!r} (of {pattern!r})")
        files.update(dict.fromkeys(found))
    return list(files)


def _glob(path: epath.Path, suffixes: tuple[str, ...]) -> list[epath.Path]:
    parts = list(path.parts)
    first = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), None)
    if first is None:
        if path.exists() and not path.is_dir():
            return [path]
        return sorted(f for f in path.iterdir() if f.name.endswith(suffixes)) if path.is_dir() else []
    root = path
    for _ in parts[first:]:
        root = root.parent
    return sorted(root.glob("/".join(parts[first:])))


@contextlib.contextmanager
def _request(url: str) -> Iterator[Any]:
    """The answer of a web server.

    Raises:
      UserError: it does not give the file; names the URL.
    """
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            yield answer
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"--source: {url}: {one_line(error)}") from error


def url_size(url: str) -> int:
    """Bytes of a web server's file; 0 if it does not say.

    Raises:
      UserError: it does not give the file; names the URL.
    """
    # Not HEAD, which signed URLs refuse; the body is not read.
    with _request(url) as answer:
        return int(answer.headers.get("Content-Length") or 0)


@contextlib.contextmanager
def open_file(path: epath.Path | str) -> Iterator[Any]:
    """Opens a file for reading at random; one of a web server is first copied to a temporary file.

    Raises:
      UserError: a pipe or a device, or the server does not give all of the file.
      OSError: the file is missing or the system refuses.
    """
    if not isinstance(path, str):
        check_regular(path)
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        with _request(path) as answer:
            shutil.copyfileobj(answer, copy, 2**20)
            size = int(answer.headers.get("Content-Length") or copy.tell())
        if copy.tell() != size:
            raise UserError(f"--source: {path}: the server broke off after {copy.tell()} of {size} bytes")
        copy.seek(0)
        yield copy
