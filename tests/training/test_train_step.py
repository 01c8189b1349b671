import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.losses import diffusion_loss
from imagen_jax.diffusion.process import diffuse
from imagen_jax.models.stage import StageNetwork, unit_pictures
from imagen_jax.models.text_form import zero_text
from imagen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from imagen_jax.training.config import Decay, LoopConfig, Optimizer, OptimizerConfig
from imagen_jax.training.objectives import example_keys, random_numbers
from imagen_jax.training.roles import DENOISER
from imagen_jax.training.run import Run
from imagen_jax.training.train_step import ema_update, make_train_step, split_index

SHAPE, LOW_SHAPE = (4, 4, 3), (2, 2, 3)
LENGTH, TEXT_WIDTH = 6, 16
NULL = zero_text(LENGTH, TEXT_WIDTH)


def draws_of(*indices, seed=0):
    index = jnp.asarray(split_index(np.asarray(indices, np.int64)))
    return jax.tree.map(np.asarray, random_numbers(example_keys(seed, index), SHAPE, LOW_SHAPE))


def test_split_index_keeps_all_64_bits():
    index = np.array([0, 1, 2**32 - 1, 2**32, 5 * 2**32 + 7, 2**62], np.int64)
    low, high = split_index(index).T.astype(object)
    assert [a + b * 2**32 for a, b in zip(low, high)] == index.tolist()


def test_draws_depend_on_seed_and_index_only():
    alone, among = draws_of(17), draws_of(3, 5, 17, 2**40 + 1)
    for name, array in alone._asdict().items():
        np.testing.assert_array_equal(array[0], among._asdict()[name][2], err_msg=name)
    other_seed = draws_of(17, seed=1)
    for name, array in alone._asdict().items():
        assert not np.array_equal(array, other_seed._asdict()[name]), name


def test_draws_of_different_indices_differ():
    # 2**32 + 17 has the low part of 17; 17 * 2**32 has the parts of 17 exchanged.
    draws = draws_of(17, 18, 2**32 + 17, 17 * 2**32)
    for name, array in draws._asdict().items():
        assert len({row.tobytes() for row in array}) == 4, name
    numbers = np.stack([draws.time, draws.drop, draws.aug_level])
    assert len(np.unique(numbers)) == numbers.size  # nor is one number used twice in an example
    assert not np.array_equal(draws.noise[:, :2, :2], draws.aug_noise)


def test_draws_have_their_distributions():
    draws = draws_of(*range(4000))
    for name in ("time", "drop", "aug_level"):
        values = np.sort(getattr(draws, name))
        assert values[0] >= 0 and values[-1] <= 1
        # Kolmogorov–Smirnov: 1.95 / √n is passed by one uniform sample in a thousand.
        assert np.abs(values - np.linspace(0, 1, 4000)).max() < 1.95 / np.sqrt(4000), name
    for noise in (draws.noise, draws.aug_noise):
        assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
        assert abs(noise.var() - 1) < 4 * np.sqrt(2 / noise.size)


@pytest.mark.parametrize("probability", [0.1, 0.6])
def test_text_is_dropped_with_the_given_probability(probability):
    share = (draws_of(*range(4000)).drop < probability).mean()
    assert abs(share - probability) < 4 * np.sqrt(probability * (1 - probability) / 4000)


def batch_of(config, indices, seed=0):
    """Examples of the given indices; what is in them depends on the index too."""
    stage, rows = config.stage, []
    for index in indices:
        generator = np.random.default_rng([seed, index])
        row = {
            "image": generator.integers(0, 256, (stage.resolution, stage.resolution, 3), np.uint8),
            "text": generator.standard_normal((LENGTH, TEXT_WIDTH)).astype(np.float32),
            "text_mask": np.arange(LENGTH) < generator.integers(1, LENGTH + 1),
        }
        if stage.low_resolution:
            shape = (stage.low_resolution, stage.low_resolution, 3)
            row["low_res"] = generator.integers(0, 256, shape, np.uint8)
        rows.append(row)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"index": split_index(np.asarray(indices, np.int64))}


def noisy_params(network, seed=0):
    generator = np.random.default_rng(seed)
    return {
        name: (0.2 * generator.standard_normal(shape.shape) + name.endswith("scale")).astype(np.float32)
        for name, shape in network.abstract_params.items()
    }


