import argparse
import dataclasses
import io
import json
import os
import sys
import tarfile
import types
import warnings

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.proto import tf_example_pb2

from imagen_jax.cli import precompute as cli
from imagen_jax.data import records
from imagen_jax.data.tfrecord import TFRecordReader
from imagen_jax.errors import UserError
from imagen_jax.text import shards as job_shards
from imagen_jax.text.precompute import UnknownTokensWarning, precompute
from imagen_jax.text.store import EmbeddingDtype
from tests.text.fake_job import (
    GOOD,
    WIDTH,
    FakeEncoder,
    add,
    config,
    contents,
    expected_embedding,
    parsed,
    png,
)


def test_records_in_source_order(tmp_path, source):
    encoder = FakeEncoder()
    summary = precompute(config(tmp_path, source), encoder=encoder)
    shards = parsed(tmp_path / "out")
    assert [len(shard) for shard in shards] == [4, 4, 4, 5]
    flat = [record for shard in shards for record in shard]
    assert [record.key for record in flat] == [f"{i:04d}" for i in GOOD]
    for i, record in zip(GOOD, flat, strict=True):
        assert record.image == png(i)
        assert record.caption == f"caption number {i // 2}"
        wanted = expected_embedding(record.caption).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(record.text_embedding, wanted)
    assert summary.captions == summary.written == 17
    assert summary.tokens == 17 * 4
    assert summary.skipped == {"undecodable picture": 2, "no caption": 1}
    assert summary.num_bytes == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.tfrecord-*"))
    assert summary.captions_per_second > 0


def test_identical_captions_of_a_shard_are_encoded_once(tmp_path, source, monkeypatch):
    monkeypatch.setattr(job_shards, "WINDOW", 3)  # also across windows
    encoder = FakeEncoder()
    precompute(config(tmp_path, source, num_shards=1), encoder=encoder)
    assert sorted(encoder.asked) == sorted({f"caption number {i // 2}" for i in GOOD})


def test_little_memory_gives_the_same_bytes(tmp_path, source, monkeypatch):
    precompute(config(tmp_path, source, num_shards=2), encoder=FakeEncoder())
    monkeypatch.setattr(job_shards, "MEMORY", 50)
    monkeypatch.setattr(job_shards, "WINDOW", 2)
    other = config(tmp_path, source, num_shards=2, out=str(tmp_path / "other"))
    precompute(other, encoder=FakeEncoder())
    assert contents(tmp_path / "other") == contents(tmp_path / "out")


def test_skipped_samples_are_listed(tmp_path, source):
    precompute(config(tmp_path, source), encoder=FakeEncoder())
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(os.path.basename(x["file"]), x["key"], x["reason"]) for x in lines] == [
        ("00000.tar", "0003", "undecodable picture"),
        ("00001.tar", "0007", "no caption"),
        ("00002.tar", "0011", "undecodable picture"),
    ]


def test_tfds_opens_and_reads_the_folder(tmp_path, source):
    precompute(config(tmp_path, source, num_shards=30), encoder=FakeEncoder())  # some shards are empty
    builder = tfds.builder_from_directory(str(tmp_path / "out"))
    info = builder.info.splits["train"]
    assert (info.num_examples, info.num_shards) == (17, 30)
    assert 0 in info.shard_lengths
    assert info.num_bytes == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.tfrecord-*"))
    assert all(os.path.exists(path) for path in info.filepaths)
    assert builder.info.metadata["text_encoder"] == "fake"
    assert builder.info.metadata["width"] == WIDTH
    assert builder.info.metadata["max_length"] == 128
    assert builder.info.metadata["source"] == {"train": source}
    features = builder.info.features
    expected = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "caption": tfds.features.Text(),
            "key": tfds.features.Text(),
            "text_embedding": tfds.features.Tensor(
                shape=(None, WIDTH), dtype=ml_dtypes.bfloat16, encoding="bytes"
            ),
        }
    )
    assert features.to_json() == expected.to_json()
    raw = [reader[i] for reader in map(TFRecordReader, info.filepaths) for i in range(len(reader))]
    for i, data in zip(GOOD, raw, strict=True):
        example = features.deserialize_example_np(data)
        assert example["key"] == f"{i:04d}".encode()
        assert example["caption"] == b"caption number %d" % (i // 2)
        with Image.open(io.BytesIO(png(i))) as picture:
            np.testing.assert_array_equal(example["image"], np.asarray(picture))
        wanted = expected_embedding(f"caption number {i // 2}").astype(ml_dtypes.bfloat16)
        assert example["text_embedding"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(example["text_embedding"], wanted)


def test_record_is_what_tfds_serialises():
    record = records.Record(
        key="k", image=png(0), caption="圆", text_embedding=np.ones((2, WIDTH), ml_dtypes.bfloat16)
    )
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "caption": tfds.features.Text(),
            "key": tfds.features.Text(),
            "text_embedding": tfds.features.Tensor(
                shape=(None, WIDTH), dtype=ml_dtypes.bfloat16, encoding="bytes"
            ),
        }
    )
    example = {
        "image": record.image,
        "caption": record.caption,
        "key": record.key,
        "text_embedding": record.text_embedding.tobytes(),
    }
    serializer = ExampleSerializer(features.get_serialized_info())
    ours = tf_example_pb2.Example.FromString(records.serialize(record))
    assert ours == serializer.get_tf_example(example)
    back = records.parse(serializer.serialize_example(example), WIDTH, "here")
    assert (back.key, back.image, back.caption) == ("k", record.image, "圆")
    np.testing.assert_array_equal(back.text_embedding, record.text_embedding)


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"", b"\x0a\x00"])
def test_other_records_are_named(data):
    with pytest.raises(UserError, match=r"^here: "):
        records.parse(data, WIDTH, "here")


