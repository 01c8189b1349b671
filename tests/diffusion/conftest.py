"""Gaussian mixtures to sample from, and samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.loop import sample
from tests.diffusion.mixtures import Mixture, rotation


@pytest.fixture(scope="session")
def plane():
    """Three overlapping ellipses in the plane."""
    return Mixture(
        shape=(2,),
        weights=np.array([0.5, 0.3, 0.2]),
        means=np.array([[-0.7, -0.2], [0.6, 0.5], [0.5, -0.9]]),
        stds=np.array([[0.25, 0.4], [0.3, 0.2], [0.2, 0.3]]),
        basis=rotation(2),
    )


@pytest.fixture(scope="session")
def pictures():
    """Three kinds of pictures of 8×8×3, with directions of large and of small variance."""
    generator = np.random.default_rng(7)
    return Mixture(
        shape=(8, 8, 3),
        weights=np.array([0.5, 0.3, 0.2]),
        means=generator.standard_normal((3, 192)) * 0.25,
        stds=np.exp(generator.uniform(np.log(0.05), np.log(0.6), (3, 192))),
        basis=rotation(192),
    )


@pytest.fixture(scope="session")
def keys_of():
    def make(count, first=0):
        return jax.vmap(jax.random.key)(jnp.arange(first, first + count, dtype=jnp.uint32))

    return make


@pytest.fixture(scope="session")
def draw(keys_of):
    """draw(mixture, schedule, config, count) → samples (count, D) in float64."""

    def make(mixture, schedule, config, count, first=0):
        def run(keys):
            return sample(mixture.denoiser, keys=keys, shape=mixture.shape, schedule=schedule, config=config)

        made = jax.jit(run)(keys_of(count, first))
        return np.asarray(made, np.float64).reshape(count, -1)

    return make
