"""`webdataset:PATH/*.tar`: tar files in img2dataset's layout, read with the standard library.

A sample is the run of members whose names agree up to the first dot of the base name
(https://github.com/webdataset/webdataset#the-webdataset-format): a picture and a .txt or .json.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from imagen_jax.data.examples import (
    PICTURE_BYTES,
    Example,
    Skipped,
    Source,
    UnusableError,
    attempt,
    caption_lines,
    clean_captions,
    fault_of,
)
from imagen_jax.data.patterns import expand_braces, expand_pattern, is_url, url_size
from imagen_jax.data.picture_kinds import PICTURE_SUFFIXES
from imagen_jax.data.tars import Content, DamagedTarError, Run, open_tar, runs
from imagen_jax.errors import UserError
from imagen_jax.files import parse_json

BYTES_PER_UNIT = 32 * 2**20  # of tar: about a thousand pictures of 256 × 256 pixels
_PACKED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz")
_SUFFIXES = (".tar", *(f".tar{suffix}" for suffix in (".gz", ".bz2", ".xz")), ".tgz", ".tbz2", ".txz")
_TWICE = "key occurs twice"
_FOREVER = 2**63  # beyond the end of any file


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebDatasetOptions:
    """What `webdataset:PATH,…` says."""

    path: str  # glob with braces, file, folder or URL
    image: str | None = (
        None  # extension of the picture, `jpg` or `depth.png`; None: the only one of a picture
    )
    text: str | None = None  # extension of the caption; None: `txt`, else `json`


@dataclasses.dataclass(frozen=True)
class Piece:
    """The samples of a tar whose first header lies in a range of bytes."""

    tar: int  # number of the tar
    start: int  # bytes
    end: int  # bytes, excluded


@dataclasses.dataclass(frozen=True)
class _TarFile:
    """One tar."""

    path: epath.Path | str  # str: a URL
    base: str  # last part of its name
    size: int  # bytes of the file
    end: int  # bytes of the tar: the samples from here on are beyond the limit
    packed: bool = False  # compressed

    @property
    def name(self) -> str:
        """Path or URL, for messages."""
        return os.fspath(self.path)

    @property
    def whole(self) -> bool:
        """Whether it can only be read from its start: it is one piece."""
        return self.packed or isinstance(self.path, str)

    @property
    def weight(self) -> int:
        """Bytes that it counts for where the source is divided."""
        return max(self.size, 1) if self.whole else self.end


class WebDatasetSource(Source):
    """Tar files of a glob pattern, in the order of their names.

    Raises:
      UserError: the pattern matches nothing, or a server does not give a file.
    """

    def __init__(self, options: WebDatasetOptions, limit: int | None):
        """Lists the files; with a limit it also looks for the end of the first `limit` samples."""
        self._options = options
        self._image = options.image and options.image.lower().lstrip(".")
        self._text = options.text and options.text.lower().lstrip(".")
        tars = [_tar_file(path) for path in _paths(options.path)]
        if not tars:
            raise UserError(f"--source: no file matches {options.path!r}")
        self._tars = tars if limit is None else _limited(tars, limit)
        self._scattered: dict[int, frozenset[str]] = {}

    @property
    def size(self) -> None:
        """Not known without reading the files."""
        return None

    def fingerprint(self) -> str:
        """Hash of names, sizes and options."""
        listing: list[tuple[str | int | None, ...]] = [(tar.base, tar.size, tar.end) for tar in self._tars]
        if self._image or self._text:
            listing.append((self._image, self._text))
        return hashlib.sha256(repr(listing).encode("utf-8")).hexdigest()[:16]

    def units(self, count: int | None = None) -> Sequence[tuple[Piece, ...]]:
        """Without a count each tar in pieces of 32 MiB; otherwise equal shares of the bytes of all tars.

        A tar that can only be read from its start is a single piece.
        """
        if count is None:
            units: list[tuple[Piece, ...]] = []
            for number, tar in enumerate(self._tars):
                pieces = 1 if tar.whole else max(1, math.ceil(tar.end / BYTES_PER_UNIT))
                bounds = [tar.end * i // pieces for i in range(pieces + 1)]
                units += [(Piece(number, start, end),) for start, end in itertools.pairwise(bounds)]
            return units
        total = sum(tar.weight for tar in self._tars)
        return [self._pieces(total * i // count, total * (i + 1) // count) for i in range(count)]

    def _pieces(self, start: int, end: int) -> tuple[Piece, ...]:
        """A range of bytes of all tars put end to end, as ranges of single tars."""
        pieces, before = [], 0
        for number, tar in enumerate(self._tars):
            low, high = max(start - before, 0), min(end - before, tar.weight)
            if tar.whole and start <= before < end:
                pieces.append(Piece(number, 0, tar.end))
            elif not tar.whole and low < high:
                pieces.append(Piece(number, low, high))
            before += tar.weight
        return tuple(pieces)

    def read(self, unit: tuple[Piece, ...]) -> Iterator[Example | Skipped]:
        """The samples that begin in the pieces of a unit."""
        for piece in unit:
            yield from self._read_piece(piece)

    def _read_piece(self, piece: Piece) -> Iterator[Example | Skipped]:
        """The samples that begin in one piece; a broken tar is reported by the piece where it breaks."""
        tar = self._tars[piece.tar]
        # Extensions of all samples up to here, of other pieces too: whether a key comes again must not depend
        # on how the source is divided.
        seen: dict[str, set[str]] = {}
        wanted = functools.partial(self._is_wanted, piece, seen)
        try:
            with open_tar(tar.path, packed=tar.packed) as opened:
                for run in runs(opened, tar.name, wanted, PICTURE_BYTES):
                    if run.offset >= piece.end:
                        return
                    before = seen.get(run.key)
                    if run.offset >= piece.start:
                        yield from self._read_run(run, before, piece.tar)
                    seen[run.key] = (before or set()) | set(run.counts)
        except DamagedTarError as damage:
            if piece.start <= damage.sample < piece.end:
                detail = f"{damage}; what it holds from byte {damage.position} on is unknown"
                yield Skipped(file=tar.name, key=damage.key, reason="truncated or damaged tar", detail=detail)
        except FileNotFoundError:
            if piece.start == 0:
                yield Skipped(file=tar.name, key="", reason="tar has disappeared")
        except OSError as error:
            fault = fault_of(error, tar.name)
            if piece.start == 0:
                yield Skipped(file=tar.name, key="", reason="tar cannot be read", detail=fault)

    def _read_run(self, run: Run, before: set[str] | None, tar: int) -> Iterator[Example | Skipped]:
        """The samples of a run of members of one key."""
        file = self._tars[tar].name
        again = Skipped(file=file, key=run.key, reason=_TWICE)
        samples = _count_samples(run, before)
        if samples and before is None and run.in_order:
            found = attempt(functools.partial(self._example, run, file), file=file, key=run.key)
            lacks = isinstance(found, Skipped) and found.reason in ("no picture", "no caption")
            if lacks and run.key in self._scattered_keys(tar):
                detail = "tar --sort=name, or img2dataset, puts them side by side"
                found = Skipped(file=file, key=run.key, reason="members are not adjacent", detail=detail)
            yield found
            samples -= 1
        yield from itertools.repeat(again, samples)

    def _scattered_keys(self, tar: int) -> frozenset[str]:
        """The keys whose members do not stand side by side, found by a pass over all headers of a tar."""
        if tar not in self._scattered:
            there: Counter[str] = Counter()
            try:
                with open_tar(self._tars[tar].path, packed=self._tars[tar].packed) as opened:
                    names = runs(opened, self._tars[tar].name, _nothing, PICTURE_BYTES)
                    there.update(run.key for run in names)
            except (DamagedTarError, OSError):
                pass  # reported when it is read
            self._scattered[tar] = frozenset(key for key, number in there.items() if number > 1)
        return self._scattered[tar]

    def _is_wanted(
        self, piece: Piece, seen: Mapping[str, set[str]], offset: int, key: str, extension: str
    ) -> bool:
        """Whether the content of a member may be of use: of a sample of this piece, which is not there already."""
        if not piece.start <= offset < piece.end or key in seen:
            return False
        usual = extension in PICTURE_SUFFIXES or extension in ("txt", "json")
        return usual or extension in (self._image, self._text)

    def _example(self, run: Run, file: str) -> Example:
        """The picture and the captions of a run's first sample."""
        fault = None
        try:
            picture = self._picture(run)
        except UnusableError as error:
            fault = error  # of two faults the caption's is named, which says more
        captions = self._captions(run)
        if fault is not None:
            raise fault
        if not captions:
            raise UnusableError("no caption")
        return Example(file=file, key=run.key, image=_bytes(picture), captions=captions)

    def _picture(self, run: Run) -> Content:
        """The picture's member: the only one whose whole extension is a picture's, or that of the option."""
        if self._image:
            if self._image not in run.contents:
                raise UnusableError("no picture", f"no member {self._image}")
            return run.contents[self._image]
        there = [extension for extension in run.contents if extension in PICTURE_SUFFIXES]
        if len(there) == 1:
            return run.contents[there[0]]
        if there:
            advice = "name the one to take with ,image=EXTENSION"
            raise UnusableError("several pictures", f"{', '.join(sorted(there))}; {advice}")
        others = ", ".join(
            sorted(extension for extension in run.contents if extension not in ("txt", "json"))
        )
        advice = f"of {others} one can be named with ,image=EXTENSION" if others else ""
        raise UnusableError("no picture", advice)

    def _captions(self, run: Run) -> tuple[str, ...]:
        """The captions of a .txt, one a line, or of a .json's field."""
        extension = self._text or ("txt" if "txt" in run.contents else "json")
        if extension not in run.contents:
            return ()
        data = _bytes(run.contents[extension])
        if extension != "json":
            return clean_captions(caption_lines(data))
        try:
            fields = parse_json(data, "json")
        except UserError as error:
            raise UnusableError("json is not readable", str(error)) from error
        if not isinstance(fields, dict):
            return ()
        captions = fields.get("caption") or fields.get("text")
        return clean_captions(captions if isinstance(captions, list) else [captions])


