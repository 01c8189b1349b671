"""Small data sets in TFDS's layout, made without TensorFlow; TFDS's own reader says what is in them."""

import io
import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from imagen_jax.data.examples import Example, Skipped
from imagen_jax.data.sources import open_source
from imagen_jax.data.tfrecord import TFRecordWriter
from imagen_jax.errors import UserError

LENGTHS = (4, 0, 7)  # records per shard
COUNT = sum(LENGTHS)
ALL_KEYS = [
    f"coco_like-train.tfrecord-{shard:05d}-of-00003__{i}"
    for shard, length in enumerate(LENGTHS)
    for i in range(length)
]


def coco_like_features():
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "captions": tfds.features.Sequence({"id": np.int64, "text": np.str_}),
            "objects": tfds.features.Sequence({"label": tfds.features.ClassLabel(num_classes=3)}),
        }
    )


def coco_like(number, captions=2, **changes):
    """A record as TFDS encodes it: nested features are flat lists under joined names."""
    content = {
        "image": [b"picture %d" % number],
        "image/filename": [b"%d.jpg" % number],
        "image/id": [100 + number],
        "captions/id": list(range(captions)),
        "captions/text": [f"caption {number}.{i}".encode() for i in range(captions)],
        "objects/label": [1, 2],
    } | changes
    example = tf_example_pb2.Example()
    for name, values in content.items():
        feature = example.features.feature[name]
        if values and isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        else:
            feature.int64_list.value.extend(values)
    return example.SerializeToString(deterministic=True)