def test_embedding_of_another_width_is_named():
    record = records.Record(
        key="k", image=b"", caption="c", text_embedding=np.ones((2, 5), ml_dtypes.bfloat16)
    )
    with pytest.raises(UserError, match=r"^here: not a record"):
        records.parse(records.serialize(record), 4, "here")


def test_two_splits_in_one_folder(tmp_path, source):
    precompute(config(tmp_path, source), encoder=FakeEncoder())
    first = source.replace("*.tar", "00000.tar")
    precompute(config(tmp_path, first, split="validation"), encoder=FakeEncoder())
    builder = tfds.builder_from_directory(str(tmp_path / "out"))
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 17,
        "validation": 4,
    }
    assert [record.key for shard in parsed(tmp_path / "out", "validation") for record in shard] == [
        "0000",
        "0001",
        "0002",
        "0004",
    ]
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 4


def test_shapes_with_two_captions_each(tmp_path):
    encoder = FakeEncoder()
    with pytest.warns(UnknownTokensWarning):
        summary = precompute(
            config(tmp_path, "shapes:count=6,resolution=16,language=both", num_shards=2), encoder=encoder
        )
    flat = [record for shard in parsed(tmp_path / "out") for record in shard]
    assert summary.captions == 12
    assert [record.key for record in flat[:3]] == ["train-00000000", "train-00000000#1", "train-00000001"]
    assert flat[0].image == flat[1].image
    assert flat[1].caption.encode("ascii", "ignore") != flat[1].caption.encode()


def test_long_captions_are_cut(tmp_path, source):
    precompute(config(tmp_path, source, max_length=2), encoder=FakeEncoder())
    assert {len(record.text_embedding) for shard in parsed(tmp_path / "out") for record in shard} == {2}


def test_captions_that_are_cut_are_counted(tmp_path, source, capsys):
    class Counting(FakeEncoder):
        def count_tokens(self, captions, *, max_length):
            counts = super().count_tokens(captions, max_length=max_length)
            return dataclasses.replace(counts, cut=tuple(len(c.split()) + 1 > max_length for c in captions))

    settings = config(tmp_path, source, max_length=3)
    summary = precompute(settings, encoder=Counting())
    assert summary.cut == summary.captions == 17  # "caption number 3" and </s>
    cli._print_summary(settings, summary)
    assert "cut at --max_length=3: 17 captions (100 %)" in capsys.readouterr().out
    # From the reports; older ones do not say.
    assert precompute(settings, encoder=None).cut == 17
    for path in (tmp_path / "out" / "job").glob("*.json"):
        report = json.loads(path.read_text())
        del report["cut"]
        path.write_text(json.dumps(report))
    assert precompute(settings, encoder=None).cut == 0
    fits = precompute(config(tmp_path, source, max_length=4, out=str(tmp_path / "fits")), encoder=Counting())
    assert fits.cut == 0
    cli._print_summary(settings, fits)
    assert "cut at" not in capsys.readouterr().out


def test_limit(tmp_path, source):
    assert precompute(config(tmp_path, source, limit=9), encoder=FakeEncoder()).captions == 7


def test_nothing_usable(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(b"broken")
        (tmp_path / "pictures" / f"{i}.txt").write_text("a caption")
    with pytest.raises(UserError, match=r"no usable sample \(undecodable picture: 3\)"):
        precompute(config(tmp_path, f"folder:{tmp_path}/pictures"), encoder=FakeEncoder())
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "out" / "dataset_info.json").exists()


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"max_length": 0}, "--max_length"),
        ({"num_shards": 0}, "--num_shards"),
        ({"name": "a-b"}, "--name"),
        ({"split": "a b"}, "--split"),
        ({"limit": 0}, "--limit"),
        ({"max_length": 513}, "--max_length"),
        ({"num_processes": 0}, "--num_processes"),
        ({"num_processes": 2, "process_index": 2}, "--process_index"),
        ({"process_index": -1}, "--process_index"),
    ],
)
def test_bad_values_name_the_flag(tmp_path, changes, flag):
    with pytest.raises(UserError, match=f"^{flag}: "):
        precompute(config(tmp_path, "shapes:count=2", **changes), encoder=FakeEncoder())