def _nothing(offset: int, key: str, extension: str) -> bool:
    """What is wanted of a tar of which only the headers are read."""
    return False


def _bytes(content: Content) -> bytes:
    """What a member holds; raises UnusableError if it cannot be had."""
    if isinstance(content, UnusableError):
        raise content
    return content or b""


def _count_samples(run: Run, before: set[str] | None) -> int:
    """Samples that a run adds, where those before it in the tar have members of these extensions under its key.

    A run that only adds members of other kinds, and not a second picture, is the rest of the sample that was
    counted where its first member stood.
    """
    if before is None:
        return run.samples
    pictures = bool(PICTURE_SUFFIXES & before) and bool(PICTURE_SUFFIXES & set(run.counts))
    return run.samples if pictures or before & set(run.counts) else 0


def _paths(pattern: str) -> list[epath.Path | str]:
    """Files and URLs of a pattern."""
    if is_url(pattern):
        return list(expand_braces(pattern))
    return list(expand_pattern(pattern, _SUFFIXES))


def _tar_file(path: epath.Path | str) -> _TarFile:
    """What is known of a tar before it is read; one that has gone is reported when it is read."""
    name = os.fspath(path)
    if isinstance(path, str):
        size = url_size(path)
        name = name.partition("?")[0]  # what is signed may change
    else:
        try:
            size = int(path.stat().length)
        except OSError as error:
            fault_of(error, name)
            size = 0
    packed = name.lower().endswith(_PACKED)
    whole = packed or isinstance(path, str)
    # An empty file counts as one byte, so that a piece covers it and reports it.
    return _TarFile(path, os.path.basename(name), size, _FOREVER if whole else max(size, 1), packed)


def _limited(tars: list[_TarFile], limit: int) -> list[_TarFile]:
    """The tars up to the end of the first `limit` samples."""
    kept, found = [], 0
    for tar in tars:
        end = tar.end
        seen: dict[str, set[str]] = {}
        try:
            with open_tar(tar.path, packed=tar.packed) as opened:
                for run in runs(opened, tar.name, _nothing, PICTURE_BYTES):
                    if found >= limit:
                        end = run.offset
                        break
                    before = seen.get(run.key)
                    found += _count_samples(run, before)
                    seen[run.key] = (before or set()) | set(run.counts)
        except (DamagedTarError, OSError):
            pass  # reported when it is read
        kept.append(dataclasses.replace(tar, end=end))
        if found >= limit:
            break
    return kept