def write_data_set(folder, name, features, records, *, file_format="tfrecord", write=None):
    """A prepared data set of one split "train" in shards of LENGTHS."""
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(features.to_json()))
    records = iter(records)
    for shard, length in enumerate(LENGTHS):
        path = folder / f"{name}-train.{file_format}-{shard:05d}-of-{len(LENGTHS):05d}"
        (write or write_tfrecord)(path, [next(records) for _ in range(length)])
    split = {
        "name": "train",
        "shardLengths": [str(length) for length in LENGTHS],
        "numBytes": "1000",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": name, "version": folder.name, "fileFormat": file_format, "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def write_tfrecord(path, records):
    with TFRecordWriter(path) as writer:
        for record in records:
            writer.write(record)


def write_array_record(path, records):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "data" / "coco_like" / "1.0.0"
    return write_data_set(place, "coco_like", coco_like_features(), (coco_like(i) for i in range(COUNT)))


def spec(folder):
    return f"tfds:coco_like,data_dir={folder.parents[1]}"


def read_all(source, count=None):
    return [item for unit in source.units(count) for item in source.read(unit)]


def keys(items):
    return [item.key for item in items]


def test_finds_features_and_reads_in_order(folder):
    source = open_source(spec(folder))
    items = read_all(source)
    assert source.size == COUNT and keys(items) == ALL_KEYS
    assert [item.image for item in items] == [b"picture %d" % i for i in range(COUNT)]
    assert [item.captions for item in items] == [(f"caption {i}.0", f"caption {i}.1") for i in range(COUNT)]


def test_reads_what_tfds_reads(tmp_path):
    """An array_record data set with nested and doubly nested texts, against TFDS's own reader."""
    features = tfds.features.FeaturesDict(
        {
            "picture": tfds.features.Image(encoding_format="png"),
            "texts": tfds.features.Sequence(tfds.features.Sequence(tfds.features.Text())),
            "captions": tfds.features.Sequence({"id": np.int64, "words": np.str_}),
        }
    )
    pixels = [np.full((3, 3, 3), i, np.uint8) for i in range(COUNT)]
    texts = [[[f"a {i}"], [f"b {i}", "c"]] for i in range(COUNT)]
    buffers = [png(each) for each in pixels]

    def encode(i):
        flat = {"picture": [buffers[i]], "captions/id": [1, 2]}
        flat["captions/words"] = [b"one %d" % i, b"two %d" % i]
        flat["texts/ragged_flat_values"] = [text.encode() for group in texts[i] for text in group]
        flat["texts/ragged_row_lengths_0"] = [len(group) for group in texts[i]]
        example = tf_example_pb2.Example()
        for name, values in flat.items():
            feature = example.features.feature[name]
            kind = feature.bytes_list if isinstance(values[0], bytes) else feature.int64_list
            kind.value.extend(values)
        return example.SerializeToString()

    folder = write_data_set(
        tmp_path / "nested" / "1.0.0",
        "nested",
        features,
        map(encode, range(COUNT)),
        file_format="array_record",
        write=write_array_record,
    )
    nested = read_all(open_source(f"tfds:{folder},text=texts"), 3)
    assert [item.captions for item in nested] == [(f"a {i}", f"b {i}", "c") for i in range(COUNT)]
    items = read_all(open_source(f"tfds:{folder},text=captions/words"))
    rows = tfds.builder_from_directory(str(folder)).as_data_source("train")
    for item, row, expected in zip(items, rows, pixels, strict=True):
        assert item.captions == tuple(text.decode() for text in row["captions"]["words"])
        assert item.image == png(expected) and np.array_equal(row["picture"], expected)


def png(pixels):
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_units_hold_every_record_once(folder, count):
    source = open_source(spec(folder))
    assert len(source.units(count)) == count
    assert keys(read_all(source, count)) == ALL_KEYS


def test_options(folder):
    items = read_all(open_source(f"{spec(folder)},text=image/filename,key=image/id"))
    assert [(item.key, item.captions) for item in items] == [
        (str(100 + i), (f"{i}.jpg",)) for i in range(COUNT)
    ]
    assert keys(read_all(open_source(f"tfds:{folder},split=train[3:9]"))) == ALL_KEYS[3:9]
    assert keys(read_all(open_source(f"tfds:{folder}", limit=5), 2)) == ALL_KEYS[:5]


def test_faulty_records_are_named(tmp_path):
    records = [
        coco_like(0),
        coco_like(1, image=[]),
        coco_like(2, captions=0),
        coco_like(3, **{"captions/text": [b"\xff\xfe"]}),
        coco_like(4, **{"captions/text": [b"  ", b" kept "]}),
        b"\xff\xff no proto",
        coco_like(6, image=[b"a", b"b"]),
        *(coco_like(i) for i in range(7, COUNT)),
    ]
    folder = write_data_set(tmp_path / "coco_like" / "1.0.0", "coco_like", coco_like_features(), records)
    items = read_all(open_source(f"tfds:{folder}"))
    assert [i for i, item in enumerate(items) if isinstance(item, Example)] == [0, 4, 7, 8, 9, 10]
    assert items[4].captions == ("kept",)
    assert [(item.key, item.reason) for item in items if isinstance(item, Skipped)] == [
        (ALL_KEYS[1], "no picture"),
        (ALL_KEYS[2], "no caption"),
        (ALL_KEYS[3], "caption is not UTF-8"),
        (ALL_KEYS[5], "not a tf.train.Example"),
        (ALL_KEYS[6], "several pictures"),
    ]


@pytest.mark.parametrize("count", [None, 1, 6])
def test_damaged_shards_are_named(folder, count):
    first, _, last = sorted(folder.glob("*.tfrecord-*"))
    data = bytearray(first.read_bytes())
    data[len(data) // 4 + 20] ^= 1  # in the data of record 1
    first.write_bytes(data)
    last.write_bytes(last.read_bytes()[:-3])
    items = read_all(open_source(spec(folder)), count)
    assert [item.key for item in items if isinstance(item, Example)] == [ALL_KEYS[i] for i in (0, 2, 3)]
    skipped = [item for item in items if isinstance(item, Skipped)]
    assert [(item.file, item.key, item.reason) for item in skipped] == [
        (str(first), ALL_KEYS[1], "damaged record"),
        *((str(last), key, "damaged shard") for key in ALL_KEYS[4:]),
    ]
    last.unlink()
    again = [item for item in read_all(open_source(spec(folder)), count) if isinstance(item, Skipped)]
    assert [(item.key, item.reason) for item in again[1:]] == [
        (key, "shard is missing") for key in ALL_KEYS[4:]
    ]


def test_fingerprint(folder):
    before = open_source(spec(folder)).fingerprint()
    assert open_source(spec(folder)).fingerprint() == before
    assert open_source(f"{spec(folder)},text=image/filename").fingerprint() != before
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace('"1000"', '"1001"'))
    assert open_source(spec(folder)).fingerprint() != before


def test_errors_say_what_to_do(tmp_path, folder):
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": np.int64})
    unlabelled = write_data_set(
        tmp_path / "labels" / "1.0.0", "labels", features, (coco_like(i) for i in range(COUNT))
    )
    elsewhere = folder.parents[1]
    for text, message in {
        f"coco_captions,data_dir={elsewhere}": f"tfds build coco_captions --data_dir={elsewhere}",
        f"{folder}x": "no prepared tfds data set",
        f"{folder},split=dev": "has no split 'dev' (there: train); name one with ,split=NAME or --split",
        f"{folder},text=label": "text=label",
        f"{folder},image=captions/text": "image=captions/text",
        f"{folder},key=name": "key=name",
        f"{folder},caption=x": "has no option 'caption=x'",
        f"{unlabelled}": "has no text column",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            open_source(f"tfds:{text}")
        assert "\n" not in str(caught.value)
