"""Captions encoded beside the training give the training that their stored embeddings give."""

import json
import re
import types

import jax
import ml_dtypes
import numpy as np
import pytest

from imagen_jax.data.pipeline import TextCount, open_batches
from imagen_jax.errors import UserError
from imagen_jax.models.text_form import TextForm, zero_text
from imagen_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.training.batches import check_data, device_batch, pipeline_config, training_batches
from imagen_jax.training.metrics import MetricsWriter
from imagen_jax.training.online import OnlineText, TokenizedBatches
from imagen_jax.training.run import Run
from imagen_jax.training.train_step import make_train_step
from imagen_jax.training.trainer import _Loop, train

RECORDS = 96  # as many as the split has
STEPS = 8
LENGTH = 20  # tokens: no caption of the data is longer, so that neither way cuts one off
CAPTIONS = ["a red circle", "", "a small blue square left of a large green circle", "circle"]


@pytest.fixture(scope="module")
def config(make_config, text_encoder):
    """config("field=value", …, online=…) → a run online or from stored embeddings."""
    # A rate at which the text matters within a few steps: it enters through layers that start at zero.
    rate = ["optimizer.learning_rate=0.01", "optimizer.warmup_steps=0", f"train.steps={STEPS}"]
    common = [f"stage.max_text_length={LENGTH}", *rate]

    def make(*overrides, online=True):
        chosen = [f"data.text_encoder={text_encoder}"] if online else []
        return make_config("base", *common, *chosen, *overrides)

    return make


@pytest.fixture
def online(text_encoder):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    return OnlineText.load(text_encoder, dtype="float32", form=TextForm(length=LENGTH), mesh=mesh)


def test_embeddings_are_the_encoders(online, text_encoder):
    """On a mesh with three axes, against the encoder on one device, caption by caption."""
    tokens, mask, _ = online.tokenize(CAPTIONS)
    text = online.embed(tokens, mask)
    assert text.sharding.is_equivalent_to(batch_sharding(text.sharding.mesh), 3)
    reference = TextEncoder.load(text_encoder)
    host, host_mask = online.encode(CAPTIONS)
    for row, real, again, caption in zip(np.asarray(text), mask, host, CAPTIONS, strict=True):
        [expected] = reference.encode([caption], max_length=LENGTH)
        assert real.tolist() == [True] * len(expected) + [False] * (LENGTH - len(expected))
        np.testing.assert_allclose(row[real], expected, atol=1e-5)
        np.testing.assert_allclose(again[real], expected, atol=1e-5)
        assert not row[~real].any() and not again[~real].any()
    assert np.array_equal(mask, host_mask)


def test_few_lengths_are_compiled(online):
    lengths = {online.tokenize(["circle " * count])[0].shape[1] for count in range(30)}
    assert lengths == {8, 16, LENGTH, 2 * LENGTH}
    assert online.tokenize(["circle " * 900])[0].shape[1] == 512


def test_texts_longer_than_the_steps_are_cut_as_everywhere(online, text_encoder):
    captions = [
        "a red circle",
        "a small blue square left of a large green circle " * 3,
        "circle " * (LENGTH - 1),
        "",
    ]
    tokens, mask, cut = online.tokenize(captions)
    assert cut == 1
    text = np.asarray(online.embed(tokens, mask))
    host, host_mask = online.encode(captions)
    reference = TextEncoder.load(text_encoder)
    for row, real, expected in zip(text, mask, reference.encode(captions, max_length=LENGTH), strict=True):
        np.testing.assert_allclose(row[real], expected, atol=1e-5)
        assert not row[~real].any()
    np.testing.assert_allclose(text, host, atol=1e-5)
    assert np.array_equal(mask, host_mask) and mask.sum(1).tolist() == [4, LENGTH, LENGTH, 1]


def test_batches_keep_their_order_and_the_thread_ends(online, config):
    pipeline = pipeline_config(config())
    with open_batches(pipeline, captions=True) as plain:
        expected = [next(plain) for _ in range(5)]
    with TokenizedBatches(open_batches(pipeline, captions=True), online, ahead=2) as batches:
        for wanted in expected:
            batch = next(batches)
            tokens, mask, _ = online.tokenize(wanted["caption"])
            assert np.array_equal(batch["index"], wanted["index"])
            assert np.array_equal(batch["tokens"], tokens) and np.array_equal(batch["text_mask"], mask)
            assert "text" not in batch
        assert (batches.texts.seen, batches.texts.cut) == (5 * len(wanted["index"]), 0)
    with pytest.raises(RuntimeError, match="shutdown"):
        next(batches)


