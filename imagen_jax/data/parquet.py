"""`parquet:PATH`: parquet files with a column of encoded pictures and one of captions, as Hugging Face keeps them."""

import bisect
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from imagen_jax.data.columns import choose_column
from imagen_jax.data.examples import Example, Skipped, Source, clean_captions
from imagen_jax.data.folder import EXAMPLES_PER_UNIT
from imagen_jax.data.webdataset import expand_pattern
from imagen_jax.errors import UserError
from imagen_jax.files import files_below

_ROWS_AT_A_TIME = 64  # rows decoded together: some tens of megabytes of pictures
_BUFFER = 2**20  # bytes read ahead in a column, in place of the whole column of a row group


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetOptions:
    """What `parquet:PATH,…` says."""

    path: str  # glob, file or folder; local or cloud
    image: str | None = None  # column with the picture: bytes, or Hugging Face's struct {bytes, path}
    text: str | None = None  # column with the caption or a list of captions
    key: str | None = None  # column that names the row; None: the file's name and the row's number


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of one row group."""

    file: int  # number of the file
    group: int  # number of the row group; -1 stands for a file that does not open
    start: int  # row of the group
    stop: int  # row of the group, excluded


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
    """What a file's footer says."""

    path: epath.Path
    name: str  # relative to the folder of all, without its suffix: the first part of keys
    groups: tuple[int, ...]  # rows of each row group
    fault: str = ""  # why it does not open


