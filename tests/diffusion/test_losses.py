"""Losses against closed forms of the x0 error."""

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.losses import LossConfig, diffusion_loss, min_snr_weight, snr_cap_weight
from imagen_jax.diffusion.process import Prediction, convert, diffuse

LOG_SNR = np.linspace(-6.0, 6.0, 13)
SNR = np.exp(LOG_SNR)
SPACES = (Prediction.X0, Prediction.EPSILON, Prediction.V)
# Squared error in a space, as a multiple of the squared error of x0: ε̂ − ε = −(α/σ)(x̂0 − x0), and
# v̂ − v = −(x̂0 − x0)/σ.
FACTORS = {Prediction.X0: np.ones_like(SNR), Prediction.EPSILON: SNR, Prediction.V: SNR + 1}


def example():
    """x0, x_t, a guess of x0 and each picture's mean squared error of that guess."""
    generator = np.random.default_rng(1)
    shape = (len(SNR), 4, 4, 3)
    x0 = generator.uniform(-1, 1, shape)
    guess = x0 + generator.standard_normal(shape) * generator.uniform(0.2, 2, (len(SNR), 1, 1, 1))
    x0, guess = (jnp.asarray(x, jnp.float32) for x in (x0, guess))
    epsilon = jnp.asarray(generator.standard_normal(shape), jnp.float32)
    x_t = diffuse(x0, epsilon, jnp.asarray(LOG_SNR, jnp.float32))
    error = ((np.asarray(guess, np.float64) - np.asarray(x0, np.float64)) ** 2).mean(axis=(1, 2, 3))
    return x0, x_t, guess, error


def loss(prediction, config):
    x0, x_t, guess, _ = example()
    log_snr = jnp.asarray(LOG_SNR, jnp.float32)
    output = convert(guess, x_t=x_t, log_snr=log_snr, source=Prediction.X0, target=prediction)
    return diffusion_loss(output, x0=x0, x_t=x_t, log_snr=log_snr, prediction=prediction, config=config)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("prediction", SPACES)
def test_unweighted(prediction, space):
    *_, error = example()
    made = loss(prediction, LossConfig(space=space))
    np.testing.assert_allclose(made, FACTORS[space] * error, rtol=2e-3)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_error_of_x0_alike_in_every_space(space, gamma):
    *_, error = example()
    made = loss(Prediction.V, LossConfig(space=space, min_snr_gamma=gamma))
    np.testing.assert_allclose(made, np.minimum(SNR, gamma) * error, rtol=2e-3)
    weight = min_snr_weight(jnp.asarray(LOG_SNR, jnp.float32), gamma=gamma, space=space)
    np.testing.assert_allclose(weight, np.minimum(SNR, gamma) / FACTORS[space], rtol=1e-5)


def test_right_output_has_no_loss_and_ours_is_the_mean_square_of_epsilon():
    x0, x_t, _, _ = example()
    log_snr = jnp.asarray(LOG_SNR, jnp.float32)
    given = {"x0": x0, "x_t": x_t, "log_snr": log_snr, "prediction": Prediction.EPSILON}
    epsilon = convert(x0, x_t=x_t, log_snr=log_snr, source=Prediction.X0, target=Prediction.EPSILON)
    assert np.all(np.asarray(diffusion_loss(epsilon, config=LossConfig(), **given)) < 1e-9)
    # An output of zeros, as the networks give at first: E‖ε‖² for each example.
    made = diffusion_loss(jnp.zeros_like(x0), config=LossConfig(), **given)
    np.testing.assert_allclose(made, np.square(np.asarray(epsilon)).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_bfloat16_output_is_measured_in_float32():
    x0, x_t, guess, _ = example()
    given = {"x0": x0, "x_t": x_t, "log_snr": jnp.asarray(LOG_SNR, jnp.float32)}
    given |= {"prediction": Prediction.X0, "config": LossConfig(space=Prediction.X0)}
    made = diffusion_loss(guess.astype(jnp.bfloat16), **given)
    rounded = np.asarray(guess.astype(jnp.bfloat16), np.float64)
    assert made.dtype == jnp.float32
    expected = ((rounded - np.asarray(x0, np.float64)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(made, expected, rtol=1e-5)


def test_bad_configs():
    with pytest.raises(ValueError, match="score"):
        LossConfig(space=Prediction.SCORE)
    with pytest.raises(ValueError, match="got 0"):
        LossConfig(min_snr_gamma=0.0)
    with pytest.raises(ValueError, match="score"):
        min_snr_weight(jnp.zeros(1), gamma=5.0, space=Prediction.SCORE)


@pytest.mark.parametrize("space", SPACES)
def test_snr_cap_weighs_clean_levels_like_the_cap(space):
    cap = 4.0
    weight = np.asarray(snr_cap_weight(jnp.asarray(LOG_SNR), snr_cap=cap, space=space))
    uncapped = {
        Prediction.X0: 1.0,
        Prediction.EPSILON: np.minimum(SNR, cap),
        Prediction.V: np.minimum(SNR, cap) + 1,
    }
    np.testing.assert_allclose(weight * FACTORS[space], uncapped[space] * np.ones_like(SNR), rtol=2e-5)
