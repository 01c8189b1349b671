"""`tfds:NAME`: a prepared TensorFlow data set with a picture and captions, read without TensorFlow.

Where it lies, its splits and its features come from TFDS; the records are read by position with this
project's own reader (file format tfrecord) or with array_record's, and only the wanted features are looked at.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
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
    even_ranges,
    fault_of,
    one_line,
)
from imagen_jax.data.folder import EXAMPLES_PER_UNIT
from imagen_jax.data.tfds_features import check_features
from imagen_jax.data.tfrecord import TFRecordReader
from imagen_jax.errors import UserError
from imagen_jax.files import check_regular, read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsOptions:
    """What `tfds:NAME,…` says."""

    name: str  # NAME, NAME/CONFIG, NAME:VERSION, or the folder of a prepared data set
    image: str | None = None  # feature that holds the picture; None: found by type
    text: str | None = None  # feature that holds the caption or captions; None: found by type and name
    key: str | None = None  # feature that names the record; None: its shard and position, as TFDS's tfds_id
    split: str | None = None  # split or part of one, "train[:10%]"; None: the --split of the command
    data_dir: str | None = None  # where data sets are prepared; None: TFDS_DATA_DIR or ~/tensorflow_datasets


class _ArrayRecordReader:
    """Random access to an array_record file."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._reader: Any = None

    def _open(self) -> Any:
        if self._reader is None:
            from array_record.python import array_record_module

            if not self._path.exists():
                raise FileNotFoundError(self._path)
            self._reader = array_record_module.ArrayRecordReader(os.fspath(self._path))
        return self._reader

    def __len__(self) -> int:
        return self._open().num_records()

    def __getitem__(self, number: int) -> bytes:
        return self._open().read([number])[0]


_READERS: dict[str, Any] = {"tfrecord": TFRecordReader, "array_record": _ArrayRecordReader}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shard:
    """The records of one file that belong to the split."""

    path: epath.Path
    first: int  # position of the first of them in the file
    reader: Any  # has a length and gives bytes by position


class TfdsSource(Source):
    """The records of a split, in the order of its shards.

    Raises:
      UserError: the data set is not prepared, has no such split or feature, or is in a file format that is
        not read here.
    """

    def __init__(self, options: TfdsOptions, split: str, limit: int | None):
        """Reads the data set's JSON files; the shards are opened when they are read."""
        builder = _open_builder(options)
        info = builder.info
        self._where = f"tfds data set {info.full_name}"
        self._image, self._text, self._key = _choose_features(info.features, options, self._where)
        file_format = info.file_format.value
        if file_format not in _READERS:
            raise UserError(
                f"--source: {self._where} is stored as {file_format}; prepare it as one of {', '.join(_READERS)}"
            )
        split = options.split or split
        try:
            part = info.splits[split]
            instructions = [each for each in part.file_instructions if each.take]
        except (KeyError, ValueError, AssertionError) as error:
            there = ", ".join(sorted(info.splits)) or "none"
            raise UserError(
                f"--source: {self._where} has no split {split!r} (there: {there}); "
                "name one with ,split=NAME or --split"
            ) from error
        readers: dict[str, Any] = {}
        self._shards: list[_Shard] = []
        for each in instructions:
            path = epath.Path(each.filename)
            reader = readers.setdefault(os.fspath(path), _READERS[file_format](path))
            self._shards.append(_Shard(path=path, first=each.skip, reader=reader))
        self._ends = list(itertools.accumulate(each.take for each in instructions))
        there_are = self._ends[-1] if self._ends else 0
        self._size = there_are if limit is None else min(limit, there_are)
        lengths = [(os.path.basename(each.filename), each.skip, each.take) for each in instructions]
        identity = (info.full_name, part.num_bytes, lengths, self._size, self._image, self._text, self._key)
        self._fingerprint = hashlib.sha256(repr(identity).encode("utf-8")).hexdigest()[:16]

    @property
    def size(self) -> int:
        """Number of records."""
        return self._size

    def fingerprint(self) -> str:
        """Hash of name, version, shards, their lengths and the features read."""
        return self._fingerprint

    def units(self, count: int | None = None) -> Sequence[range]:
        """Ranges of positions in the split."""
        return even_ranges(self._size, count or math.ceil(self._size / EXAMPLES_PER_UNIT))

    def read(self, unit: range) -> Iterator[Example | Skipped]:
        """Reads the records of a range; the records of a shard that cannot be read are skipped."""
        position = unit.start
        while position < unit.stop:
            number = bisect.bisect_right(self._ends, position)
            end = min(self._ends[number], unit.stop)
            start = self._ends[number - 1] if number else 0
            yield from self._read_shard(self._shards[number], range(position - start, end - start))
            position = end

    def _read_shard(self, shard: _Shard, part: range) -> Iterator[Example | Skipped]:
        file = os.fspath(shard.path)
        found, fault = 0, ("record is missing", "")
        try:
            check_regular(shard.path)
            found = len(shard.reader)
            fault = "record is missing", f"{found} in the shard"
        except FileNotFoundError:
            fault = "shard is missing", ""
        except READ_ERRORS as error:  # UserErrors of this project's own reader among them
            fault = "damaged shard", _first_part(error, file)
        for offset in part:
            position = shard.first + offset
            name = f"{shard.path.name}__{position}"
            if position >= found:
                yield Skipped(file=file, key=name, reason=fault[0], detail=fault[1])
                continue
            try:
                data = shard.reader[position]
            except READ_ERRORS as error:
                detail = _first_part(error, file)
                yield Skipped(file=file, key=name, reason="damaged record", detail=detail)
                continue
            yield self._parse(data, file, name)

    def _parse(self, data: bytes, file: str, name: str) -> Example | Skipped:
        """One serialised `tf.train.Example`."""
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            features = tf_example_pb2.Example.FromString(data).features.feature
        except DecodeError as error:
            return Skipped(file=file, key=name, reason="not a tf.train.Example", detail=str(error))
        key = name
        if self._key is not None:
            values = _values(features, self._key)
            if len(values) != 1:
                return Skipped(file=file, key=name, reason="no key", detail=f"{len(values)} of {self._key}")
            value = values[0]
            key = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
        return attempt(functools.partial(self._example, features, file, key), file=file, key=key)

    def _example(self, features: Any, file: str, key: str) -> Example:
        """The picture and the captions of a record."""
        images = [value for value in _values(features, self._image) if value and isinstance(value, bytes)]
        if len(images) != 1:
            raise UnusableError("several pictures" if images else "no picture")
        texts = [value for value in _values(features, self._text) if isinstance(value, bytes)]
        captions = clean_captions([decode_caption(text) for text in texts])
        if not captions:
            raise UnusableError("no caption")
        return Example(file=file, key=key, image=images[0], captions=captions)


