"""Sums over a picture's positions, and GroupNorm made of them.

In bfloat16 a sum over positions is a product with a row of ones: the matrix unit adds in float32 and at its own
speed, where the vector unit would take several times as long (docs/performance.md). In float32 it is a plain sum:
the matrix unit would round what it adds. Gradients are written out, so that theirs are such sums too.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

Picture = Float[Array, "batch height width channels"]
PerChannel = Float[Array, "batch channels"]


def position_sums(x: Picture, dtype: jnp.dtype) -> PerChannel:
    """Sums over height and width, float32; terms are rounded to `dtype`."""
    if dtype == jnp.float32:
        return x.astype(jnp.float32).sum(axis=(1, 2))
    n, height, width, channels = x.shape
    terms = x.astype(dtype).reshape(n, height * width, channels)
    return jnp.einsum(
        "np,npc->nc", jnp.ones((n, height * width), dtype), terms, preferred_element_type=jnp.float32
    )


def _spread(values: PerChannel) -> Float[Array, "batch 1 1 channels"]:
    return values[:, None, None, :]


@jax.custom_vjp
def moments(x: Picture, shift: PerChannel) -> tuple[PerChannel, PerChannel]:
    """Means over positions of x − shift and of its square, float32, in one pass.

    Args:
      x: a picture.
      shift: near its mean, so that a large mean cancels before anything is squared; a constant to gradients.
    """
    less = x.astype(jnp.float32) - _spread(shift)
    count = x.shape[1] * x.shape[2]
    return position_sums(less, x.dtype) / count, position_sums(jnp.square(less), x.dtype) / count


def _moments_forward(x: Picture, shift: PerChannel) -> tuple:
    return moments(x, shift), (x, shift)


def _moments_backward(residuals: tuple, gradients: tuple) -> tuple:
    x, shift = residuals
    first, second = (_spread(each) / (x.shape[1] * x.shape[2]) for each in gradients)
    less = x.astype(jnp.float32) - _spread(shift)
    return (first + 2.0 * less * second).astype(x.dtype), jnp.zeros_like(shift)


moments.defvjp(_moments_forward, _moments_backward)


@jax.custom_vjp
def scale_shift(x: Picture, shift: PerChannel, factor: PerChannel, offset: PerChannel) -> Picture:
    """(x − shift)·factor + offset, computed in float32 and given in the dtype of x; `shift` is a constant."""
    less = x.astype(jnp.float32) - _spread(shift)
    return (less * _spread(factor) + _spread(offset)).astype(x.dtype)


def _scale_shift_forward(x: Picture, shift: PerChannel, factor: PerChannel, offset: PerChannel) -> tuple:
    return scale_shift(x, shift, factor, offset), (x, shift, factor)


def _scale_shift_backward(residuals: tuple, gradient: Picture) -> tuple:
    x, shift, factor = residuals
    full = gradient.astype(jnp.float32)
    less = x.astype(jnp.float32) - _spread(shift)
    return (
        (full * _spread(factor)).astype(x.dtype),
        jnp.zeros_like(shift),
        position_sums(full * less, x.dtype),
        position_sums(gradient, x.dtype),
    )


scale_shift.defvjp(_scale_shift_forward, _scale_shift_backward)


@jax.custom_vjp
def add_bias(x: Float[Array, "*shape channels"], bias: Float[Array, " channels"]) -> Float[Array, "..."]:
    """X + bias, in the dtype of x."""
    return x + bias.astype(x.dtype)


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, None]:
    return add_bias(x, bias), None


def _add_bias_backward(_: None, gradient: Array) -> tuple[Array, Array]:
    # Examples apart: as one long sum the matrix unit would be predicted to take three times as long.
    rows = gradient.reshape(gradient.shape[0], -1, 1, gradient.shape[-1])
    return gradient, position_sums(rows, gradient.dtype).sum(axis=0)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class GroupNorm(nnx.Module):
    """GroupNorm (arXiv 1803.08494) of 32 groups, or of fewer where a group would have less than 8 channels.

    With a channel or two a group it would be an instance norm, which wipes out how bright or large things are.

    Statistics are taken per channel in float32 and then shared within groups: the picture is never reshaped to
    a short last axis, which is slow on CPU and TPU alike. They take one pass over the picture: sums of the
    values less one of them, and of its square; the channels' means and variances are then combined exactly
    (Chan, Golub and LeVeque 1983, equation 2.1).
    """

    def __init__(self, channels: int, *, dtype: jnp.dtype, epsilon: float = 1e-5, groups: int | None = None):
        if groups is not None and channels % groups:
            raise ValueError(f"{groups} groups do not divide {channels} channels")
        own = 32 if channels % 32 == 0 and channels >= 256 else math.gcd(32, max(1, channels // 8))
        self.groups = groups or own
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def _share(self, values: PerChannel) -> PerChannel:
        """Means over each group's channels, one value a channel."""
        n, c = values.shape
        means = values.reshape(n, self.groups, c // self.groups).mean(axis=-1)
        return jnp.repeat(means, c // self.groups, axis=-1)

    def __call__(
        self,
        x: Picture,
        scale: PerChannel | None = None,
        shift: PerChannel | None = None,
        *,
        bias: Float[Array, " channels"] | float = 0.0,
    ) -> Picture:
        """Normalises over height, width and the channels of a group.

        Args:
          x: a picture.
          scale: multiplies the result by 1 + scale.
          shift: and is added to that.
          bias: of x, of the convolution before: it goes into the statistics and is never added to the picture,
            nor is its gradient a sum over one.
        """
        x = x.astype(self.dtype)
        # Of one position, so that it costs nothing; the result does not depend on it.
        pixel = jax.lax.stop_gradient(x[:, 0, 0].astype(jnp.float32))
        first, second = checkpoint_name(moments(x, pixel), "statistics")
        channel_mean = first + pixel + bias
        mean = self._share(channel_mean)
        within = jnp.maximum(second - jnp.square(first), 0.0)
        variance = self._share(within + jnp.square(channel_mean - mean))
        factor = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        # (x + bias − mean)·factor + own bias, written with x − pixel.
        offset = self.bias[...] + (pixel + bias - mean) * factor
        if scale is not None and shift is not None:
            factor, offset = factor * (1.0 + scale), offset * (1.0 + scale) + shift
        return scale_shift(x, pixel, factor, offset)
