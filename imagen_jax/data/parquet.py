"""`parquet:PATH`: parquet files with a column of encoded pictures and one of captions, as Hugging Face keeps them."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from imagen_jax.data.columns import choose_column
from imagen_jax.data.examples import (
    READ_ERRORS,
    Example,
    Skipped,
    Source,
    UnusableError,
    attempt,
    clean_captions,
    decode_caption,
    fault_of,
    is_lfs_pointer,
)
from imagen_jax.data.folder import EXAMPLES_PER_UNIT
from imagen_jax.data.patterns import expand_pattern, is_url
from imagen_jax.errors import UserError
from imagen_jax.files import check_regular, files_below

_ROWS_AT_A_TIME = 64  # rows decoded together: some tens of megabytes of pictures
_FEW_ROWS = 100_000
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
        _pyarrow_parquet()
        paths = _files(options.path)
        if not paths:
            raise UserError(f"--source: no parquet file matches {options.path!r}")
        root = os.path.commonpath([os.path.dirname(os.fspath(path)) for path in paths])
        self._files: list[_File] = []
        schemas: list[tuple[str, Any]] = []
        names = [os.path.relpath(os.fspath(path), root or ".") for path in paths]
        stems = Counter(os.path.splitext(name)[0] for name in names)
        for path, name in zip(paths, names, strict=True):
            if stems[os.path.splitext(name)[0]] == 1:  # else X.parquet and X.pq would have the same keys
                name = os.path.splitext(name)[0]
            try:
                groups, schema = _read_footer(path)
                self._files.append(_File(path=path, name=name, groups=groups))
                schemas.append((os.fspath(path), schema))
            except _errors() as error:
                fault = fault_of(error, os.fspath(path))
                self._files.append(_File(path=path, name=name, groups=(), fault=fault))
        if not schemas:
            raise UserError(f"--source: {paths[0]} does not open as parquet ({self._files[0].fault})")
        self._image, self._text, self._key = _choose_columns(schemas[0][1], options)
        for where, schema in schemas:
            _check_columns(schema, where, image=self._image, text=self._text, key=self._key)
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
        """Reads the rows of a unit, a few at a time; where a row group breaks off, the rest of it is skipped."""
        parquet = _pyarrow_parquet()
        for number, parts in itertools.groupby(unit, key=lambda rows: rows.file):
            source = self._files[number]
            path = os.fspath(source.path)
            if source.fault:
                yield Skipped(file=path, key="", reason="damaged parquet file", detail=source.fault)
                continue
            waiting = list(parts)
            try:
                with source.path.open("rb") as file:
                    # A column of a row group may be gigabytes: pages are read as they are needed.
                    opened = parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER)
                    while waiting:
                        yield from self._read_rows(opened, source, waiting[0])
                        del waiting[0]
            except _errors() as error:
                fault = fault_of(error, path)
                for rows in waiting:
                    yield from _lost(
                        source, rows, range(rows.start, rows.stop), "damaged parquet file", fault
                    )

    def _read_rows(self, opened: Any, source: _File, rows: Rows) -> Iterator[Example | Skipped]:
        columns = list(dict.fromkeys(filter(None, (self._image, self._text, self._key))))
        path, position = os.fspath(source.path), 0
        first = sum(source.groups[: rows.group])
        batches: Iterator[Any] | None = None
        while position < rows.stop:
            try:
                if batches is None:
                    batches = opened.iter_batches(_ROWS_AT_A_TIME, row_groups=[rows.group], columns=columns)
                batch = next(batches, None)
                if batch is None:
                    raise ValueError(f"{position} of {source.groups[rows.group]} rows are there")
                image, text, key = (
                    None if name is None else batch.column(name)
                    for name in (self._image, self._text, self._key)
                )
                text = _as_bytes(text)
                key = None if key is None else _as_bytes(key)
            except _errors() as error:
                # Of the units with a part of the group each lists its own rows.
                left = range(max(position, rows.start), rows.stop)
                yield from _lost(source, rows, left, "damaged row group", fault_of(error, path))
                return
            for row in range(max(rows.start - position, 0), min(rows.stop - position, batch.num_rows)):
                name = f"{source.name}#{first + position + row}"
                yield self._read_row(image, text, key, row, path, name)
            position += batch.num_rows

    def _read_row(self, image: Any, text: Any, key: Any, row: int, path: str, name: str) -> Example | Skipped:
        """One row of a batch's columns; `name` is its file's name and its number."""
        if key is None:
            return attempt(functools.partial(_example, image, text, row, path, name), file=path, key=name)
        try:
            value = key[row].as_py()
        except _errors() as error:
            return Skipped(file=path, key=name, reason="no key", detail=fault_of(error, path))
        if value is None:
            return Skipped(file=path, key=name, reason="no key")
        named = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
        found = attempt(functools.partial(_example, image, text, row, path, named), file=path, key=named)
        if isinstance(found, Skipped):
            found = dataclasses.replace(found, detail=f"{name}: {found.detail}" if found.detail else name)
        return found


def _example(image: Any, text: Any, row: int, path: str, key: str) -> Example:
    """The example of one row."""
    picture = image[row]
    if hasattr(picture, "keys"):  # a struct, whose other fields are not looked at
        picture = picture["bytes"] if picture.is_valid else None
    data = None if picture is None else picture.as_py()
    if not data:
        raise UnusableError("no picture")
    texts = text[row].as_py()
    captions = [
        decode_caption(caption) if isinstance(caption, bytes) else caption
        for caption in (texts if isinstance(texts, list) else [texts])
    ]
    cleaned = clean_captions(captions)
    if not cleaned:
        raise UnusableError("no caption")
    return Example(file=path, key=key, image=data, captions=cleaned)


def _lost(source: _File, rows: Rows, left: range, reason: str, detail: str) -> Iterator[Skipped]:
    """The rows of a group that cannot be read, one by one: the footer says how many there are."""
    first = sum(source.groups[: rows.group])
    for row in left:
        name = f"{source.name}#{first + row}"
        yield Skipped(file=os.fspath(source.path), key=name, reason=reason, detail=detail)


def _pyarrow_parquet() -> Any:
    """Imported late: nothing else needs it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "--source: parquet needs pyarrow, which is not installed; pip install pyarrow"
        ) from error
    return pyarrow.parquet


