"""A record that is not finite: what is said, what is saved, and what stays intact."""

import contextlib
import json

import jax
import numpy as np
import pytest
from etils import epath

from imagen_jax.cli.main import main
from imagen_jax.data import pipeline
from imagen_jax.errors import UserError
from imagen_jax.models.text_form import zero_text
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.training.batches import null_text, whole_batch
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.config_file import write_config
from imagen_jax.training.health import LAG, bin_name, load_batch, reproduce, save_batch
from imagen_jax.training.keep import Keep
from imagen_jax.training.online import OnlineText
from imagen_jax.training.roles import DENOISER
from imagen_jax.training.run import Run
from imagen_jax.training.train_step import step_arrays
from imagen_jax.training.trainer import train
from tests.hostile.mutations import FILE_KINDS

BAD = 4  # step whose batch holds the bad record


@pytest.fixture
def bad_key(make_config, monkeypatch):
    """The key of a record whose embedding holds a NaN."""
    key = str(whole_batch(make_config("base"), None, BAD)["key"][3])
    make = pipeline._MakeExample.__call__

    def broken(self, index, stored):
        example = make(self, index, stored)
        if example["key"] == key:
            example["embedding"] = example["embedding"].copy()  # of the record's bytes, which are read-only
            example["embedding"][0, 0] = np.nan
        return example

    monkeypatch.setattr(pipeline._MakeExample, "__call__", broken)
    return key


