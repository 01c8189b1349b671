"""`webdataset:PATH/*.tar`: tar files in img2dataset's layout, read with the standard library.

A sample is the run of members whose names agree up to the first dot of the base name
(https://github.com/webdataset/webdataset#the-webdataset-format): a picture and a .txt or .json.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from imagen_jax.data.examples import Example, Skipped, Source, clean_captions
from imagen_jax.errors import UserError

_PICTURES = ("jpg", "jpeg", "png", "webp")
BYTES_PER_UNIT = 32 * 2**20  # of tar: about a thousand pictures of 256 × 256 pixels


@dataclasses.dataclass(frozen=True)
class Piece:
    """The samples of a tar whose first header lies in a range of bytes."""

    tar: int  # number of the tar
    start: int  # bytes
    end: int  # bytes, excluded


@dataclasses.dataclass(frozen=True)
class _TarFile:
    """One tar: only `size` bytes of it are looked at."""

    path: epath.Path
    size: int  # bytes
    end: int  # bytes: the samples from here on are beyond the limit


@dataclasses.dataclass
class _Group:
    """The members of one sample."""

    key: str
    offset: int  # of its first header
    members: dict[str, tarfile.TarInfo]  # by extension, in lower case


class _DamagedError(Exception):
    """The tar ends or breaks off before its end marker; `offset` is that of the last good header."""

    def __init__(self, offset: int, message: str):
        super().__init__(message)
        self.offset = offset


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: split at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _members(tar: tarfile.TarFile, file: Any, size: int) -> Iterator[tarfile.TarInfo]:
    """The regular members of a tar; raises `_DamagedError` where it breaks off."""
    last = 0
    while True:
        try:
            member = tar.next()
        except tarfile.TarError as error:
            raise _DamagedError(last, str(error)) from error
        if member is None:
            break
        last = member.offset
        if member.isfile():
            yield member
    # tarfile takes any broken header for the end; the real end is a block of zeros.
    file.seek(tar.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise _DamagedError(last, "no end marker" if tar.offset >= size else "broken header")


def _groups(members: Iterator[tarfile.TarInfo]) -> Iterator[_Group]:
    """Collects consecutive members of the same key; a broken tar still yields its last group first."""
    group: _Group | None = None
    try:
        for member in members:
            key, extension = _split_name(member.name)
            if group is None or key != group.key:
                if group is not None:
                    yield group
                group = _Group(key, member.offset, {})
            group.members.setdefault(extension, member)
    except _DamagedError:
        if group is not None:
            yield group
        raise
    if group is not None:
        yield group


def _read_sample(tar: tarfile.TarFile, group: _Group, file: str) -> Example | Skipped:
    """Reads the picture and the caption of a sample; raises `tarfile.TarError` if they are cut off."""

    def content(member: tarfile.TarInfo) -> bytes:
        opened = tar.extractfile(member)
        data = b"" if opened is None else opened.read()
        if len(data) != member.size:
            raise tarfile.ReadError("unexpected end of data")
        return data

    def skipped(reason: str, detail: str = "") -> Skipped:
        return Skipped(file=file, key=group.key, reason=reason, detail=detail)

    picture = next((member for name, member in group.members.items() if name.endswith(_PICTURES)), None)
    captions: list[Any] = []
    try:
        if "txt" in group.members:
            captions = [content(group.members["txt"]).decode("utf-8")]
        elif "json" in group.members:
            fields = json.loads(content(group.members["json"]).decode("utf-8"))
            caption = fields.get("caption") if isinstance(fields, dict) else None
            captions = caption if isinstance(caption, list) else [caption]
    except UnicodeDecodeError as error:
        return skipped("caption is not UTF-8", str(error))
    except ValueError as error:
        return skipped("json is not readable", str(error))
    if picture is None:
        return skipped("no picture")
    image = content(picture)
    cleaned = clean_captions(captions)
    if not cleaned:
        return skipped("no caption")
    return Example(file=file, key=group.key, image=image, captions=cleaned)


class WebDatasetSource(Source):
    """Tar files of a glob pattern, in the order of their names.

    Raises:
      UserError: the pattern matches nothing.
    """

    def __init__(self, pattern: str, limit: int | None):
        """Lists the files; with a limit it also looks for the end of the first `limit` samples."""
        paths = expand_pattern(pattern)
        if not paths:
            raise UserError(f"--source: no file matches {pattern!r}")
        sizes = [int(path.stat().length) for path in paths]
        # An empty file counts as one byte, so that a piece covers it and reports it.
        tars = [_TarFile(path, size, max(size, 1)) for path, size in zip(paths, sizes)]
        self._tars = tars if limit is None else _limited(tars, limit)

    @property
    def size(self) -> None:
        """Not known without reading the files."""
        return None

    def fingerprint(self) -> str:
        """Hash of names and sizes."""
        listing = [(tar.path.name, tar.size, tar.end) for tar in self._tars]
        return hashlib.sha256(repr(listing).encode("utf-8")).hexdigest()[:16]

    def units(self, count: int | None = None) -> Sequence[tuple[Piece, ...]]:
        """Without a count each tar in pieces of 32 MiB; otherwise equal shares of the bytes of all tars."""
        if count is None:
            units: list[tuple[Piece, ...]] = []
            for number, tar in enumerate(self._tars):
                pieces = max(1, math.ceil(tar.end / BYTES_PER_UNIT))
                bounds = [tar.end * i // pieces for i in range(pieces + 1)]
                units += [(Piece(number, start, end),) for start, end in itertools.pairwise(bounds)]
            return units
        total = sum(tar.end for tar in self._tars)
        return [self._pieces(total * i // count, total * (i + 1) // count) for i in range(count)]

    def _pieces(self, start: int, end: int) -> tuple[Piece, ...]:
        """A range of bytes of all tars put end to end, as ranges of single tars."""
        pieces, before = [], 0
        for number, tar in enumerate(self._tars):
            low, high = max(start - before, 0), min(end - before, tar.end)
            if low < high:
                pieces.append(Piece(number, low, high))
            before += tar.end
        return tuple(pieces)

    def read(self, unit: tuple[Piece, ...]) -> Iterator[Example | Skipped]:
        """The samples that begin in the pieces of a unit."""
        for piece in unit:
            yield from self._read_piece(piece)

    def _read_piece(self, piece: Piece) -> Iterator[Example | Skipped]:
        """The samples that begin in one piece; a broken tar is reported by the piece where it breaks."""
        source = self._tars[piece.tar]
        name = os.fspath(source.path)
        key = ""
        try:
            with source.path.open("rb") as file, _open_tar(file) as tar:
                for group in _groups(_members(tar, file, source.size)):
                    if group.offset >= piece.end:
                        return
                    if group.offset < piece.start:
                        continue
                    key = group.key
                    try:
                        yield _read_sample(tar, group, name)
                    except tarfile.TarError as error:
                        raise _DamagedError(group.offset, str(error)) from error
                    key = ""
        except _DamagedError as damage:
            if piece.start <= damage.offset < piece.end:
                yield Skipped(file=name, key=key, reason="truncated or damaged tar", detail=str(damage))
        except FileNotFoundError:
            yield Skipped(file=name, key="", reason="tar has disappeared")


def _open_tar(file: Any) -> tarfile.TarFile:
    """Opens a tar; one without a single good header raises `_DamagedError` at 0."""
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.TarError as error:
        raise _DamagedError(0, str(error)) from error


def _limited(tars: list[_TarFile], limit: int) -> list[_TarFile]:
    """The tars up to the end of the first `limit` samples."""
    kept, found = [], 0
    for tar in tars:
        end = tar.end
        try:
            with tar.path.open("rb") as file, _open_tar(file) as opened:
                for group in _groups(_members(opened, file, tar.size)):
                    if found == limit:
                        end = group.offset
                        break
                    found += 1
        except _DamagedError:
            pass  # reported when it is read
        kept.append(dataclasses.replace(tar, end=end))
        if found == limit:
            break
    return kept


def expand_pattern(pattern: str) -> list[epath.Path]:
    """The files of a glob pattern, sorted; wildcards in folder names are allowed."""
    path = epath.Path(pattern).expanduser()
    parts = list(path.parts)
    first = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), None)
    if first is None:
        return [path] if path.is_file() else sorted(path.glob("*.tar")) if path.is_dir() else []
    root = path
    for _ in parts[first:]:
        root = root.parent
    return sorted(root.glob("/".join(parts[first:])))
