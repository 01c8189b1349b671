"""The building blocks that both U-Nets share, against NumPy and plain XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.models import layers


def test_doubling():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 4)), jnp.float32)
    made, pull = jax.vjp(layers.upsample_nearest, x)
    np.testing.assert_array_equal(made, np.asarray(x).repeat(2, axis=1).repeat(2, axis=2))
    gradient = jnp.asarray(np.random.default_rng(1).standard_normal(made.shape), jnp.float32)
    expected = np.asarray(gradient).reshape(2, 3, 2, 5, 2, 4).sum((2, 4))
    np.testing.assert_allclose(pull(gradient)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2**-6)])
@pytest.mark.parametrize("many_pixels", [0, 4096])
def test_convolution_of_a_doubled_picture(many_pixels, dtype, tolerance, monkeypatch):
    """Against the plain composition, in float32."""
    monkeypatch.setattr(layers, "_MANY_PIXELS", many_pixels)
    rng = np.random.default_rng(0)
    x, kernel, gradient = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((2, 3, 5, 4), (3, 3, 4, 6), (2, 6, 10, 6))
    )

    def plain(x, kernel):
        doubled = x.repeat(2, axis=1).repeat(2, axis=2)
        return jax.lax.conv_general_dilated(
            doubled, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    expected, pull = jax.vjp(plain, x.astype("float32"), kernel.astype("float32"))
    made, pull_made = jax.vjp(layers.upsampled_convolution, x, kernel)
    wanted = (expected, *pull(gradient.astype("float32")))
    for ours, theirs in zip((made, *pull_made(gradient)), wanted, strict=True):
        assert ours.dtype == dtype
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours, np.float64) / scale, theirs / scale, atol=tolerance)


def test_patches():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    patches = layers.to_patches(jnp.asarray(x), 2)
    assert patches.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patches[1, 1, 2], x[1, 2:4, 4:6].reshape(12))
    np.testing.assert_array_equal(layers.from_patches(patches, 2), x)