def state_at(workdir, step, config):
    checkpoints = Checkpoints(workdir)
    abstract = Run.of(config, make_mesh(MeshConfig(), jax.devices()[:1])).abstract
    state, examples = checkpoints.restore(step, abstract)
    checkpoints.close()
    assert examples == step * config.data.batch_size
    return jax.device_get(state)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_bad_record_is_named_and_skipped_or_reproduced(make_config, bad_key, tmp_path, capsys):
    base = ("train.steps=8", "train.text_dropout=0", "train.keep_checkpoints=9", "mesh.data=8")
    # Nothing but the lag looks at the step: the steps after it have run when it is noticed.
    stopping = make_config("base", *base, "train.log_every=100", "train.checkpoint_every=3")
    stopped, folder = tmp_path / "stopped", tmp_path / "stopped" / "nonfinite" / str(BAD)
    with pytest.raises(UserError) as caught:
        train(stopping, stopped)
    message = str(caught.value)
    for part in (
        f"step {BAD}: loss not finite, gradient norm not finite",
        f"records {bad_key};",
        "inputs that are not finite: text;",
        "gradients that are not finite: ",
        "newest checkpoint: step 3;",
        f"--reproduce={folder}",
    ):
        assert part in message, message
    assert "\n" not in message and LAG < 8 - BAD + 1
    report = json.loads((folder / "report.json").read_text())
    assert report["records"] == [bad_key] and report["step"] == BAD and report["loss"] is None
    assert len(report["batch"]) == 8 and len(report["gradients"]) > 10
    saved, null = load_batch(epath.Path(folder))
    assert not null.embeddings.any() and null.mask.sum() == 1
    assert [key for key, text in zip(saved["key"], saved["text"]) if not np.isfinite(text).all()] == [bad_key]

    skipping = make_config("base", *base, "train.on_nonfinite=skip", "train.checkpoint_every=1")
    skipped = tmp_path / "skipped"
    final = train(skipping, skipped)
    lines = [json.loads(line) for line in (skipped / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["loss"] is None for line in lines] == [step == BAD for step in range(1, 9)]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert int(final.step) == 8
    before, at, after = (state_at(skipped, step, skipping) for step in (3, 4, 5))
    assert same(before[1:], at[1:]) and not same(at.params, after.params)
    assert not (skipped / "nonfinite" / str(BAD) / "batch.npz").exists()
    assert json.loads((skipped / "nonfinite" / str(BAD) / "report.json").read_text())["records"] == [bad_key]

    # The newest checkpoint is good, and so is the state that was saved with the batch.
    assert same(state_at(stopped, 3, stopping), before) and same(state_at(folder, 3, stopping), before)
    assert not (stopped / "checkpoints" / "6").exists()
    capsys.readouterr()
    assert main(["train", f"--reproduce={folder}"]) == 0
    said = capsys.readouterr().out
    assert f"step {BAD}: loss not finite" in said and f"records {bad_key}" in said
    assert main(["train", f"--reproduce={skipped}"]) == 1
    assert "has no batch.npz" in capsys.readouterr().err


def test_a_step_with_padded_text_is_reproduced(make_config, text_encoder, tmp_path):
    """Its null text is the empty caption's, an array of its own that the saved batch must hold."""
    padded = (f"data.text_encoder={text_encoder}", "stage.padded_text=true", "train.text_dropout=1")
    config, folder = make_config("base", *padded), epath.Path(tmp_path)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    online = OnlineText.load(text_encoder, dtype="float32", form=config.stage.text_form, mesh=mesh)
    batch, null = whole_batch(config, online, 1), null_text(config, online)
    assert "caption" in batch
    np.testing.assert_array_equal(
        null.embeddings, TextEncoder.load(text_encoder).encode_padded([""], length=6)[0]
    )
    run = Run.of(config, mesh)
    state = run.init()
    # Biases of a fresh network's output are zero, and so is all that the text says.
    state = state._replace(params=jax.tree.map(lambda value: value + 0.01, state.params))
    losses = jax.jit(lambda params, arrays, null: run.losses(params, arrays, null)[DENOISER].loss.mean())
    expected = losses(state.params, step_arrays(batch), null)
    dropped = losses(state.params, step_arrays(batch), null._replace(embeddings=null.embeddings[..., ::-1]))
    assert abs(expected - dropped) > 1e-5  # the null text has a say
    write_config(folder, config)
    save_batch(folder, batch, null)
    saved, saved_null = load_batch(folder)
    assert set(saved) == {*step_arrays(batch), "key"}
    np.testing.assert_array_equal(saved_null.embeddings, null.embeddings)
    assert saved_null.mask.all()
    with contextlib.closing(Checkpoints(folder, keep=Keep())) as checkpoints:
        checkpoints.save(0, state, examples=0, config=config)
    report = reproduce(folder)
    assert report.loss == pytest.approx(float(expected), rel=1e-5) and not report.inputs


def test_names_of_bins():
    assert [bin_name(i) for i in (0, 3, 7)] == ["loss_log_snr/..-9", "loss_log_snr/-3..0", "loss_log_snr/9.."]


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_damaged_batch_is_named(kind, tmp_path):
    folder = epath.Path(tmp_path)
    batch = {"image": np.zeros((2, 8, 8, 3), np.float32), "index": np.arange(2), "key": ["a", "b"]}
    save_batch(folder, batch, zero_text(2, 3))
    FILE_KINDS[kind](tmp_path / "batch.npz")
    with pytest.raises(UserError, match=r"batch\.npz"):
        load_batch(folder)


@pytest.mark.parametrize("name", ["index", "key"])
def test_a_batch_that_lacks_an_array_is_named(name, tmp_path):
    arrays = {"index": np.arange(2), "key": np.array(["a", "b"])}
    del arrays[name]
    np.savez(tmp_path / "batch.npz", **arrays)
    with pytest.raises(UserError, match=f"batch.npz: the array '{name}' is missing"):
        load_batch(epath.Path(tmp_path))


def test_records_without_the_split_of_the_sample_grid_are_trained_on(make_config, tmp_path, capsys):
    config = make_config("base", "train.sample_every=2", "train.sample_split=absent", "train.steps=2")
    train(config, tmp_path / "run")
    assert "no sample grid: " in capsys.readouterr().out
    with contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints:
        assert checkpoints.latest_step() == 2