def _first_part(error: BaseException, file: str) -> str:
    """What is wrong, without the advice that follows it."""
    return fault_of(error, file).partition(";")[0]


def _values(features: Any, name: str) -> Sequence[Any]:
    """All values of a feature; those of nested sequences are one flat list in TFDS's encoding."""
    for stored in (name, f"{name}/ragged_flat_values"):
        if stored in features:
            value = features[stored]
            kind = value.WhichOneof("kind")
            return list(getattr(value, kind).value) if kind else []
    return []


def _open_builder(options: TfdsOptions) -> Any:
    """TFDS's builder of a prepared data set."""
    import tensorflow_datasets as tfds
    from google.protobuf import json_format
    from tensorflow_datasets.core import read_only_builder

    name = options.name.rstrip("/")
    folder = epath.Path(name).expanduser()
    if (folder / "dataset_info.json").exists():
        if not (folder / "features.json").exists():
            raise UserError(f"--source: {folder} has no features.json; prepare it with a newer TFDS")
        read_json(folder / "dataset_info.json")
        check_features(folder)
        try:
            return tfds.builder_from_directory(os.fspath(folder))
        except (*READ_ERRORS, json_format.Error) as error:
            raise UserError(
                f"--source: {folder} does not open as a tfds data set ({one_line(error)})"
            ) from error
    if name.startswith((".", "/", "~")) or "://" in name:
        raise UserError(f"--source: {name} is no prepared tfds data set: it has no dataset_info.json")
    data_dir = options.data_dir and os.fspath(epath.Path(options.data_dir).expanduser())
    prepared = epath.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    check_features(prepared / re.split("[/:]", name)[0])
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (ValueError, AttributeError) as error:
        place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        flag = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"--source: tfds data set {name!r} is not prepared in {place}; prepare it once, where TensorFlow is "
            f"installed, with: tfds build {name}{flag}"
        ) from error


def _leaves(feature: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The features that are stored by themselves, under the names they are stored with."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        for key, inner in feature.items():
            yield from _leaves(inner, f"{name}/{key}" if name else key)
    elif isinstance(feature, tfds.features.Sequence):
        yield from _leaves(feature.feature, name)
    else:
        yield name, feature


def _choose_features(features: Any, options: TfdsOptions, where: str) -> tuple[str, str, str | None]:
    """Names of the picture, of the caption and, if it was asked for, of the key."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import dtype_utils

    leaves = dict(sorted(_leaves(features)))
    images = [name for name, feature in leaves.items() if isinstance(feature, tfds.features.Image)]
    texts = [
        name
        for name, feature in leaves.items()
        if name not in images and dtype_utils.is_string(feature.get_serialized_info().np_dtype)
    ]
    if options.key is not None and options.key not in leaves:
        raise UserError(f"--source: key={options.key}: {where} has no such feature")
    image = choose_column("image", options.image, images, where)
    return image, choose_column("text", options.text, texts, where), options.key
