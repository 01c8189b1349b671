"""The record folder: picture, caption, key and text embedding as a data set that TFDS can open.

`features.json`, `dataset_info.json` and `metadata.json` are what TFDS reads, written here without
TensorFlow; `tfds.builder_from_directory(FOLDER)` opens the result. Embeddings are bfloat16, or int8 with a
float32 scale per token and block of channels. A folder without pictures has an index of its keys, by
which its embeddings are joined to the pictures of another folder.
"""

import dataclasses
import enum
import hashlib
import io
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from google.protobuf.message import DecodeError
from jaxtyping import BFloat16, Float32, Int8, UInt64

from imagen_jax.data.encoder_identity import EncoderIdentity, identity_from_json
from imagen_jax.data.quantise import BLOCK_SIZE, dequantise
from imagen_jax.errors import UserError
from imagen_jax.files import AtomicFile, check_regular, is_cloud, json_field, json_object, read_json

IMAGE, CAPTION, KEY, TEXT_EMBEDDING = "image", "caption", "key", "text_embedding"
TEXT_EMBEDDING_SCALE = "text_embedding_scale"
VERSION = "1.0.0"  # of the record format
_FEATURES = "tensorflow_datasets.core.features"
_FILEPATH_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_MAX_SIZE = 2**20  # of an embedding's width and length: far beyond any encoder's
_WRITE_ATTEMPTS = 8
_INDEX_CHUNK = 2**22  # entries of the key index written at once


class EmbeddingDtype(enum.Enum):
    """How text embeddings are stored."""

    BFLOAT16 = "bfloat16"
    INT8 = "int8"  # with a float32 scale per token and BLOCK_SIZE channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One training example."""

    key: str  # unique within the source
    image: bytes | None  # the encoded picture as it came (PNG, JPEG, …); None: there is none
    caption: str
    # Only the real tokens, never padding.
    text_embedding: BFloat16[np.ndarray, "tokens width"] | Int8[np.ndarray, "tokens width"]
    text_embedding_scale: Float32[np.ndarray, "tokens blocks"] | None = None  # of int8 embeddings

    def embedding(self, block_size: int | None) -> BFloat16[np.ndarray, "tokens width"]:
        """The text embedding in bfloat16.

        Args:
          block_size: `EncoderInfo.block_size` of the folder.

        Raises:
          ValueError: the scales are not those of such blocks.
        """
        if self.text_embedding_scale is None:
            return self.text_embedding
        block = block_size or BLOCK_SIZE
        values = dequantise(self.text_embedding, self.text_embedding_scale, block_size=block)
        return values.astype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """What a record folder says about its text embeddings (`metadata.json`)."""

    text_encoder: str  # folder or hub id of the text encoder, as it was given
    width: int  # of one token's embedding
    max_length: int  # tokens beyond it were cut off
    dtype: str  # of the stored embedding
    source: Mapping[str, str]  # split -> SPEC of the captioned pictures
    block_size: int | None = None  # channels that share a scale, if the dtype is int8
    images: bool = True  # whether the records hold the pictures; if not, there is an index of the keys
    identity: EncoderIdentity | None = None  # what the text encoder does; None: not known
    encoder_path: str = ""  # of a local text encoder, seen from the record folder; "": not known


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The shards of one split."""

    name: str
    shard_lengths: tuple[int, ...]  # records per shard
    num_bytes: int  # of all shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderInfo:
    """A complete record folder."""

    path: epath.Path
    name: str  # of the data set: the first part of the file names
    splits: Mapping[str, SplitInfo]
    encoder: EncoderInfo

    def split(self, name: str) -> SplitInfo:
        """One split.

        Raises:
          UserError: the folder has no such split.
        """
        if name not in self.splits:
            raise UserError(f"{self.path}: no split {name!r} (there: {', '.join(sorted(self.splits))})")
        return self.splits[name]

    def shards(self, split: str) -> list[epath.Path]:
        """The files of a split, in order.

        Raises:
          UserError: the folder has no such split.
        """
        count = len(self.split(split).shard_lengths)
        return [self.path / shard_name(self.name, split, i, count) for i in range(count)]


def shard_name(name: str, split: str, shard: int, num_shards: int) -> str:
    """File name of a shard, as TFDS spells it."""
    return f"{name}-{split}.tfrecord-{shard:05d}-of-{num_shards:05d}"


def example_class() -> Any:
    """`tf.train.Example`. TFDS takes a third of a second to import; what only encodes text needs none of it."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def serialize(record: Record) -> bytes:
    """The record as a `tf.train.Example`; equal records give equal bytes."""
    example = example_class()()
    features = example.features.feature
    if record.image is not None:
        features[IMAGE].bytes_list.value.append(record.image)
    features[CAPTION].bytes_list.value.append(record.caption.encode("utf-8"))
    features[KEY].bytes_list.value.append(record.key.encode("utf-8"))
    features[TEXT_EMBEDDING].bytes_list.value.append(record.text_embedding.tobytes())
    if record.text_embedding_scale is not None:
        features[TEXT_EMBEDDING_SCALE].bytes_list.value.append(record.text_embedding_scale.tobytes())
    return example.SerializeToString(deterministic=True)