class ParquetSource(Source):
    """Rows of parquet files, in the order of the files' names.

    Raises:
      UserError: no such files, none that opens, no such columns, or pyarrow is not installed.
    """

    def __init__(self, options: ParquetOptions, limit: int | None):
        """Reads the footers of the files."""
        parquet = _pyarrow_parquet()
        paths = _files(options.path)
        if not paths:
            raise UserError(f"--source: no parquet file matches {options.path!r}")
        root = os.path.commonpath([os.path.dirname(os.fspath(path)) for path in paths])
        self._files: list[_File] = []
        schema = None
        for path in paths:
            name = os.path.splitext(os.path.relpath(os.fspath(path), root or "."))[0]
            try:
                with path.open("rb") as file, parquet.ParquetFile(file) as opened:
                    schema = schema or opened.schema_arrow
                    metadata = opened.metadata
                    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
                self._files.append(_File(path=path, name=name, groups=groups))
            except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
                self._files.append(_File(path=path, name=name, groups=(), fault=_one_line(error)))
        if schema is None:
            raise UserError(f"--source: {paths[0]} does not open as parquet ({self._files[0].fault})")
        self._image, self._text, self._key = _choose_columns(schema, options)
        self._groups = self._limited(limit)
        # Rows up to the end of each group; a file that does not open counts as one row, so that it is reported.
        self._ends = list(itertools.accumulate(group.stop for group in self._groups))

    def _limited(self, limit: int | None) -> list[Rows]:
        """All row groups, up to the limit."""
        groups: list[Rows] = []
        for number, file in enumerate(self._files):
            groups += [Rows(number, -1, 0, 1)] if file.fault else []
            groups += [Rows(number, i, 0, rows) for i, rows in enumerate(file.groups) if rows]
        if limit is None:
            return groups
        kept = []
        for group in groups:
            if limit > 0:
                kept.append(dataclasses.replace(group, stop=min(group.stop, limit)))
            limit -= group.stop
        return kept

    @property
    def size(self) -> int:
        """Number of rows, a file that does not open counted as one."""
        return self._ends[-1] if self._ends else 0

    def fingerprint(self) -> str:
        """Hash of names, rows and the columns read."""
        listing = [(file.name, file.groups, file.fault) for file in self._files]
        identity = (listing, self.size, self._image, self._text, self._key)
        return hashlib.sha256(repr(identity).encode("utf-8")).hexdigest()[:16]

    def units(self, count: int | None = None) -> Sequence[tuple[Rows, ...]]:
        """Without a count whole row groups, of about a thousand rows together; else equal shares of all rows."""
        if count is not None:
            bounds = [self.size * i // count for i in range(count + 1)]
            return [self._between(start, stop) for start, stop in itertools.pairwise(bounds)]
        units: list[tuple[Rows, ...]] = []
        waiting: tuple[Rows, ...] = ()
        for group in self._groups:
            waiting += (group,)
            if sum(each.stop for each in waiting) >= EXAMPLES_PER_UNIT:
                units.append(waiting)
                waiting = ()
        return [*units, waiting] if waiting else units

    def _between(self, start: int, stop: int) -> tuple[Rows, ...]:
        """The parts of the row groups that hold the rows from `start` to `stop`."""
        parts = []
        while start < stop:
            number = bisect.bisect_right(self._ends, start)
            group = self._groups[number]
            before = self._ends[number] - group.stop
            end = min(stop, self._ends[number])
            parts.append(dataclasses.replace(group, start=start - before, stop=end - before))
            start = end
        return tuple(parts)

    def read(self, unit: tuple[Rows, ...]) -> Iterator[Example | Skipped]:
        """Reads the rows of a unit, a few at a time; where a row group breaks off, the rest of it is left out."""
        parquet = _pyarrow_parquet()
        for number, parts in itertools.groupby(unit, key=lambda rows: rows.file):
            source = self._files[number]
            path = os.fspath(source.path)
            if source.fault:
                yield Skipped(file=path, key="", reason="damaged parquet file", detail=source.fault)
                continue
            try:
                with source.path.open("rb") as file:
                    # A column of a row group may be gigabytes: pages are read as they are needed.
                    opened = parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER)
                    for rows in parts:
                        yield from self._read_rows(opened, source, rows)
            except (OSError, ValueError) as error:
                yield Skipped(file=path, key="", reason="damaged parquet file", detail=_one_line(error))

    def _read_rows(self, opened: Any, source: _File, rows: Rows) -> Iterator[Example | Skipped]:
        columns = list(dict.fromkeys(filter(None, (self._image, self._text, self._key))))
        path, position = os.fspath(source.path), 0
        first = sum(source.groups[: rows.group])
        batches = opened.iter_batches(_ROWS_AT_A_TIME, row_groups=[rows.group], columns=columns)
        while position < rows.stop:
            try:
                batch = next(batches)
            except (OSError, ValueError, StopIteration) as error:
                # Of all units with a part of the group the one where it breaks off reports it.
                if position >= rows.start:
                    name = f"{source.name}#{first + position}"
                    detail = _one_line(error)
                    yield Skipped(file=path, key=name, reason="damaged row group", detail=detail)
                return
            start, stop = max(rows.start - position, 0), min(rows.stop - position, batch.num_rows)
            if start < stop:
                for offset, row in enumerate(batch.slice(start, stop - start).to_pylist()):
                    yield self._example(row, path, f"{source.name}#{first + position + start + offset}")
            position += batch.num_rows

    def _example(self, row: dict[str, Any], path: str, name: str) -> Example | Skipped:
        """One row."""
        key = name
        if self._key is not None:
            if row[self._key] is None:
                return Skipped(file=path, key=name, reason="no key")
            key = str(row[self._key])
        image = row[self._image]
        if isinstance(image, dict):
            image = image["bytes"]
        if not image:
            return Skipped(file=path, key=key, reason="no picture")
        texts = row[self._text]
        captions = clean_captions(texts if isinstance(texts, list) else [texts])
        if not captions:
            return Skipped(file=path, key=key, reason="no caption")
        return Example(file=path, key=key, image=image, captions=captions)


def _pyarrow_parquet() -> Any:
    """Imported late: nothing else needs it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "--source: parquet needs pyarrow, which is not installed; pip install pyarrow"
        ) from error
    return pyarrow.parquet


def _files(path: str) -> list[epath.Path]:
    """The files of a glob or a single one; of a folder all in it and below it."""
    folder = epath.Path(path).expanduser()
    if folder.is_dir():
        found = files_below(folder)
        return sorted(file for file in found if file.suffix == ".parquet" and not file.name.startswith("."))
    return expand_pattern(path)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _choose_columns(schema: Any, options: ParquetOptions) -> tuple[str, str, str | None]:
    """Names of the picture's, the caption's and, if it was asked for, the key's column."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def is_text(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind)

    def is_image(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(inner.name == "bytes" and is_bytes(inner.type) for inner in kind)
        return is_bytes(kind)

    where = f"parquet {options.path}"
    images = [field.name for field in schema if is_image(field.type)]
    texts = [field.name for field in schema if is_text(field.type)]
    if options.key is not None and options.key not in schema.names:
        raise UserError(f"--source: key={options.key}: {where} has no such column")
    image = choose_column("image", options.image, images, where)
    return image, choose_column("text", options.text, texts, where), options.key
