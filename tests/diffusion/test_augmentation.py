"""Noise conditioning augmentation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from imagen_jax.diffusion.augmentation import NoiseAugmentation

LEVELS = np.array([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
SHAPE = (len(LEVELS), 32, 32, 3)


def test_amplitudes():
    # Angles from 0 to π/2 but for the bounds of ±15 nats: cos of the picture, sin of the noise.
    augmentation, one, zero = NoiseAugmentation(), jnp.ones(SHAPE), jnp.zeros(SHAPE)
    levels = jnp.asarray(LEVELS, jnp.float32)
    kept = np.asarray(augmentation.apply(one, zero, levels))
    added = np.asarray(augmentation.apply(zero, one, levels))
    for i, level in enumerate(LEVELS):
        np.testing.assert_allclose(kept[i], np.cos(np.pi / 2 * level), atol=6e-4)
        np.testing.assert_allclose(added[i], np.sin(np.pi / 2 * level), atol=6e-4)


def test_preserves_variance():
    noise = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    made = np.asarray(NoiseAugmentation().apply(noise[0], noise[1], jnp.asarray(LEVELS, jnp.float32)))
    # The variance of 3072 unit normals has a standard deviation of 0.026.
    np.testing.assert_allclose(made.var(axis=(1, 2, 3)), 1.0, atol=0.13)


def test_level_zero_leaves_the_picture():
    generator = np.random.default_rng(0)
    picture = jnp.asarray(generator.uniform(-1, 1, SHAPE), jnp.float32)
    noise = jnp.asarray(generator.standard_normal(SHAPE), jnp.float32)
    made = NoiseAugmentation().apply(picture, noise, jnp.zeros(len(LEVELS)))
    # Half a grey level of 255 is 1 / 255 on [−1, 1]; five standard deviations of e^−7.5 stay below it.
    assert np.abs(np.asarray(made) - np.asarray(picture)).max() < 1 / 255


@pytest.mark.parametrize("std", [0.6, 1.5])
def test_blur_is_scipys(std):
    generator = np.random.default_rng(0)
    picture = generator.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    augmentation = NoiseAugmentation(blur=std)
    made = augmentation.apply(jnp.asarray(picture), jnp.zeros(picture.shape), jnp.zeros(2))
    expected = ndimage.gaussian_filter(picture, (0, std, std, 0), mode="nearest", radius=math.ceil(4 * std))
    np.testing.assert_allclose(np.asarray(made), expected, atol=1e-5)
    # The noise is not blurred: it is what hides the smallest scale for good.
    noise = generator.standard_normal(picture.shape).astype(np.float32)
    added = augmentation.apply(jnp.zeros(picture.shape), jnp.asarray(noise), jnp.ones(2))
    np.testing.assert_allclose(np.asarray(added), noise, atol=1e-5)


@pytest.mark.parametrize("std", [-1.0, math.inf, math.nan])
def test_bad_blur(std):
    with pytest.raises(ValueError, match=str(std)):
        NoiseAugmentation(blur=std)


@pytest.mark.parametrize("level", [-0.1, 1.5])
def test_bad_level(level):
    with pytest.raises(ValueError, match=str(level)):
        NoiseAugmentation(max_level=level)