def test_unknown_tokens_warn_once_and_again_after_a_restart(tmp_path):
    settings = config(tmp_path, "shapes:count=8,resolution=16,language=zh", num_shards=4)
    for _ in range(2):
        with pytest.warns(UnknownTokensWarning, match="50.0% .* text encoder 'fake'") as caught:
            summary = precompute(settings, encoder=FakeEncoder())
        assert len(caught) == 1
        assert summary.unknown_share == 0.5  # a Chinese caption has no spaces: one word and </s>
    assert summary.written == 0


def test_few_unknown_tokens_do_not_warn(tmp_path, source):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownTokensWarning)
        summary = precompute(config(tmp_path, source), encoder=FakeEncoder())
    assert (summary.unknown, summary.unknown_share) == (0, 0)


def test_embeddings_that_are_not_finite_are_refused(tmp_path, source):
    class Broken(FakeEncoder):
        def encode(self, captions, *, max_length):
            return [np.full((2, WIDTH), np.nan, np.float32) for _ in captions]

    for dtype in EmbeddingDtype:
        with pytest.raises(UserError, match=r"'fake' fails on the caption 'caption number 0': .*finite"):
            precompute(config(tmp_path, source, dtype=dtype), encoder=Broken())


def test_command_line(tmp_path, source, monkeypatch, capsys):
    loaded = []
    fake = types.ModuleType("imagen_jax.text.encoder")
    fake.TextEncoder = types.SimpleNamespace(load=lambda name, **_: loaded.append(name) or FakeEncoder())
    monkeypatch.setitem(sys.modules, "imagen_jax.text.encoder", fake)
    parser = argparse.ArgumentParser(prog="imagen-jax precompute")
    cli.add_arguments(parser)
    out = tmp_path / "out"
    flags = [f"--source={source}", "--text_encoder=DIR", f"--out={out}", "--num_shards=2", "--name=emoji"]
    assert cli.run(parser.parse_args(flags)) == 0
    assert loaded == ["DIR"]
    printed = capsys.readouterr().out
    assert "17 captions, 68 tokens" in printed
    size = sum(file.stat().st_size for file in out.glob("*.tfrecord-*"))
    assert f"({size / 17:.0f} bytes per caption) in 2 shards" in printed
    assert "useful tokens: 40.0%" in printed and "unknown tokens: 0.0%" in printed
    assert "no caption: 1, undecodable picture: 2" in printed
    assert (out / "emoji-train.tfrecord-00001-of-00002").exists()
    assert cli.run(parser.parse_args(flags)) == 0
    assert "everything was there already" in capsys.readouterr().out
    assert "imagen-jax precompute --source=" in parser.format_help()


def test_small_pictures_are_left_out(tmp_path, source):
    folder = tmp_path / "sizes"
    folder.mkdir()
    for name, size in {"a": (8, 30), "b": (7, 30), "c": (30, 7), "d": (9, 9)}.items():
        Image.new("RGB", size).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    settings = config(tmp_path, f"folder:{folder}", min_side=8)
    assert precompute(settings, encoder=FakeEncoder()).skipped == {"smaller than --min_side": 2}
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"], line["detail"]) for line in lines] == [
        (key, "smaller than --min_side", "7 pixels") for key in "bc"
    ]
    with pytest.raises(UserError, match="--min_side was 8, now 9"):
        precompute(config(tmp_path, f"folder:{folder}", min_side=9), encoder=FakeEncoder())
    with pytest.raises(UserError, match="--min_side: must be at least 1, got 0"):
        config(tmp_path, f"folder:{folder}", min_side=0)


def test_pictures_that_cannot_be_used_are_listed_the_same_in_every_run(tmp_path):
    """No addresses in memory, and nothing decoded that is too large or of unknown range."""
    bomb, floats = io.BytesIO(), io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    Image.fromarray(np.ones((4, 4), np.float32)).save(floats, "TIFF")
    files = {"a": b"", "b": b"<html>404</html>", "c": bomb.getvalue(), "d": floats.getvalue(), "e": png(1)}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in files.items():
            add(tar, f"{name}.png", data)
            add(tar, f"{name}.txt", b"text")
    written = []
    for out in ("one", "two"):
        precompute(
            config(tmp_path, f"webdataset:{tmp_path}/a.tar", out=str(tmp_path / out)), encoder=FakeEncoder()
        )
        written.append(contents(tmp_path / out))
    assert written[0] == written[1]
    lines = [json.loads(line) for line in written[0]["skipped.jsonl"].decode().splitlines()]
    assert [line["detail"] for line in lines] == [
        "cannot identify image file",
        "cannot identify image file",
        "more than 89478485 pixels",
        "32-bit grey of unknown range",
    ]