def loss_of(config):
    """The compiled mean loss of a batch under given parameters."""
    run = Run.of(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    return jax.jit(lambda params, batch: run.losses({DENOISER: params}, batch, NULL)[DENOISER].loss.mean())


@pytest.mark.parametrize("variant", ["base", "sr"])
def test_the_loss_of_a_batch_is_the_mean_of_its_examples(variant, make_config):
    config = make_config(variant, "train.text_dropout=0.5")
    params = noisy_params(StageNetwork(config.stage))
    loss = functools.partial(loss_of(config), params)
    indices = [4, 9, 2**33 + 4, 10]
    losses = [float(loss(batch_of(config, [index]))) for index in indices]
    assert len(set(losses)) == 4
    np.testing.assert_allclose(float(loss(batch_of(config, indices))), np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("max_level", [1.0, 0.3])
def test_the_loss_is_put_together_from_its_parts(make_config, max_level):
    """The loss by hand, for a batch of which some examples lose their text."""
    config = make_config("sr", "train.text_dropout=0.5", f"stage.augmentation.max_level={max_level}")
    network = StageNetwork(config.stage)
    batch = {name: jnp.asarray(each) for name, each in batch_of(config, range(8)).items()}
    params = noisy_params(network)
    draws = random_numbers(example_keys(config.seed, batch["index"]), (16, 16, 3), (8, 8, 3))
    dropped = np.asarray(draws.drop) < 0.5
    assert 0 < dropped.sum() < 8
    x0, low_res = unit_pictures(batch["image"]), unit_pictures(batch["low_res"])
    # The cosine schedule's amplitudes, written out (its bounds change them by less than 1e-3).
    aug_level = max_level * draws.aug_level
    alpha, sigma = np.cos(np.pi / 2 * aug_level), np.sin(np.pi / 2 * aug_level)
    low_res = alpha[:, None, None, None] * low_res + sigma[:, None, None, None] * draws.aug_noise
    level = config.stage.augmentation.log_snr(aug_level)
    log_snr = config.stage.schedule.log_snr(draws.time)
    x_t = diffuse(x0, draws.noise, log_snr)
    text, mask = np.array(batch["text"]), np.array(batch["text_mask"])
    text[dropped], mask[dropped] = 0.0, np.arange(LENGTH) == 0
    text, mask = jnp.asarray(text), jnp.asarray(mask)
    assert not np.asarray(text)[dropped].any() and np.asarray(mask)[dropped].sum() == dropped.sum()
    output = network.apply(params, x_t, log_snr, text, mask, low_res=low_res, aug_log_snr=level)
    losses = diffusion_loss(
        output.prediction,
        x0=x0,
        x_t=x_t,
        log_snr=log_snr,
        prediction=config.stage.prediction,
        config=config.loss,
    )

    def loss(config):
        return float(loss_of(config)(params, batch))

    np.testing.assert_allclose(loss(config), float(losses.mean()), rtol=2e-3)
    with_text = dataclasses.replace(config, train=LoopConfig(steps=1, text_dropout=0.0))
    without = dataclasses.replace(config, train=LoopConfig(steps=1, text_dropout=1.0))
    assert len({loss(each) for each in (config, with_text, without)}) == 3


def test_ema_update_has_its_closed_form():
    """After constant parameters p, ema_n = p + (ema_0 − p) · Π d_k with d_k = min(d, (1 + k) / (10 + k))."""
    ema, params = {"w": jnp.asarray([1.0, -3.0])}, {"w": jnp.asarray([2.0, 5.0])}
    decay, product = 0.4, 1.0  # (1 + k) / (10 + k) passes it between k = 5 and 6
    for step in range(12):
        ema = ema_update(ema, params, jnp.asarray(step), decay)
        product *= min(decay, (1 + step) / (10 + step))
    expected = np.array([2.0, 5.0]) + (np.array([1.0, -3.0]) - np.array([2.0, 5.0])) * product
    assert (1 + 0) / (10 + 0) < decay < (1 + 11) / (10 + 11)  # the warm-up ends within the steps
    np.testing.assert_allclose(np.asarray(ema["w"]), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", list(Optimizer))
def test_each_optimizer_lowers_the_loss(kind, make_config):
    config = make_config("base")
    optimizing = OptimizerConfig(kind=kind, learning_rate=3e-3, warmup_steps=0, decay=Decay.CONSTANT)
    config = dataclasses.replace(config, optimizer=optimizing)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=30))
    run = Run.of(config, mesh)
    state, step = run.init(), make_train_step(run)
    before = jax.tree.map(np.asarray, state.params[DENOISER])
    batch, losses = put_batch(batch_of(config, range(8)), mesh), []
    for _ in range(30):
        state, metrics = step(state, batch, NULL)
        losses.append(float(metrics["loss"]))
        assert float(metrics["grad_norm"]) > 0
    assert np.isfinite(losses).all() and losses[-1] < 0.95 * losses[0]
    assert int(state.step) == 30
    moved = [
        name for name, value in before.items() if not np.array_equal(value, state.params[DENOISER][name])
    ]
    assert "conv_in.kernel" in moved and len(moved) > 0.9 * len(before)
