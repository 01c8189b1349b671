"""The four predictions against their definitions, over all pairs and noise levels."""

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.process import (
    Prediction,
    convert,
    diffuse,
    expand_to,
    time_condition,
    to_x0_and_epsilon,
)

LOG_SNR = np.linspace(-7.0, 7.0, 29)


def truth():
    """x_t and all four quantities in float64, from definitions only; (29, 4, 5, 3) each."""
    generator = np.random.default_rng(0)
    x0 = generator.uniform(-1, 1, (len(LOG_SNR), 4, 5, 3))
    epsilon = generator.standard_normal(x0.shape)
    alpha = np.sqrt(1 / (1 + np.exp(-LOG_SNR)))[:, None, None, None]
    sigma = np.sqrt(1 - alpha**2)
    values = {
        Prediction.X0: x0,
        Prediction.EPSILON: epsilon,
        Prediction.V: alpha * epsilon - sigma * x0,
        # ∇ log q(x_t | x0), q Gaussian with mean α·x0 and variance σ²
        Prediction.SCORE: -(alpha * x0 + sigma * epsilon - alpha * x0) / sigma**2,
    }
    return alpha * x0 + sigma * epsilon, values


def single(array):
    return jnp.asarray(array, jnp.float32)


@pytest.mark.parametrize("source", Prediction)
@pytest.mark.parametrize("target", Prediction)
def test_all_pairs(source, target):
    x_t, values = truth()
    given = {"x_t": single(x_t), "log_snr": single(LOG_SNR)}
    made = convert(single(values[source]), source=source, target=target, **given)
    # exp(3.5) ≈ 33 amplifies float32 rounding twice at the ends of the range
    scale = np.abs(values[target]).max(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(np.asarray(made) / scale, values[target] / scale, atol=2e-4)
    back = convert(made, source=target, target=source, **given)
    scale = np.abs(values[source]).max(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(np.asarray(back) / scale, values[source] / scale, atol=1e-3)


@pytest.mark.parametrize("source", Prediction)
def test_x0_and_epsilon_make_x_t(source):
    x_t, values = truth()
    x0, epsilon = to_x0_and_epsilon(
        single(values[source]), x_t=single(x_t), log_snr=single(LOG_SNR), source=source
    )
    np.testing.assert_allclose(diffuse(x0, epsilon, single(LOG_SNR)), x_t, atol=1e-4)


def test_v_is_safe_at_both_ends():
    log_snr = single([-15.0, 15.0])
    x0, epsilon = jnp.full((2, 8), 0.5), jnp.linspace(-2.0, 2.0, 16).reshape(2, 8)
    x_t = diffuse(x0, epsilon, log_snr)
    v = convert(epsilon, x_t=x_t, log_snr=log_snr, source=Prediction.EPSILON, target=Prediction.V)
    # At −15 x0 does not come from ε: v is made of the true pair, here v ≈ −x0 and v ≈ ε.
    np.testing.assert_allclose(v[0], -x0[0], atol=2e-3)
    np.testing.assert_allclose(v[1], epsilon[1], atol=2e-3)
    made = to_x0_and_epsilon(v, x_t=x_t, log_snr=log_snr, source=Prediction.V)
    np.testing.assert_allclose(made[0], x0, atol=2e-3)
    np.testing.assert_allclose(made[1], epsilon, atol=2e-3)


def test_expand_to():
    values = jnp.arange(2.0)
    assert expand_to(values, jnp.zeros((2, 3, 4, 5))).shape == (2, 1, 1, 1)
    assert expand_to(values, jnp.zeros((2,))).shape == (2,)


def test_time_condition_is_the_cosine_time():
    times = np.linspace(0.01, 0.99, 99)
    log_snr = -2 * np.log(np.tan(np.pi / 2 * times))
    np.testing.assert_allclose(time_condition(single(log_snr)), 1000 * times, rtol=1e-5)
    ends = np.asarray(time_condition(single([200.0, -200.0, 15.0, -15.0])))
    np.testing.assert_allclose(ends[:2], [0.0, 1000.0], atol=1e-3)
    assert 0 < ends[2] < ends[3] < 1000


@pytest.mark.parametrize("source", Prediction)
@pytest.mark.parametrize("target", Prediction)
def test_no_signal_and_no_noise_at_all_stay_finite(source, target):
    value, x_t = jnp.full((2, 3), 0.7), jnp.full((2, 3), 0.2)
    made = convert(value, x_t=x_t, log_snr=single([-200.0, 200.0]), source=source, target=target)
    assert np.all(np.isfinite(made))


def test_what_is_known_without_signal_and_without_noise():
    x_t, log_snr = jnp.full((2, 3), 0.2), single([-200.0, 200.0])
    x0, epsilon = to_x0_and_epsilon(jnp.full((2, 3), 0.7), x_t=x_t, log_snr=log_snr, source=Prediction.V)
    # v = αε − σx0 is −x0 without signal, where x_t is ε; without noise x_t is x0 and v is ε.
    np.testing.assert_allclose(x0, [[-0.7] * 3, [0.2] * 3], atol=1e-6)
    np.testing.assert_allclose(epsilon, [[0.2] * 3, [0.7] * 3], atol=1e-6)
