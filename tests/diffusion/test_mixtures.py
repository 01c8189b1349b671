"""What the samplers draw is distributed as the data: mixtures in the plane and of small pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.grids import Grid, GridConfig
from imagen_jax.diffusion.loop import sample
from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.diffusion.schedules import CosineSchedule

LOG_SNR = GridConfig(kind=Grid.LOG_SNR)
# Configs and how far their variances may be off, relatively, for their steps being finite.
CONFIGS = {
    "ddpm": (SamplerConfig(kind=Sampler.DDPM, steps=128), 0.06),
    "ddim": (SamplerConfig(kind=Sampler.DDIM, steps=128, eta=0.5), 0.06),
    "dpmpp": (SamplerConfig(kind=Sampler.DPMPP, steps=64), 0.02),
    "dpmpp_sde": (SamplerConfig(kind=Sampler.DPMPP_SDE, steps=96), 0.03),
    "heun": (SamplerConfig(kind=Sampler.HEUN, steps=48, grid=LOG_SNR), 0.02),
    "heun, churned": (SamplerConfig(kind=Sampler.HEUN, steps=48, grid=LOG_SNR, churn=10.0), 0.02),
}


def assert_is_the_mixture(samples, mixture, bias):
    """Mean, covariance and weights within 5.5 standard errors and `bias` (of variances; of means, in std)."""
    count = len(samples)
    mean, covariance = mixture.moments()
    std = np.sqrt(np.diag(covariance))
    error = np.abs(samples.mean(axis=0) - mean) / std
    assert np.all(error < 5.5 / np.sqrt(count) + bias), error.max()
    # Standard errors of products, which are no Gaussian's, from samples of the mixture itself.
    exact = (mixture.draw(20000) - mean) / std
    squares = (exact**2).T @ exact**2 / len(exact) - ((exact.T @ exact) / len(exact)) ** 2
    away = (samples - mean) / std
    error = np.abs(away.T @ away / count - covariance / np.outer(std, std))
    assert np.all(error < 5.5 * np.sqrt(squares / count) + bias), error.max()
    drawn, shares = (
        np.bincount(mixture.component(each), minlength=3) / len(each)
        for each in (samples, mixture.draw(20000))
    )
    deviation = np.sqrt(shares * (1 - shares) * (1 / count + 1 / 20000))
    assert np.all(np.abs(drawn - shares) < 5 * deviation + 0.01), (drawn, shares)


@pytest.mark.parametrize("name", CONFIGS)
def test_plane(plane, draw, name):
    config, bias = CONFIGS[name]
    assert_is_the_mixture(draw(plane, CosineSchedule(), config, 1536), plane, bias)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp", "dpmpp_sde", "heun"])
def test_pictures(pictures, draw, name):
    config, bias = CONFIGS[name]
    samples = draw(pictures, CosineSchedule(), config, 384)
    assert_is_the_mixture(samples, pictures, bias)
    # Directions of very different variance, each by itself, within each component.
    chosen = pictures.component(samples)
    z = ((samples @ pictures.basis) - pictures.means[chosen]) / pictures.stds[chosen]
    small, large = (np.log((z[pictures.stds[chosen] < limit] ** 2).mean()) for limit in (0.1, 9.9))
    assert abs(large) < 2 * bias + 0.02 and abs(small) < 0.4, (large, small)


def test_dpmpp_of_32_steps_is_as_close_as_ddpm_of_128(keys_of):
    """In the direction whose variance is worst, for a Gaussian of standard deviations from 0.02 to 1."""
    stds = jnp.geomspace(0.02, 1.0, 12)

    def denoiser(x_t, log_snr, step):
        signal, noise = jax.nn.sigmoid(log_snr) * stds**2, jax.nn.sigmoid(-log_snr)
        return (jnp.sqrt(jax.nn.sigmoid(log_snr)) * stds**2 / (signal + noise))[None] * x_t

    def worst(kind, steps, count=4096):
        config = SamplerConfig(kind=kind, steps=steps)
        run = jax.jit(
            lambda keys: sample(denoiser, keys=keys, shape=(12,), schedule=CosineSchedule(), config=config)
        )
        return np.abs(np.log(np.var(np.asarray(run(keys_of(count))), axis=0) / stds**2)).max()

    dpmpp, ddpm = worst(Sampler.DPMPP, 32), worst(Sampler.DDPM, 128)
    assert dpmpp < ddpm and dpmpp < 0.15, (dpmpp, ddpm)
    assert worst(Sampler.DPMPP, 8) > dpmpp
