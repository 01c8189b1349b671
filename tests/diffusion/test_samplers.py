"""Samplers on Gaussian data, whose denoiser and whose samples are known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.grids import Grid, GridConfig
from imagen_jax.diffusion.loop import image_noise, sample
from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.diffusion.schedules import CosineSchedule, LinearSchedule, alpha_sigma

MEAN = np.array([0.4, -0.3, 0.1])
COVARIANCE = np.array([[0.5, 0.3, -0.1], [0.3, 0.4, 0.05], [-0.1, 0.05, 0.1]])
EIGENVALUES, EIGENVECTORS = np.linalg.eigh(COVARIANCE)
COUNT = 4096  # samples
SCHEDULES = {"cosine": CosineSchedule(), "linear": LinearSchedule()}


def denoiser(x_t, log_snr, step):
    """E[x0 | x_t] = μ + αΣ(α²Σ + σ²)⁻¹(x_t − αμ), in the eigenvectors of Σ."""
    alpha, sigma = alpha_sigma(log_snr)
    basis, values = jnp.asarray(EIGENVECTORS, jnp.float32), jnp.asarray(EIGENVALUES, jnp.float32)
    mean = jnp.asarray(MEAN, jnp.float32)[None]
    gain = (alpha * values / (alpha**2 * values + sigma**2))[None]
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
    ("kind", "fields"),
    [(Sampler.DDPM, {"variance_interpolation": 0.0}), (Sampler.DDIM, {}), (Sampler.DDIM, {"eta": 1.0})],
    ids=str,
)
def test_samples_of_the_linear_schedule_are_distributed_as_the_data(kind, fields):
    assert_is_the_data(draw(kind, 150, schedule="linear", **fields), bias=0.012)


@pytest.mark.parametrize("kind", [Sampler.DDPM, Sampler.HEUN])
def test_one_step_gives_the_denoised_noise(kind):
    x_1 = image_noise(keys_of(64), 0, (3,))
    expected = denoiser(x_1, jnp.asarray(-15.0 if kind is Sampler.DDPM else -12.0), 0)
    np.testing.assert_allclose(draw(kind, 1, count=64), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [Sampler.DPMPP, Sampler.DPMPP_SDE])
def test_dpmpp_is_the_published_algorithm(kind):
    """arXiv 2211.01095, algorithm 2 and the SDE's, in NumPy over a grid whose steps differ in length."""
    schedule, steps = SCHEDULES["cosine"], 12
    levels = -2 * np.log(np.tan(np.pi / 2 * (1 - np.arange(1, steps) / steps)))
    half = np.concatenate([[-15.0], levels]) / 2  # λ = log(α/σ)
    alphas, sigmas = 1 / np.sqrt(1 + np.exp(-2 * half)), 1 / np.sqrt(1 + np.exp(2 * half))

    def model(x, i):
        gain = alphas[i] * EIGENVALUES / (alphas[i] ** 2 * EIGENVALUES + sigmas[i] ** 2)
        return MEAN + (gain * ((x - alphas[i] * MEAN) @ EIGENVECTORS)) @ EIGENVECTORS.T

    x, before = np.asarray(image_noise(keys_of(16), 0, (3,)), np.float64), None
    for i in range(1, steps):
        x0, h = model(x, i - 1), half[i] - half[i - 1]
        middle = x0
        if before is not None:
            r = (half[i - 1] - half[i - 2]) / h
            middle = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x = sigmas[i] / sigmas[i - 1] * x
        if kind is Sampler.DPMPP:
            x = x - alphas[i] * np.expm1(-h) * middle
        else:
            noise = np.asarray(image_noise(keys_of(16), i, (3,)), np.float64)
            x = np.exp(-h) * x - alphas[i] * np.expm1(-2 * h) * middle
            x = x + sigmas[i] * np.sqrt(-np.expm1(-2 * h)) * noise
        before = x0
    config = SamplerConfig(kind=kind, steps=steps, grid=GridConfig(kind=Grid.TIME))
    np.testing.assert_allclose(config.log_snrs(schedule), 2 * half, atol=0.02)
    made = draw(kind, steps, count=16, grid=GridConfig(kind=Grid.TIME))
    # The schedule's bounds move its angles by up to 6e-4.
    np.testing.assert_allclose(made, model(x, steps - 1), atol=5e-3)


@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_heun_calls_twice_a_step_but_once_in_the_last(churn):
    called = []

    def watched(x_t, log_snr, step):
        jax.debug.callback(lambda *call: called.append(call), step, log_snr, ordered=True)
        return denoiser(x_t, log_snr, step)

    config = SamplerConfig(
        kind=Sampler.HEUN, steps=4, grid=GridConfig(log_snr_max=9.0, kind=Grid.LOG_SNR), churn=churn
    )
    jax.block_until_ready(
        sample(watched, keys=keys_of(2), shape=(3,), schedule=CosineSchedule(), config=config)
    )
    jax.effects_barrier()
    assert config.network_calls == len(called) == 7
    assert [int(step) for step, _ in called] == [0, 0, 1, 1, 2, 2, 3]
    # arXiv 2206.00364, algorithm 2: σ̂ = (1 + min(S_churn/N, √2 − 1))·σ, but never above the first σ.
    levels = np.array([-12.0, -6.75, -1.5, 3.75])
    churned = np.maximum(levels - 2 * np.log(1 + min(churn / 4, np.sqrt(2) - 1)), -12.0)
    expected = [churned[0], levels[1], churned[1], levels[2], churned[2], levels[3], churned[3]]
    np.testing.assert_allclose([level for _, level in called], expected, atol=1e-4)


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
    for positions in ([5], [7, 6, 5, 4, 3, 2, 1, 0]):
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
    [
        {"churn": -1.0},
        {"churn_noise": float("inf")},
        {"steps": 0},
        {"variance_interpolation": 1.5},
        {"eta": -0.25},
        {"variance_interpolation": -2.0},
    ],
)
def test_bad_configs(fields):
    with pytest.raises(ValueError, match=f"got {next(iter(fields.values()))}"):
        SamplerConfig(**fields)