def parse(data: bytes, width: int, where: str, *, images: bool = True) -> Record:
    """Reads back what `serialize` wrote.

    Args:
      data: a serialised `tf.train.Example`.
      width: of one token's embedding.
      where: file and offset, for messages.
      images: whether the record must hold a picture.

    Raises:
      UserError: not such a record; names `where`.
    """
    try:
        features = example_class().FromString(data).features.feature

        def field(name: str) -> bytes:
            if name not in features or len(features[name].bytes_list.value) != 1:
                raise UserError(f"{where}: the record has no feature {name!r}")
            return features[name].bytes_list.value[0]

        image = field(IMAGE) if images else None
        scale = None
        embedding = np.frombuffer(
            field(TEXT_EMBEDDING), np.int8 if TEXT_EMBEDDING_SCALE in features else ml_dtypes.bfloat16
        ).reshape(-1, width)
        if TEXT_EMBEDDING_SCALE in features:
            scale = np.frombuffer(field(TEXT_EMBEDDING_SCALE), np.float32).reshape(len(embedding), -1)
        return Record(
            key=field(KEY).decode("utf-8"),
            image=image,
            caption=field(CAPTION).decode("utf-8"),
            text_embedding=embedding,
            text_embedding_scale=scale,
        )
    except UserError:
        raise
    except (DecodeError, ValueError) as error:
        raise UserError(f"{where}: not a record of this format ({error})") from error