def _errors() -> tuple[type[Exception], ...]:
    """What pyarrow lets out on damaged files."""
    import pyarrow

    return (*READ_ERRORS, pyarrow.ArrowException)


def _files(path: str) -> list[epath.Path]:
    """The files of a glob or a single one; of a folder all in it and below it."""
    if is_url(path):
        raise UserError(f"--source: parquet reads no URLs, got {path!r}; download the files first")
    folder = epath.Path(path).expanduser()
    if not folder.is_dir():
        return expand_pattern(path, (".parquet",))
    found = files_below(folder)
    files = sorted(file for file in found if file.suffix == ".parquet" and not file.name.startswith("."))
    for file in files:
        check_regular(file)
    return files


def _read_footer(path: epath.Path) -> tuple[tuple[int, ...], Any]:
    """Rows of each row group, and the schema.

    Raises:
      ValueError: the footer is not to be believed.
      anything of `_errors`: the file does not open.
    """
    with path.open("rb") as file:
        if is_lfs_pointer(file.read(512)):
            raise ValueError("a Git LFS pointer; git lfs pull fetches the file")
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        with _pyarrow_parquet().ParquetFile(file) as opened:
            metadata = opened.metadata
            groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
            schema = opened.schema_arrow
    # Every lost row is listed, so that a footer must not promise more than the file can hold.
    if min(groups, default=0) < 0 or sum(groups) > max(size, _FEW_ROWS):
        raise ValueError(f"{sum(groups)} rows in {size} bytes")
    return groups, schema


def _as_bytes(column: Any) -> Any:
    """A column whose texts are left as bytes: pyarrow does not check that they are UTF-8."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string(column.type):
        return column.cast(pyarrow.binary())
    if types.is_large_string(column.type):
        return column.cast(pyarrow.large_binary())
    if types.is_list(column.type) and _is_string(column.type.value_type):
        return column.cast(pyarrow.list_(pyarrow.large_binary()))
    if types.is_large_list(column.type) and _is_string(column.type.value_type):
        return column.cast(pyarrow.large_list(pyarrow.large_binary()))
    return column


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_text(kind: Any) -> bool:
    """Whether a column holds texts or lists of texts."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return _is_string(kind)


def _is_image(kind: Any) -> bool:
    """Whether a column holds encoded pictures: bytes, or Hugging Face's struct."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(inner.name == "bytes" and _is_bytes(inner.type) for inner in kind)
    return _is_bytes(kind)


def _choose_columns(schema: Any, options: ParquetOptions) -> tuple[str, str, str | None]:
    """Names of the picture's, the caption's and, if it was asked for, the key's column."""
    where = f"parquet {options.path}"
    images = [field.name for field in schema if _is_image(field.type)]
    texts = [field.name for field in schema if _is_text(field.type)]
    if options.key is not None and options.key not in schema.names:
        raise UserError(f"--source: key={options.key}: {where} has no such column")
    image = choose_column("image", options.image, images, where)
    return image, choose_column("text", options.text, texts, where), options.key


def _check_columns(schema: Any, where: str, *, image: str, text: str, key: str | None) -> None:
    """Every file has to have the columns that the first one has.

    Raises:
      UserError: one is missing, of another type or there twice; names the file and the column.
    """
    from pyarrow import types

    there = ", ".join(schema.names) or "none"
    for role, name in {"image": image, "text": text, "key": key}.items():
        if name is None:
            continue
        places = schema.get_all_field_indices(name)
        if len(places) != 1:
            count = f"{len(places)} columns" if places else "no column"
            raise UserError(f"--source: {where} has {count} {name!r} for the {role} (there: {there})")
        kind = schema.field(places[0]).type
        # A column of which a file has no value at all has no type there.
        fits = {"image": _is_image, "text": _is_text}.get(role, lambda _: True)(kind)
        if not fits and not types.is_null(kind):
            raise UserError(f"--source: {where}: the column {name!r} is no {role} column but {kind}")
