"""The record folder: picture, caption, key and text embedding as a data set that TFDS can open.

`features.json`, `dataset_info.json` and `metadata.json` are what TFDS reads, written here without
TensorFlow; `tfds.builder_from_directory(FOLDER)` opens the result.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from google.protobuf.message import DecodeError
from jaxtyping import BFloat16
from tensorflow_datasets.proto import tf_example_pb2

from imagen_jax.data.files import write_text
from imagen_jax.errors import UserError

IMAGE, CAPTION, KEY, TEXT_EMBEDDING = "image", "caption", "key", "text_embedding"
VERSION = "1.0.0"  # of the record format
_FEATURES = "tensorflow_datasets.core.features"
_FILEPATH_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One training example."""

    key: str  # unique within the source
    image: bytes  # the encoded picture as it came (PNG, JPEG, …)
    caption: str
    text_embedding: BFloat16[np.ndarray, "tokens width"]  # only the real tokens, never padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """What a record folder says about its text embeddings (`metadata.json`)."""

    text_encoder: str  # folder or hub id of the text encoder, as it was given
    width: int  # of one token's embedding
    max_length: int  # tokens beyond it were cut off
    dtype: str  # of the stored embedding
    source: Mapping[str, str]  # split -> SPEC of the captioned pictures


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


def serialize(record: Record) -> bytes:
    """The record as a `tf.train.Example`; equal records give equal bytes."""
    example = tf_example_pb2.Example()
    features = example.features.feature
    features[IMAGE].bytes_list.value.append(record.image)
    features[CAPTION].bytes_list.value.append(record.caption.encode("utf-8"))
    features[KEY].bytes_list.value.append(record.key.encode("utf-8"))
    features[TEXT_EMBEDDING].bytes_list.value.append(record.text_embedding.tobytes())
    return example.SerializeToString(deterministic=True)


def parse(data: bytes, width: int, where: str) -> Record:
    """Reads back what `serialize` wrote.

    Args:
      data: a serialised `tf.train.Example`.
      width: of one token's embedding.
      where: file and offset, for messages.

    Raises:
      UserError: not such a record; names `where`.
    """
    try:
        features = tf_example_pb2.Example.FromString(data).features.feature
        fields = {}
        for name in (IMAGE, CAPTION, KEY, TEXT_EMBEDDING):
            if name not in features or len(features[name].bytes_list.value) != 1:
                raise UserError(f"{where}: the record has no feature {name!r}")
            fields[name] = features[name].bytes_list.value[0]
        embedding = np.frombuffer(fields[TEXT_EMBEDDING], ml_dtypes.bfloat16)
        return Record(
            key=fields[KEY].decode("utf-8"),
            image=fields[IMAGE],
            caption=fields[CAPTION].decode("utf-8"),
            text_embedding=embedding.reshape(-1, width),
        )
    except UserError:
        raise
    except (DecodeError, ValueError) as error:
        raise UserError(f"{where}: not a record of this format ({error})") from error


def features_json(width: int) -> dict[str, Any]:
    """The content of `features.json`: TFDS's description of the four features."""
    text = {"pythonClassName": f"{_FEATURES}.text_feature.Text", "text": {}}
    image = {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"}
    tensor = {"shape": {"dimensions": ["-1", str(width)]}, "dtype": "bfloat16", "encoding": "bytes"}
    return {
        "type": f"{_FEATURES}.features_dict.FeaturesDict",
        "content": {
            "features": {
                IMAGE: {"pythonClassName": f"{_FEATURES}.image_feature.Image", "image": image},
                CAPTION: text,
                KEY: text,
                TEXT_EMBEDDING: {"pythonClassName": f"{_FEATURES}.tensor_feature.Tensor", "tensor": tensor},
            }
        },
        "proto_cls": "tensorflow_datasets.FeaturesDict",
    }


def write_folder_info(info: FolderInfo) -> None:
    """Writes the JSON files that make a folder of shards a data set; `dataset_info.json` comes last.

    Raises:
      UserError: the disk is full.
    """
    dataset_info = {
        "name": info.name,
        "description": f"Captioned pictures with text embeddings of {info.encoder.text_encoder}.",
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
        "features.json": features_json(info.encoder.width),
        "metadata.json": dataclasses.asdict(info.encoder),
        "dataset_info.json": dataset_info,
    }
    for name, content in contents.items():
        write_text(info.path / name, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def _read_json(path: epath.Path) -> Any:
    """Reads a JSON file of a record folder."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; {path.parent} is not a complete record folder "
            "(finish it with the same `imagen-jax precompute` command)"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def read_folder_info(path: epath.PathLike) -> FolderInfo:
    """Opens a record folder.

    Raises:
      UserError: not a complete record folder; names the file at fault.
    """
    path = epath.Path(path).expanduser()
    dataset_info = _read_json(path / "dataset_info.json")
    metadata = _read_json(path / "metadata.json")
    try:
        splits = {
            split["name"]: SplitInfo(
                name=split["name"],
                shard_lengths=tuple(int(length) for length in split["shardLengths"]),
                num_bytes=int(split["numBytes"]),
            )
            for split in dataset_info["splits"]
        }
        encoder = EncoderInfo(**metadata)
        return FolderInfo(path=path, name=dataset_info["name"], splits=splits, encoder=encoder)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: dataset_info.json or metadata.json lacks a field ({error})") from error
