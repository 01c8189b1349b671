"""Thresholding against NumPy's percentile."""

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.thresholding import Threshold, ThresholdConfig, threshold

SCALES = np.array([0.2, 1.0, 3.0, 20.0])
PICTURES = np.random.default_rng(0).standard_normal((4, 16, 16, 3)) * SCALES[:, None, None, None]


def apply(pictures, **fields):
    return np.asarray(threshold(jnp.asarray(pictures, jnp.float32), ThresholdConfig(**fields)))


@pytest.mark.parametrize("percentile", [80.0, 99.5])
def test_dynamic(percentile):
    made = apply(PICTURES, percentile=percentile)
    for picture, result in zip(PICTURES, made):
        s = max(1.0, np.percentile(np.abs(picture), percentile))
        np.testing.assert_allclose(result, np.clip(picture, -s, s) / s, atol=1e-5)


def test_the_default_is_99_and_a_half_percent_and_not_half_a_percent():
    made = apply(PICTURES)
    # 0.5 % of 768 values lie at or beyond ±1 after division by the 99.5th percentile: 4 of them.
    np.testing.assert_array_equal((np.abs(made[3]) >= 1 - 1e-6).sum(), 4)
    for wrong in (0.995, 0.5):
        with pytest.raises(ValueError, match=f"in percent.*{wrong}"):
            ThresholdConfig(percentile=wrong)


def test_pictures_in_range_are_left_alone():
    pictures = np.clip(PICTURES, -1, 1).astype(np.float32)
    for kind in Threshold:
        np.testing.assert_array_equal(apply(pictures, kind=kind), pictures)


def test_each_picture_by_itself():
    together = apply(PICTURES)
    for i in range(len(PICTURES)):
        np.testing.assert_allclose(apply(PICTURES[i : i + 1])[0], together[i], atol=1e-6)


def test_static_and_none():
    np.testing.assert_allclose(apply(PICTURES, kind=Threshold.STATIC), np.clip(PICTURES, -1, 1), atol=1e-6)
    np.testing.assert_array_equal(apply(PICTURES, kind=Threshold.NONE), PICTURES.astype(np.float32))


@pytest.mark.parametrize("percentile", [-1.0, 100.5])
def test_bad_percentile(percentile):
    with pytest.raises(ValueError, match=str(percentile)):
        ThresholdConfig(percentile=percentile)
