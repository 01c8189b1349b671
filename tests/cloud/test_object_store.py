"""What reads and writes files, on an object store in memory."""

import gc
import json

import numpy as np
import pytest
from etils import epath

from imagen_jax.data.pipeline import RecordSource
from imagen_jax.data.records import KeyIndex
from imagen_jax.data.sources import open_source
from imagen_jax.data.tfrecord import index_offsets
from imagen_jax.data.webdataset import expand_pattern
from imagen_jax.files import AtomicFile, copy_file, is_cloud, make_folder, move_folder, write_text
from imagen_jax.models.weights import WeightReader, save_state
from imagen_jax.sampling.pictures import read_metadata, save_png
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.encoder_folder import copy_encoder
from imagen_jax.text.precompute import PrecomputeConfig, precompute
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.metrics import MetricsWriter

FOLDER = epath.Path("gs://bucket/folder")


def test_a_file_appears_whole_or_not_at_all(store):
    data = np.random.default_rng(0).bytes(5 * 2**20)  # more than a part of an upload
    with AtomicFile(FOLDER / "whole") as file:
        file.write(data)
        assert not store
    assert store == {"bucket/folder/whole": data}

    with pytest.raises(KeyboardInterrupt), AtomicFile(FOLDER / "half") as file:
        file.write(data)
        raise KeyboardInterrupt
    del file
    gc.collect()  # a file that is forgotten closes itself
    assert list(store) == ["bucket/folder/whole"]


def test_folders_are_copied_moved_and_never_made(store):
    assert make_folder(FOLDER) == FOLDER and not store
    write_text(FOLDER / "a", "1")
    write_text(FOLDER / "b" / "c", "2")
    move_folder(FOLDER, epath.Path("gs://bucket/other"))
    assert store == {"bucket/other/a": b"1", "bucket/other/b/c": b"2"}
    copy_file("gs://bucket/other/a", FOLDER / "d")
    assert store["bucket/folder/d"] == b"1"
    assert [is_cloud(name) for name in ("gs://a", "s3://a", "a/b", "/a")] == [True, True, False, False]


def test_checkpoints_of_a_cloud_folder_are_looked_for_there(store):
    assert Checkpoints("gs://bucket/run").folder == epath.Path("gs://bucket/run/checkpoints")
    assert Checkpoints("run").folder == epath.Path("run/checkpoints").resolve()


def test_metrics_keep_their_lines(store):
    for start, last in ((0, 3), (2, 4)):  # the second run goes on from step 2
        writer = MetricsWriter(FOLDER, start_step=start, steps=4, batch_size=1)
        for step in range(start + 1, last + 1):
            writer.log(step, {"loss": float(step)})
        writer.close()
    lines = [json.loads(line) for line in store["bucket/folder/metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    events = list((FOLDER / "tensorboard").iterdir())
    assert events and all(len(index_offsets(path)) > 10 for path in events)


def test_pictures_and_weights_are_read_back(store):
    picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    save_png(FOLDER / "a.png", picture, {"seed": 1})
    assert read_metadata(FOLDER / "a.png") == {"seed": 1}
    tensor = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    save_state({"x": tensor}, FOLDER / "model.safetensors")
    with WeightReader(FOLDER) as reader:
        np.testing.assert_array_equal(reader.read("x"), tensor)
    assert sorted(store) == ["bucket/folder/a.png", "bucket/folder/model.safetensors"]


@pytest.mark.parametrize("embeddings_only", [False, True])
def test_records_are_those_of_a_local_folder(embeddings_only, store, text_encoder, tmp_path):
    copy_encoder(text_encoder, "gs://bucket/encoder")
    encoder = TextEncoder.load("gs://bucket/encoder")
    for out in (tmp_path / "records", "gs://bucket/records"):
        precompute(
            PrecomputeConfig(
                source="shapes:count=6,resolution=16",
                text_encoder="gs://bucket/encoder",
                out=str(out),
                num_shards=2,
                embeddings_only=embeddings_only,
            ),
            encoder=encoder,
        )
    local = {
        f"bucket/{path.relative_to(tmp_path)}": path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert local == {name: data for name, data in store.items() if name.startswith("bucket/records/")}
    source, same = RecordSource("gs://bucket/records", "train"), RecordSource(tmp_path / "records", "train")
    assert [source[i].data for i in range(6)] == [same[i].data for i in range(6)]
    if embeddings_only:
        assert len(KeyIndex("gs://bucket/records", "train")) == 6


def test_folders_and_patterns_are_listed(store):
    for name in ("b/1.tar", "a/0.tar", "a/x.txt"):
        write_text(FOLDER / name, "")
    assert list(map(str, expand_pattern("gs://bucket/folder/*/*.tar"))) == [
        "gs://bucket/folder/a/0.tar",
        "gs://bucket/folder/b/1.tar",
    ]
    for name in ("deep/er/x.png", "deep/er/x.txt"):
        write_text(FOLDER / name, "a caption")
    source = open_source("folder:gs://bucket/folder", split="train", limit=None)
    lone, example = [sample for unit in source.units() for sample in source.read(unit)]
    assert (lone.key, lone.reason) == ("a/x.txt", "no picture")
    assert (example.key, example.captions) == ("deep/er/x", ("a caption",))
