"""One training step: accumulation, averages, noise levels told apart, and steps that are not finite."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.errors import UserError
from imagen_jax.models.text_form import zero_text
from imagen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from imagen_jax.training.config import LoopConfig
from imagen_jax.training.objectives import Losses
from imagen_jax.training.roles import DENOISER
from imagen_jax.training.run import Run
from imagen_jax.training.state import TrainState, ema_name, updates_done
from imagen_jax.training.train_step import (
    LOG_SNR_EDGES,
    batch_gradients,
    bin_losses,
    check_accumulation,
    make_train_step,
    split_batch,
    split_index,
)

BATCH, DECAYS = 64, (0.5, 0.0)
NULL = zero_text(6, 16)


def examples(seed, count=BATCH):
    generator = np.random.default_rng(seed)
    return {
        "image": generator.integers(0, 256, (count, 8, 8, 3), np.uint8),
        "text": generator.standard_normal((count, 6, 16)).astype(np.float32),
        "text_mask": np.arange(6) < generator.integers(1, 7, (count, 1)),
        "index": split_index(np.arange(count) + 2**33),
    }


@pytest.fixture(scope="module")
def trained(make_config):
    """The mesh, the network and two states after one step, by the number of parts of the batch."""
    made = {}
    for parts in (1, 4):
        config = make_config(
            "base",
            "data.batch_size=64",
            f"train.accumulate={parts}",
            "train.ema_decay=0.9",
            f"train.ema_decays={DECAYS}",
            "optimizer.warmup_steps=0",
        )
        mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
        check_accumulation(config, mesh)
        run = Run.of(config, mesh)
        state = run.init()
        gradients = jax.jit(
            lambda p, b, run=run: batch_gradients(run, p, b, NULL, jnp.asarray(0))[0][DENOISER]
        )
        found = jax.device_get(gradients(state.params, put_batch(examples(0), mesh)))
        made[parts] = (run, mesh, make_train_step(run), state, found)
    return made


def test_four_parts_of_16_are_a_batch_of_64(trained):
    whole, parts = trained[1][4], trained[4][4]
    largest = np.sqrt(sum(np.sum(np.square(each, dtype=np.float64)) for each in whole.values()))
    assert largest > 0
    for name, gradient in whole.items():
        np.testing.assert_allclose(parts[name], gradient, rtol=0, atol=1e-6 * largest, err_msg=name)


def test_parts_hold_examples_of_every_device(trained):
    """The part of a device stays where it is: 2 × 2 devices have 16 examples each, 4 of them in each part."""
    mesh = trained[4][1]
    placed = put_batch({"index": np.arange(BATCH)}, mesh)
    split = np.asarray(jax.jit(lambda batch: split_batch(batch, 4, mesh)["index"])(placed))
    expected = [[16 * device + 4 * part + i for device in range(4) for i in range(4)] for part in range(4)]
    assert split.tolist() == expected


def test_steps_average_with_every_decay_and_freeze_after_a_bad_one(trained):
    run, mesh, step, state, _ = trained[4]
    averages = {
        decay: {k: np.asarray(v, np.float64) for k, v in state.params[DENOISER].items()}
        for decay in (0.9, *DECAYS)
    }
    for number in range(3):
        state, metrics = step(state, put_batch(examples(number), mesh), NULL)
        assert bool(metrics["updated"]) and int(metrics["skipped"]) == 0
        assert sorted(np.asarray(metrics["index"])[:, 0]) == list(range(BATCH))
        np.testing.assert_allclose(float(metrics["loss"]), np.mean(metrics["losses"]), rtol=1e-6)
        np.testing.assert_allclose(
            float(metrics["grad_norm"]) ** 2,
            np.sum(np.asarray(metrics["tensor_squares"], np.float64)),
            rtol=1e-5,
        )
        assert np.sum(metrics["bin_count"]) == BATCH
        for decay, average in averages.items():
            d = min(decay, (1 + number) / (10 + number))
            for name, value in state.params[DENOISER].items():
                average[name] = d * average[name] + (1 - d) * np.asarray(value, np.float64)
    for decay, average in averages.items():
        for name, value in run.average(state, decay).items():
            np.testing.assert_allclose(np.asarray(value), average[name], atol=1e-6, err_msg=f"{decay} {name}")
    with pytest.raises(ValueError, match=r"no average with decay 0\.7: the run keeps 0\.9, 0\.5, 0\.0"):
        run.average(state, 0.7)

    good = jax.device_get(state)
    bad = examples(3)
    bad["text"][5, 0, 0] = np.nan
    bad["text_mask"][5] = True
    for number, batch in enumerate((bad, examples(4), examples(5))):
        state, metrics = step(state, put_batch(batch, mesh), NULL)
        assert not bool(metrics["updated"]) and int(metrics["skipped"]) == 1
        if number == 0:
            index, losses = np.asarray(metrics["index"])[:, 0], np.asarray(metrics["losses"])
            assert index[~np.isfinite(losses)].tolist() == [5]
    assert int(state.step) == 4 and int(updates_done(state.opt_state[DENOISER])) == 3
    for field in ("params", "ema", "opt_state"):
        before, after = jax.tree.leaves(getattr(good, field)), jax.tree.leaves(getattr(state, field))
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)), field


def test_accumulation_that_the_devices_cannot_share_is_named(make_config):
    mesh = make_mesh(MeshConfig())
    with pytest.raises(UserError, match=r"accumulate=3: config.data.batch_size=64 .* 3 parts × 8 devices"):
        check_accumulation(make_config("base", "data.batch_size=64", "train.accumulate=3"), mesh)


def test_bins_of_log_snr():
    log_snr = np.array([-20.0, -9.5, -9.0, -0.1, 0.0, 2.9, 9.0, 30.0])
    loss = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, np.nan])
    sums, counts = bin_losses(Losses(jnp.asarray(loss, jnp.float32), jnp.asarray(log_snr, jnp.float32)))
    edges = [-np.inf, *LOG_SNR_EDGES, np.inf]
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (log_snr >= low) & (log_snr < high)
        assert int(counts[i]) == inside.sum()
        np.testing.assert_array_equal(sums[i], loss[inside].sum())


def test_a_state_with_one_average_is_as_it_always_was():
    """Runs of before further averages restore: their checkpoints have the fields and names of this state."""
    assert TrainState._fields == ("step", "params", "ema", "opt_state")
    assert ema_name("a.kernel", 0.999) == "a.kernel@0.999"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ema_decays": (0.5, 0.9999)}, "must differ"),
        ({"ema_decays": (1.5,)}, r"in \[0, 1\]"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"max_skipped": -1}, "max_skipped must not be negative"),
    ],
)
def test_wrong_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoopConfig(steps=1, **fields)