@pytest.fixture(scope="module")
def runs(config, text_encoder):
    """Losses and texts of the same steps, by where the text comes from; one program is compiled for all."""
    run = config()
    mesh = make_mesh(run.mesh)
    start = Run.of(run, mesh).init()
    host, shardings = jax.device_get(start), jax.tree.map(lambda leaf: leaf.sharding, start)
    step = make_train_step(Run.of(run, mesh))
    encoder = OnlineText.load(text_encoder, dtype="float32", form=TextForm(length=LENGTH), mesh=mesh)
    losses, texts = {}, {}
    for name, online in (("stored", None), ("online", encoder), ("rounded", encoder)):
        state, losses[name], texts[name] = jax.device_put(host, shardings), [], []
        with training_batches(config(online=online is not None), online, 0) as batches:
            for number in range(STEPS):
                batch = device_batch(next(batches), mesh, online)
                text = np.asarray(batch["text"])
                if name == "rounded":
                    text = text.astype(ml_dtypes.bfloat16)
                texts[name].append(text.astype(np.float32))
                if name == "rounded":
                    # Where float32 rounding has tipped a value over the middle between two of bfloat16.
                    stored = texts["stored"][number]
                    text = np.where(tipped(text.astype(np.float32), stored), stored, text)
                batch["text"] = jax.device_put(text.astype(np.float32), batch["text"].sharding)
                state, values = step(state, batch, zero_text(LENGTH, text.shape[-1]))
                losses[name].append(float(values["loss"]))
    return losses, texts


def tipped(text, stored):
    """Where two bfloat16 arrays differ by one unit in the last place."""
    difference = text.view(np.int32) - stored.view(np.int32)  # of equal signs: the bits are ordered
    return (np.abs(difference) == 1 << 16) & (np.sign(text) == np.sign(stored))


def test_steps_are_those_of_stored_embeddings(runs):
    losses, texts = runs
    np.testing.assert_allclose(losses["online"], losses["stored"], rtol=1e-2)
    assert losses["online"] != losses["stored"]  # the store rounds to bfloat16
    rounded, stored = np.stack(texts["rounded"]), np.stack(texts["stored"])
    differs = rounded != stored
    assert differs.mean() < 1e-3 and tipped(rounded, stored)[differs].all()
    assert losses["rounded"] == losses["stored"]


def test_stored_embeddings_of_another_folder_are_joined(config, text_encoder, tmp_path):
    """In int8, so that it shows where they come from, and in another order and number of shards."""
    from imagen_jax.text.precompute import EmbeddingDtype, PrecomputeConfig, precompute

    precompute(
        PrecomputeConfig(
            source=f"shapes:count={RECORDS},resolution=16",
            text_encoder=str(text_encoder),
            out=str(tmp_path / "embeddings"),
            num_shards=3,
            dtype=EmbeddingDtype.INT8,
            embeddings_only=True,
        )
    )
    joined = config(f"data.embeddings={tmp_path / 'embeddings'}", online=False)
    check_data(joined, None)
    with (
        training_batches(config(online=False), None, 16) as stored_batches,
        training_batches(joined, None, 16) as batches,
    ):
        stored, batch = next(stored_batches), next(batches)
    assert list(batch["key"]) == list(stored["key"])
    assert np.array_equal(batch["image"], stored["image"])
    text, expected = batch["text"].astype(np.float32), stored["text"].astype(np.float32)
    assert not np.array_equal(text, expected)
    np.testing.assert_allclose(text, expected, atol=0.02 * np.abs(expected).max())


def test_an_interrupted_run_goes_on_bit_for_bit(config, tmp_path, runs):
    class InterruptedWriter(MetricsWriter):
        def log(self, at, values):
            if at > 5:
                raise KeyboardInterrupt
            super().log(at, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imagen_jax.training.trainer.MetricsWriter", InterruptedWriter)
        with pytest.raises(KeyboardInterrupt):
            train(config(), tmp_path)
    train(config(f"train.sample_every={STEPS}", "train.sample_count=3"), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == list(enumerate(runs[0]["online"], 1))
    assert all(line["enlarged"] == 0 for line in lines)
    assert (tmp_path / "samples" / f"{STEPS:08d}.png").exists()
    with pytest.raises(UserError, match=r"config.data.text_encoder: '.*' → None"):
        train(config(online=False), tmp_path)


def test_errors_name_the_field(config, make_config, tmp_path, text_encoder):
    with pytest.raises(UserError, match=r"text_width is 8, but the embeddings of text encoder .* width 16"):
        train(config("stage.network.text_width=8"), tmp_path)
    with pytest.raises(UserError, match=r"no such folder"):
        train(config("data.text_encoder=./nowhere"), tmp_path)
    with pytest.raises(UserError, match=re.escape(f"text_encoder={text_encoder} exclude each other")):
        make_config("base", f"data.text_encoder={text_encoder}", "data.embeddings=elsewhere")


def test_cut_captions_are_said_once(make_config):
    run, said = object.__new__(_Loop), []
    run.config, run._said_cut = make_config("base"), False
    run.metrics = types.SimpleNamespace(say=said.append)
    for cut in (0, 3, 5):
        run._say_cut(TextCount(seen=1000, cut=cut))
    assert said == ["3 of 1000 captions (0.3 %) so far are cut: config.stage.max_text_length=6 tokens"]
