"""The discrete schedule, grids of timesteps, learned variances and what thresholding may divide by."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.augmentation import NoiseAugmentation
from imagen_jax.diffusion.grids import NAMED_COUNTS, Grid, GridConfig, spaced_timesteps
from imagen_jax.diffusion.loop import sample
from imagen_jax.diffusion.rules import Denoised
from imagen_jax.diffusion.samplers import SamplerConfig
from imagen_jax.diffusion.schedules import CosineSchedule, DiscreteCosineSchedule, alpha_sigma
from imagen_jax.diffusion.thresholding import ThresholdConfig, threshold

SCHEDULE = DiscreteCosineSchedule()


def test_levels_follow_the_continuous_cosine():
    """ᾱ_i = f(i + 1)/f(0) until the cap of β, f as published."""
    times = np.arange(1, 980)
    expected = (
        np.cos((times / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    )
    np.testing.assert_allclose(SCHEDULE.alphas_cumprod()[times - 1], expected, rtol=1e-4)


def test_every_timestep_is_found_again():
    numbers = np.arange(1000)
    log_snr = SCHEDULE.log_snr(jnp.asarray((numbers + 1) / 1000, jnp.float32))
    np.testing.assert_array_equal(log_snr, SCHEDULE.table())
    np.testing.assert_array_equal(jax.jit(SCHEDULE.timestep)(log_snr), numbers)
    alpha, _ = alpha_sigma(log_snr)
    np.testing.assert_allclose(np.square(alpha), SCHEDULE.alphas_cumprod(), rtol=1e-5)


def test_uniform_times_fall_on_all_steps_alike():
    times = (np.arange(100_000) + 0.5) / 100_000
    steps = np.asarray(SCHEDULE.timestep(SCHEDULE.log_snr(jnp.asarray(times, jnp.float32))))
    counts = np.bincount(np.round(steps).astype(int), minlength=1000)
    assert counts.min() >= 98 and counts.max() <= 102


def test_levels_between_steps_are_interpolated():
    table = SCHEDULE.table()
    halfway = jnp.asarray([(table[10] + table[11]) / 2, table[0] + 5.0, table[-1] - 5.0])
    np.testing.assert_allclose(SCHEDULE.timestep(halfway), [10.5, 0.0, 999.0], atol=1e-3)


def test_augmentation_counts_its_levels_from_zero():
    augmentation = NoiseAugmentation(schedule=SCHEDULE, enlarge=True)
    levels = jnp.asarray([0.0, 0.25, 0.999], jnp.float32)
    np.testing.assert_array_equal(augmentation.log_snr(levels), SCHEDULE.table()[[0, 250, 999]])


def test_enlarging_keeps_corners_and_is_linear_between():
    picture = jnp.asarray([[0.0, 3.0], [6.0, 9.0]])[None, :, :, None]
    got = NoiseAugmentation(enlarge=True).prepare(picture, (4, 4))[0, :, :, 0]
    np.testing.assert_allclose(got, np.add.outer([0, 2, 4, 6], [0, 1, 2, 3]), atol=1e-6)
    wide = NoiseAugmentation(enlarge=True).prepare(picture, (2, 4))[0, :, :, 0]
    np.testing.assert_allclose(wide, np.add.outer([0, 6], [0, 1, 2, 3]), atol=1e-6)
    np.testing.assert_array_equal(NoiseAugmentation().prepare(picture, (4, 4)), picture)


@pytest.mark.parametrize("kind", NAMED_COUNTS)
def test_named_grids_have_their_number_of_steps(kind):
    grid, count = GridConfig(kind=kind), int("".join(filter(str.isdigit, kind.value)))
    steps = grid.timesteps(count)
    assert grid.own_steps == count == len(set(steps)) and steps[0] <= 999 and steps[-1] == 0
    assert list(steps) == sorted(steps, reverse=True)
    np.testing.assert_array_equal(grid.log_snrs(SCHEDULE, count), SCHEDULE.table()[list(steps)])
    with pytest.raises(ValueError, match=f"{count} steps"):
        SamplerConfig(steps=count + 1, grid=grid)


def test_spaced_timesteps_take_both_ends_of_each_part():
    assert spaced_timesteps((2, 3), 11) == (10, 8, 6, 5, 0)
    assert GridConfig(kind=Grid.LEADING).timesteps(4) == (750, 500, 250, 0)


def test_scale_of_dynamic_thresholding_has_a_bound():
    x0 = jnp.full((1, 4, 4, 1), 4.0).at[0, 0, 0, 0].set(0.6)
    got = threshold(x0, ThresholdConfig(percentile=50.0, max_scale=1.5))
    np.testing.assert_allclose([got[0, 0, 0, 0], got[0, 1, 1, 0]], [0.4, 1.0], rtol=1e-6)
    with pytest.raises(ValueError, match="max_scale"):
        ThresholdConfig(max_scale=0.5)


def test_a_learned_variance_takes_the_place_of_the_configs():
    """Constant x̂0 = 0: x after one step is a Gaussian whose variance is known."""
    config = SamplerConfig(steps=2, grid=GridConfig(kind=Grid.TIME), variance_interpolation=0.3)
    seen = []

    def run(learned, gamma):
        def denoise(x, log_snr, step):
            zeros = jnp.zeros_like(x)
            # The second call gives back what the first step made of the noise.
            x0 = jnp.where(step == 1, x, zeros)
            return Denoised(x0, jnp.full_like(x, gamma)) if learned else x0

        keys = jax.random.split(jax.random.key(0), 2)
        schedule = CosineSchedule(log_snr_min=-8.0)
        return sample(
            denoise,
            keys=keys,
            shape=(64, 64, 3),
            schedule=schedule,
            config=dataclasses.replace(config, variance_interpolation=0.3 if learned else gamma),
        )

    for gamma in (0.0, 1.0):
        learned, fixed = run(True, gamma), run(False, gamma)
        np.testing.assert_allclose(learned, fixed, atol=1e-5)
        seen.append(float(jnp.std(learned)))
    assert seen[1] > seen[0]
