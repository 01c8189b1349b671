"""Schedules against their formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.schedules import CosineSchedule, LinearSchedule, Schedule, alpha_sigma

TIMES = np.linspace(0.0, 1.0, 1001)
SCHEDULES = (
    CosineSchedule(),
    CosineSchedule(log_snr_min=-10.0, log_snr_max=20.0, shift=2 * np.log(64 / 256)),
    LinearSchedule(),
    LinearSchedule(log_snr_max=8.0),
)


def log_snr(schedule, times=TIMES):
    return np.asarray(schedule.log_snr(jnp.asarray(times, jnp.float32)), np.float64)


@pytest.mark.parametrize(
    ("low", "high", "shift"), [(-15.0, 15.0, 0.0), (-8.0, 12.0, 0.0), (-15.0, 15.0, -2.77)]
)
def test_cosine_is_the_formula(low, high, shift):
    # arXiv 2301.11093, section 3.1: t runs between the angles whose log-SNR, −2 log tan, are the bounds.
    first, last = np.arctan(np.exp(-high / 2)), np.arctan(np.exp(-low / 2))
    expected = -2 * np.log(np.tan(first + TIMES * (last - first))) + shift
    made = log_snr(CosineSchedule(log_snr_min=low, log_snr_max=high, shift=shift))
    # float32 angles near π/2 resolve their distance to π/2, at least 5e-4, to about 2e-4 of itself
    np.testing.assert_allclose(made, expected, atol=1e-3)
    np.testing.assert_allclose(made[[0, -1]], [high + shift, low + shift], atol=1e-3)


def test_cosine_is_a_cosine_between_its_ends():
    alpha, sigma = alpha_sigma(CosineSchedule().log_snr(jnp.asarray(TIMES, jnp.float32)))
    np.testing.assert_allclose(alpha, np.cos(np.pi / 2 * TIMES), atol=6e-4)
    np.testing.assert_allclose(sigma, np.sin(np.pi / 2 * TIMES), atol=6e-4)


def test_linear_is_the_formula():
    times = TIMES[1:]
    expected = np.minimum(-np.log(np.expm1(0.1 * times + 9.95 * times**2)), 15.0)
    np.testing.assert_allclose(log_snr(LinearSchedule(), times), expected, atol=1e-4)
    np.testing.assert_allclose(log_snr(LinearSchedule(log_snr_max=3.0), np.zeros(1)), 3.0, atol=1e-4)


def test_linear_is_the_limit_of_the_thousand_steps():
    beta = np.linspace(1e-4, 0.02, 1000)  # arXiv 2006.11239, section 4
    log_alpha_bar = np.cumsum(np.log1p(-beta))
    alpha, _ = alpha_sigma(LinearSchedule().log_snr(jnp.arange(1, 1001) / 1000))
    # log(1 − β) leaves out β²/2 and more (β ≤ 0.02), and the sum of β differs from its integral by β/2.
    bound = 0.51 * np.cumsum(beta**2) + 0.51 * beta + 1e-5
    difference = np.abs(2 * np.log(np.asarray(alpha, np.float64)) - log_alpha_bar)
    assert np.all(difference <= bound)
    assert bound.max() < 0.1  # nats, of 10


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_finite_and_falling(schedule):
    assert isinstance(schedule, Schedule)
    values = log_snr(schedule)
    assert np.all(np.isfinite(values))
    steps = np.diff(values)
    assert np.all(steps <= 0) and np.all(steps[values[1:] < values[0] - 1e-3] < 0)
    alpha, sigma = alpha_sigma(jnp.asarray(values, jnp.float32))
    assert np.all(alpha > 0) and np.all(sigma > 0)


def test_alpha_and_sigma():
    values = np.linspace(-30.0, 30.0, 301)
    alpha, sigma = (np.asarray(x, np.float64) for x in alpha_sigma(jnp.asarray(values, jnp.float32)))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.log(alpha**2 / sigma**2), values, atol=1e-4)


def test_bad_bounds():
    with pytest.raises(ValueError, match=r"got 3\.0 and -3\.0"):
        CosineSchedule(log_snr_min=3.0, log_snr_max=-3.0)


@pytest.mark.parametrize("low", [-200.0, -40.0])
def test_cosine_may_end_without_signal(low):
    schedule = CosineSchedule(log_snr_min=low)
    made = log_snr(schedule)
    assert np.all(np.isfinite(made)) and np.all(np.diff(made) < 0)
    np.testing.assert_allclose(made[-1], low, rtol=1e-5)
    # Elsewhere it is the cosine: −2·log tan(πt/2), but for the upper bound's angle of 5.5e-4.
    np.testing.assert_allclose(made[100:-1], -2 * np.log(np.tan(np.pi / 2 * TIMES[100:-1])), atol=8e-3)
    alpha, sigma = alpha_sigma(schedule.log_snr(jnp.ones(1)))
    assert float(sigma[0]) == 1.0 and float(alpha[0]) <= np.exp(low / 2) * 1.001


def test_infinite_bounds_are_refused():
    with pytest.raises(ValueError, match="-inf"):
        CosineSchedule(log_snr_min=-np.inf)