def features_json(width: int, *, block_size: int | None = None, images: bool = True) -> dict[str, Any]:
    """The content of `features.json`: TFDS's description of the features.

    Args:
      width: of one token's embedding.
      block_size: channels that share a scale; None: the embeddings are bfloat16.
      images: whether the records hold pictures.
    """
    text = {"pythonClassName": f"{_FEATURES}.text_feature.Text", "text": {}}
    image = {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"}

    def tensor(size: int, dtype: str) -> dict[str, Any]:
        description = {"shape": {"dimensions": ["-1", str(size)]}, "dtype": dtype, "encoding": "bytes"}
        return {"pythonClassName": f"{_FEATURES}.tensor_feature.Tensor", "tensor": description}

    features = {
        CAPTION: text,
        KEY: text,
        TEXT_EMBEDDING: tensor(width, "bfloat16" if block_size is None else "int8"),
    }
    if images:
        features[IMAGE] = {"pythonClassName": f"{_FEATURES}.image_feature.Image", "image": image}
    if block_size is not None:
        features[TEXT_EMBEDDING_SCALE] = tensor(-(-width // block_size), "float32")
    return {
        "type": f"{_FEATURES}.features_dict.FeaturesDict",
        "content": {"features": features},
        "proto_cls": "tensorflow_datasets.FeaturesDict",
    }


def write_shared(path: epath.PathLike, chunks: Callable[[], Iterable[bytes]]) -> None:
    """Writes a file that several processes may be writing at once, all with the same bytes.

    Each has a temporary file of its own (`incomplete.NAME.…`). Where another process that has finished
    the folder removes it in the meantime, the file is written once more.

    Args:
      path: local or cloud file.
      chunks: gives the content from its beginning, as often as it is called.

    Raises:
      UserError: the disk is full or the system refuses otherwise; names the file.
    """
    for attempt in range(_WRITE_ATTEMPTS):
        try:
            with AtomicFile(path, tag=secrets.token_hex(8)) as file:
                for chunk in chunks():
                    file.write(chunk)
            return
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError) or attempt == _WRITE_ATTEMPTS - 1:
                raise


def write_shared_json(path: epath.PathLike, content: Any, *, sort_keys: bool = False) -> None:
    """Writes a JSON file as `write_shared` does.

    Raises:
      UserError: as `write_shared`.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n"
    write_shared(path, lambda: [text.encode("utf-8")])


def write_folder_info(info: FolderInfo) -> None:
    """Writes the JSON files that make a folder of shards a data set; `dataset_info.json` comes last.

    Raises:
      UserError: the disk is full.
    """
    encoder = info.encoder
    what = "Captioned pictures" if encoder.images else "Captions"
    dataset_info = {
        "name": info.name,
        "description": f"{what} with text embeddings of {info.encoder.text_encoder}.",
        "version": VERSION,
        "fileFormat": "tfrecord",
        "splits": [
            {
                "name": split.name,
                "shardLengths": [str(length) for length in split.shard_lengths],
                "numBytes": str(split.num_bytes),
                "filepathTemplate": _FILEPATH_TEMPLATE,
            }
            for _, split in sorted(info.splits.items())
        ],
    }
    contents = {
        "features.json": features_json(encoder.width, block_size=encoder.block_size, images=encoder.images),
        "metadata.json": dataclasses.asdict(encoder),
        "dataset_info.json": dataset_info,
    }
    for name, content in contents.items():
        write_shared_json(info.path / name, content, sort_keys=True)


def _read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON file of a record folder."""
    if not path.exists():
        raise UserError(
            f"{path}: no such file; {path.parent} is not a complete record folder "
            "(finish it with the same `imagen-jax precompute` command)"
        )
    return read_json(path)


def _count(value: Any, what: str) -> int:
    """A count as TFDS writes it: in protocol buffers' JSON, whole numbers of 64 bits are texts."""
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise UserError(f"{what} must be a whole number, got {value!r}")
    return int(text)


def _split_info(content: Any, where: str) -> SplitInfo:
    """One split of dataset_info.json."""
    split = json_object(content, f"{where}: a split")
    lengths = json_field(split, "shardLengths", list, where)
    return SplitInfo(
        name=_name(split, where),
        shard_lengths=tuple(_count(length, f"{where}: a length in 'shardLengths'") for length in lengths),
        num_bytes=_count(split.get("numBytes"), f"{where}: 'numBytes'"),
    )


def _name(content: Mapping[str, Any], where: str) -> str:
    """The name of a data set or split, which is a part of its files' names and leads nowhere else."""
    name = json_field(content, "name", str, where)
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{where}: 'name' must be letters, digits, '_', '-' and '.', got {name!r}")
    return name


def _encoder_info(metadata: Mapping[str, Any], where: str) -> EncoderInfo:
    """What metadata.json says; fields that a later version has added are passed over."""
    source = json_field(metadata, "source", dict, where)
    block_size = metadata.get("block_size")
    if block_size is not None:
        block_size = json_field(metadata, "block_size", int, where)
    info = EncoderInfo(
        text_encoder=json_field(metadata, "text_encoder", str, where),
        width=json_field(metadata, "width", int, where),
        max_length=json_field(metadata, "max_length", int, where),
        dtype=json_field(metadata, "dtype", str, where),
        source={split: json_field(source, split, str, f"{where}: 'source'") for split in source},
        block_size=block_size,
        images=json_field(metadata, "images", bool, where, default=True),
        identity=identity_from_json(metadata.get("identity"), f"{where}: identity"),
        encoder_path=json_field(metadata, "encoder_path", str, where, default=""),
    )
    if info.identity is not None and info.identity.width != info.width:
        theirs = info.identity.width
        raise UserError(f"{where}: 'identity' is of an encoder of width {theirs}, 'width' is {info.width}")
    for name in ("width", "max_length", "block_size"):
        value = getattr(info, name)
        if value is not None and not 1 <= value <= _MAX_SIZE:
            raise UserError(f"{where}: {name!r} must be from 1 to {_MAX_SIZE}, got {value}")
    if info.dtype not in [dtype.value for dtype in EmbeddingDtype]:
        raise UserError(f"{where}: 'dtype' must be bfloat16 or int8, got {info.dtype!r}")
    return info


def read_folder_info(path: epath.PathLike) -> FolderInfo:
    """Opens a record folder.

    Raises:
      UserError: not a complete record folder; names the file and the field at fault.
    """
    path = epath.Path(path).expanduser()
    dataset_info, metadata = (_read_json(path / name) for name in ("dataset_info.json", "metadata.json"))
    where = f"{path}/dataset_info.json"
    splits = [_split_info(split, where) for split in json_field(dataset_info, "splits", list, where)]
    return FolderInfo(
        path=path,
        name=_name(dataset_info, where),
        splits={split.name: split for split in splits},
        encoder=_encoder_info(metadata, f"{path}/metadata.json"),
    )


def key_hash(key: str) -> int:
    """The 64 bits under which the key index knows a key."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "little")


def _key_index_path(folder: epath.PathLike, split: str) -> epath.Path:
    """Where the key index of a split is."""
    return epath.Path(folder).expanduser() / f"keys-{split}.npy"


def write_key_index(folder: epath.PathLike, split: str, hashes: UInt64[np.ndarray, "records"]) -> None:
    """Writes the key index of a split: a .npy of the sorted hashes and, below, their record numbers.

    Args:
      folder: the record folder.
      split: its name.
      hashes: `key_hash` of every record's key, shard after shard.

    Raises:
      UserError: as `write_shared`.
    """
    order = np.argsort(hashes, kind="stable")
    header = io.BytesIO()
    shape = {"descr": "<u8", "fortran_order": False, "shape": (2, len(hashes))}
    np.lib.format.write_array_header_1_0(header, shape)

    def chunks() -> Iterable[bytes]:
        yield header.getvalue()
        starts = range(0, len(order), _INDEX_CHUNK)
        for start in starts:
            yield hashes[order[start : start + _INDEX_CHUNK]].astype("<u8").tobytes()
        for start in starts:
            yield order[start : start + _INDEX_CHUNK].astype("<u8").tobytes()

    write_shared(_key_index_path(folder, split), chunks)


class KeyIndex:
    """Finds records by key: 16 bytes a record, mapped into memory where the file is local.

    Raises:
      UserError: the folder has no index for the split, or it is damaged; names the file.
    """

    def __init__(self, folder: epath.PathLike, split: str):
        """Opens the index."""
        path = _key_index_path(folder, split)
        check_regular(path)
        try:
            table = np.load(io.BytesIO(path.read_bytes())) if is_cloud(path) else np.load(path, mmap_mode="r")
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file; only a folder of `imagen-jax precompute --embeddings_only` "
                "can be joined by key"
            ) from None
        except (ValueError, EOFError) as error:
            raise UserError(
                f"{path}: not a key index ({error}); delete it and run precompute again"
            ) from error
        if table.ndim != 2 or len(table) != 2 or table.dtype != np.uint64:
            raise UserError(f"{path}: not a key index; delete it and run precompute again")
        self._hashes, self._numbers = table

    def __len__(self) -> int:
        return len(self._hashes)

    def numbers(self, key: str) -> list[int]:
        """Numbers, within the split, of the records whose keys share this key's hash: nearly always one."""
        wanted = np.uint64(key_hash(key))
        first, last = (int(np.searchsorted(self._hashes, wanted, side=side)) for side in ("left", "right"))
        return self._numbers[first:last].tolist()

    def shared_hashes(self) -> list[list[int]]:
        """Numbers of the records that share a hash, hash by hash: keys that occur twice are among them."""
        repeated = np.unique(self._hashes[1:][self._hashes[1:] == self._hashes[:-1]])
        bounds = [np.searchsorted(self._hashes, repeated, side=side) for side in ("left", "right")]
        return [self._numbers[first:last].tolist() for first, last in zip(*bounds)]
