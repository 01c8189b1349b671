"""From a picture and around a known region: Gaussian mixtures, whose posteriors and conditionals are exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.editing import KnownRegion
from imagen_jax.diffusion.grids import Grid, GridConfig
from imagen_jax.diffusion.loop import Moment, sample
from imagen_jax.diffusion.process import renoise
from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.diffusion.schedules import CosineSchedule
from tests.diffusion.mixtures import column, conditional_moments

ANCESTRAL = SamplerConfig(kind=Sampler.DDPM, steps=64, variance_interpolation=0.0)


def test_the_way_back_has_the_forward_process_factor_and_spread():
    """By hand, of the cosine schedule's α = cos(πt/2) at t = 0.49 and 0.50."""
    levels = [jnp.full((1,), -2 * np.log(np.tan(np.pi / 2 * t)), jnp.float32) for t in (0.49, 0.50)]
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
    np.testing.assert_allclose(renoise(one, zero, *levels), 0.98466, atol=2e-5)
    np.testing.assert_allclose(renoise(zero, one, *levels), 0.17451, atol=2e-5)


def test_the_way_back_ends_in_noise_alone():
    levels = jnp.full((1,), 2.0), jnp.full((1,), -100.0)
    np.testing.assert_allclose(renoise(jnp.ones((1, 3)), jnp.full((1, 3), 0.7), *levels), 0.7, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "walk"),
    [
        (SamplerConfig(steps=4), None),
        (SamplerConfig(steps=6, resamplings=2, jump=3), (0, 1, 2, 0, 1, 2, 3, 4, 3, 4, 5)),
        (SamplerConfig(steps=5, first_step=2, resamplings=2, jump=1), (0, 0, 1, 1, 2)),
    ],
)
def test_walks(config, walk):
    assert config.walk == walk
    assert config.network_calls == (4 if walk is None else len(walk))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_step": 4}, r"first_step must be in \[0, 4\), got 4"),
        ({"resamplings": 0}, "resamplings must be at least 1, got 0"),
        ({"jump": 0}, "jump must be at least 1, got 0"),
        ({"resamplings": 2, "kind": Sampler.HEUN}, "resamplings 2 need ddpm or ddim"),
    ],
)
def test_settings_that_mean_nothing(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(steps=4, **fields)


@pytest.mark.parametrize("grid", [Grid.TIME, Grid.LOG_SNR, Grid.KARRAS])
def test_a_time_is_found_on_every_grid(grid):
    config = SamplerConfig(steps=50, grid=GridConfig(kind=grid))
    schedule = CosineSchedule()
    angles = np.arctan(np.exp(-0.5 * np.asarray(config.log_snrs(schedule), np.float64))) / (np.pi / 2)
    for time in (1.0, 0.7, 0.31):
        step = config.step_at(time, schedule)
        assert abs(angles[step] - time) <= np.abs(angles - time).min() + 1e-3  # the schedule has ends
        rest = dataclasses.replace(config, first_step=step).log_snrs(schedule)
        np.testing.assert_array_equal(rest, config.log_snrs(schedule)[step:])
    assert config.step_at(1.0, schedule) == 0


def posterior_draws(mixture, x_t, alpha, sigma, seed):
    """One exact sample of p(x0 | x_t) for each x_t (N, D)."""
    random = np.random.default_rng(seed)
    z = (x_t @ mixture.basis)[:, None]
    variance = alpha**2 * mixture.stds**2 + sigma**2
    away = z - alpha * mixture.means[None]
    logits = np.log(mixture.weights) - 0.5 * (away**2 / variance + np.log(variance)).sum(-1)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    chosen = (odds.cumsum(axis=1) < random.uniform(size=(len(x_t), 1))).sum(axis=1)
    mean = mixture.means + (alpha * mixture.stds**2 / variance) * away
    std = mixture.stds * sigma / np.sqrt(variance)
    rows = np.arange(len(x_t))
    return (
        mean[rows, chosen] + std[chosen] * random.standard_normal(mean[rows, chosen].shape)
    ) @ mixture.basis.T


def moments(samples):
    return samples.mean(axis=0), np.cov(samples.T)


def test_from_a_picture_the_posterior_of_its_level_is_drawn(plane, keys_of):
    count, picture, schedule = 20_000, np.array([0.4, 0.1]), CosineSchedule()
    errors = []
    for steps in (16, 256):
        config = dataclasses.replace(ANCESTRAL, steps=steps)
        config = dataclasses.replace(config, first_step=config.step_at(0.5, schedule))
        drawn = jax.jit(
            lambda keys, start, config=config: sample(
                plane.denoiser, keys=keys, shape=(2,), schedule=schedule, config=config, picture=start
            )
        )(keys_of(count), jnp.broadcast_to(jnp.asarray(picture, jnp.float32), (count, 2)))
        alpha = sigma = np.sqrt(0.5)  # t = 0.5
        noise = np.random.default_rng(1).standard_normal((10 * count, 2))
        exact = moments(posterior_draws(plane, alpha * picture + sigma * noise, alpha, sigma, 2))
        errors.append(
            [np.abs(a - b).max() for a, b in zip(moments(np.asarray(drawn, np.float64)), exact, strict=True)]
        )
    floor = [np.sqrt(np.diag(exact[1]).max() / count), np.sqrt(2 / count) * np.diag(exact[1]).max()]
    assert np.all(np.array(errors[1]) < 3 * np.array(floor))
    assert sum(errors[1]) < sum(errors[0])


def test_without_steps_left_out_a_picture_leaves_the_trace_that_the_schedule_does(plane, keys_of):
    """The level of the first step is the schedule's: at the cosine's end nothing of the picture is left."""
    pictures = jnp.stack([jnp.full((2,), value) for value in (-1.0, 1.0)])
    keys = jnp.stack([keys_of(1)[0]] * 2)
    a, b = sample(
        plane.denoiser, keys=keys, shape=(2,), schedule=CosineSchedule(), config=ANCESTRAL, picture=pictures
    )
    np.testing.assert_allclose(a, b, atol=1e-3)


def known_region(mixture, count, known):
    """The hook, and the mask of what is known, of one exact sample's coordinates."""
    truth = mixture.draw(1, seed=3)[0]
    picture = jnp.broadcast_to(
        jnp.asarray(truth.reshape(mixture.shape), jnp.float32), (count, *mixture.shape)
    )
    mask = jnp.broadcast_to(jnp.asarray(~known, jnp.float32).reshape(1, -1, 1, 1), (count, len(known), 1, 1))
    return KnownRegion(picture=picture, mask=mask), truth


def test_what_is_painted_fits_what_is_known_the_better_the_more_often_steps_are_walked(keys_of):
    """How far the mean is from the conditional's, over what is known; known pixels are those given."""
    count, mixture, errors = 20_000, column(), []
    for resamplings in (1, 4, 16):
        config = dataclasses.replace(ANCESTRAL, resamplings=resamplings, jump=1)

        @jax.jit
        def paint(keys, hook, config=config):
            schedule, shape = CosineSchedule(), mixture.shape
            return sample(
                mixture.denoiser, keys=keys, shape=shape, schedule=schedule, config=config, hooks=[hook]
            )

        away = []
        for known in np.array([[True, False, False], [False, True, True], [True, False, True]]):
            hook, truth = known_region(mixture, count, known)
            drawn = np.asarray(paint(keys_of(count), hook), np.float64).reshape(count, -1)
            np.testing.assert_array_equal(drawn[:, known], np.float32(truth[known])[None].repeat(count, 0))
            mean, covariance = conditional_moments(mixture, truth, known)
            away.append(np.abs(drawn[:, ~known].mean(axis=0) - mean) / np.sqrt(np.diag(covariance)))
        errors.append(np.concatenate(away).mean())
    assert errors[2] < 0.7 * errors[1] and errors[1] < 0.85 * errors[0], errors


def test_the_known_region_has_the_noise_of_every_step(keys_of):
    count, schedule = 20_000, CosineSchedule()
    picture = jnp.full((count, 2, 1, 1), 0.5)
    hook = KnownRegion(picture=picture, mask=jnp.zeros((count, 2, 1, 1)))
    for step, log_snr in enumerate(SamplerConfig(steps=8).log_snrs(schedule)):
        keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_of(count))  # noqa: B023
        seen = hook.before_call(jnp.zeros_like(picture), Moment(jnp.asarray(step), log_snr, keys))
        alpha, sigma = np.cos(np.pi / 2 * (1 - step / 8)), np.sin(np.pi / 2 * (1 - step / 8))
        np.testing.assert_allclose(seen.mean(), 0.5 * alpha, atol=0.02)
        np.testing.assert_allclose(seen.std(), sigma, rtol=0.01)


def test_where_all_is_to_be_painted_nothing_is_changed(keys_of):
    mixture = column()
    hook, _ = known_region(mixture, 4, np.zeros(3, bool))

    def run(hooks):
        return sample(
            mixture.denoiser,
            keys=keys_of(4),
            shape=mixture.shape,
            schedule=CosineSchedule(),
            config=ANCESTRAL,
            hooks=hooks,
        )

    np.testing.assert_allclose(run([hook]), run([]), atol=1e-6)
