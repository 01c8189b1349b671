"""Samplers on Gaussian data, whose denoiser and whose samples are known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.samplers import (
    Sampler,
    SamplerConfig,
    ddim_step,
    ddpm_step,
    image_noise,
    sample,
)
from imagen_jax.diffusion.schedules import CosineSchedule, LinearSchedule, alpha_sigma

MEAN = np.array([0.4, -0.3, 0.1])
COVARIANCE = np.array([[0.5, 0.3, -0.1], [0.3, 0.4, 0.05], [-0.1, 0.05, 0.1]])
EIGENVALUES, EIGENVECTORS = np.linalg.eigh(COVARIANCE)
COUNT = 4096  # samples
SCHEDULES = {"cosine": CosineSchedule(), "linear": LinearSchedule()}


def denoiser(x_t, log_snr):
    """E[x0 | x_t] = μ + αΣ(α²Σ + σ²)⁻¹(x_t − αμ), in the eigenvectors of Σ."""
    alpha, sigma = (each[:, None] for each in alpha_sigma(log_snr))
    basis, values = jnp.asarray(EIGENVECTORS, jnp.float32), jnp.asarray(EIGENVALUES, jnp.float32)
    mean = jnp.asarray(MEAN, jnp.float32)
    gain = alpha * values / (alpha**2 * values + sigma**2)
    return mean + (gain * ((x_t - alpha * mean) @ basis)) @ basis.T


def keys_of(count, first=0):
    return jax.vmap(jax.random.key)(jnp.arange(first, first + count, dtype=jnp.uint32))


@functools.cache
def draw(kind, steps, *, schedule="cosine", count=COUNT, **fields):
    """Samples (count, 3) in float64."""
    config = SamplerConfig(kind=kind, steps=steps, **fields)
    run = jax.jit(
        lambda keys: sample(denoiser, keys=keys, shape=(3,), schedule=SCHEDULES[schedule], config=config)
    )
    return np.asarray(run(keys_of(count)), np.float64)


def assert_is_the_data(samples, *, bias):
    """Mean and covariance within five standard errors, and `bias` for the steps being finite."""
    count = len(samples)
    error = np.abs(samples.mean(axis=0) - MEAN)
    assert np.all(error < 5 * np.sqrt(np.diag(COVARIANCE) / count) + bias)
    # Var of an entry of the sample covariance: (Σ_ii·Σ_jj + Σ_ij²) / n (Wishart)
    diagonal = np.diag(COVARIANCE)
    spread = np.sqrt((np.outer(diagonal, diagonal) + COVARIANCE**2) / count)
    assert np.all(np.abs(np.cov(samples.T) - COVARIANCE) < 5 * spread + bias)


@pytest.mark.parametrize(
    ("kind", "schedule", "fields"),
    [
        (Sampler.DDPM, "cosine", {}),
        (Sampler.DDPM, "linear", {"variance_interpolation": 0.0}),
        (Sampler.DDIM, "cosine", {}),
        (Sampler.DDIM, "linear", {}),
        (Sampler.DDIM, "cosine", {"eta": 1.0}),
    ],
    ids=str,
)
def test_samples_are_distributed_as_the_data(kind, schedule, fields):
    assert_is_the_data(draw(kind, 150, schedule=schedule, **fields), bias=0.012)


def flow(x_1, schedule="cosine"):
    """Where the probability flow ODE takes x_1: each eigencoordinate keeps its standard score."""
    alpha, sigma = (float(each) for each in alpha_sigma(SCHEDULES[schedule].log_snr(jnp.ones(()))))
    scores = (x_1 - alpha * MEAN) @ EIGENVECTORS / np.sqrt(alpha**2 * EIGENVALUES + sigma**2)
    return MEAN + (scores * np.sqrt(EIGENVALUES)) @ EIGENVECTORS.T


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_converges_to_the_probability_flow_at_first_order(schedule):
    x_1 = np.asarray(image_noise(keys_of(64), 0, (3,)), np.float64)
    errors = [
        np.sqrt(np.mean((draw(Sampler.DDIM, n, schedule=schedule, count=64) - flow(x_1, schedule)) ** 2))
        for n in (50, 100, 200)
    ]
    ratios = np.array(errors[:-1]) / errors[1:]
    assert np.all((ratios > 1.6) & (ratios < 2.4)), (errors, ratios)
    assert errors[-1] < 0.02


def test_ddpm_step_is_the_posterior():
    """The moments of q(x_s | x_t, x0), from conditioning the joint Gaussian of (x_s, x_t) given x0."""
    generator = np.random.default_rng(0)
    for log_snr_t, log_snr_s in ((-6.0, -5.0), (-1.0, 2.0), (3.0, 3.2)):
        a_t, s_t, a_s, s_s = (
            np.sqrt(1 / (1 + np.exp(sign * level))) for level in (log_snr_t, log_snr_s) for sign in (-1, 1)
        )
        a_ts = a_t / a_s  # x_t = a_ts·x_s + noise, the forward step from s to t
        x0, x_t, noise = generator.standard_normal((3, 1, 5))
        mean = a_s * x0 + a_ts * s_s**2 / s_t**2 * (x_t - a_t * x0)
        lower = s_s**2 - (a_ts * s_s**2) ** 2 / s_t**2  # the posterior's variance
        upper = s_t**2 - (a_ts * s_s) ** 2  # the forward step's variance
        for gamma in (0.0, 0.2, 1.0):
            std = np.sqrt(lower ** (1 - gamma) * upper**gamma)
            made = ddpm_step(
                *(jnp.asarray(each, jnp.float32) for each in (x_t, x0, noise)),
                jnp.full((1,), log_snr_t),
                jnp.full((1,), log_snr_s),
                variance_interpolation=gamma,
            )
            np.testing.assert_allclose(made, mean + std * noise, atol=2e-5)


def test_ddim_with_eta_one_is_the_posterior():
    generator = np.random.default_rng(1)
    x_t, x0, noise = (jnp.asarray(x, jnp.float32) for x in generator.standard_normal((3, 4, 6)))
    low, high = jnp.array([-9.0, -2.0, 0.0, 4.0]), jnp.array([-7.0, -1.0, 3.0, 4.1])
    np.testing.assert_allclose(
        ddim_step(x_t, x0, noise, low, high, eta=1.0),
        ddpm_step(x_t, x0, noise, low, high, variance_interpolation=0.0),
        atol=2e-5,
    )
    # Without η the noise has no say.
    np.testing.assert_array_equal(
        ddim_step(x_t, x0, noise, low, high, eta=0.0), ddim_step(x_t, x0, 9 * noise, low, high, eta=0.0)
    )


def test_one_step_gives_the_denoised_noise():
    x_1 = image_noise(keys_of(64), 0, (3,))
    expected = denoiser(x_1, jnp.full((64,), -15.0))
    np.testing.assert_allclose(draw(Sampler.DDPM, 1, count=64), expected, atol=1e-5)


@pytest.mark.parametrize("kind", Sampler)
def test_an_image_depends_on_its_own_key_only(kind):
    eight = draw(kind, 8, count=8)
    run = jax.jit(
        lambda keys: sample(
            denoiser,
            keys=keys,
            shape=(3,),
            schedule=CosineSchedule(),
            config=SamplerConfig(kind=kind, steps=8),
        )
    )
    keys = keys_of(8)
    for positions in ([5], [5, 0, 7], [1, 2, 5], [7, 6, 5, 4, 3, 2, 1, 0]):
        made = run(keys[jnp.array(positions)])
        np.testing.assert_allclose(made, eight[positions], atol=1e-5)
    assert np.abs(eight[:, None] - eight[None])[np.triu_indices(8, 1)].max(axis=-1).min() > 1e-2


def test_noise_is_unit_and_new_at_each_step():
    noise = np.stack([image_noise(keys_of(500), step, (4, 4)) for step in (0, 1, 2)])
    np.testing.assert_allclose(noise.mean(), 0.0, atol=5 / np.sqrt(noise.size))
    np.testing.assert_allclose(noise.std(), 1.0, atol=5 / np.sqrt(2 * noise.size))
    correlation = np.corrcoef(noise.reshape(3, -1))
    np.testing.assert_allclose(correlation, np.eye(3), atol=5 / np.sqrt(noise[0].size))


@pytest.mark.parametrize(
    "fields",
    [{"steps": 0}, {"variance_interpolation": 1.5}, {"eta": -0.25}, {"variance_interpolation": -2.0}],
)
def test_bad_configs(fields):
    with pytest.raises(ValueError, match=f"got {next(iter(fields.values()))}"):
        SamplerConfig(**fields)
