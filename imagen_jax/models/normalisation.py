"""GroupNorm, and additions whose gradients are sums over a picture's positions.

How such sums are written decides what they cost on TPU (docs/performance.md). Those of what a convolution has just
made are plain sums of float32, which the compiler adds up while it writes the picture, for nothing; but only if they
depend on nothing else of that picture. Other sums of bfloat16 are products with rows of ones: the matrix unit adds in
float32 and at its own speed, where the vector unit would take ten times as long.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

Picture = Float[Array, "batch height width channels"]
PerChannel = Float[Array, "batch channels"]
Part = Float[Array, "batch height width _"]  # some of a picture's channels


# Rows of ones in a sum, of which one is used: a product with a single row the TPU compiler turns back into a
# reduction on the vector unit.
_ROWS = 8


def position_sums(x: Picture) -> PerChannel:
    """Sums over height and width, float32."""
    if x.dtype == jnp.float32:
        return x.sum(axis=(1, 2))  # a matrix unit would round what it adds
    n, height, width, channels = x.shape
    ones, terms = jnp.ones((n, _ROWS, height * width), x.dtype), x.reshape(n, height * width, channels)
    return jnp.einsum("nrp,npc->nrc", ones, terms, preferred_element_type=jnp.float32)[:, 0]


def _spread(values: PerChannel) -> Float[Array, "batch 1 1 channels"]:
    return values[:, None, None, :]


@jax.custom_vjp
def moments(x: Picture, shift: PerChannel) -> tuple[PerChannel, PerChannel]:
    """Means over positions of x − shift and of its square, float32, in one pass.

    Args:
      x: a picture.
      shift: near its mean, where a large mean must cancel before anything is squared; a constant to gradients.
    """
    less = x.astype(jnp.float32) - _spread(shift)
    return less.mean(axis=(1, 2)), jnp.square(less).mean(axis=(1, 2))


def _moments_forward(x: Picture, shift: PerChannel) -> tuple:
    return moments(x, shift), (x, shift)


def _moments_backward(residuals: tuple, gradients: tuple) -> tuple:
    x, shift = residuals
    first, second = (_spread(gradient) / (x.shape[1] * x.shape[2]) for gradient in gradients)
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
        (full * less).sum(axis=(1, 2)),
        full.sum(axis=(1, 2)),
    )


scale_shift.defvjp(_scale_shift_forward, _scale_shift_backward)


@jax.custom_vjp
def add_bias(x: Float[Array, "*shape channels"], bias: Float[Array, " channels"]) -> Float[Array, "..."]:
    """X + bias, in the dtype of x."""
    return x + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - 1))


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, None]:
    return add_bias(x, bias), None


def _add_bias_backward(_: None, gradient: Array) -> tuple[Array, Array]:
    # Examples apart: as one long sum the matrix unit would be predicted to take three times as long.
    rows = gradient.reshape(gradient.shape[0], -1, 1, gradient.shape[-1])
    return gradient, position_sums(rows).sum(axis=0)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def add_everywhere(x: Picture, values: PerChannel) -> Picture:
    """X + values at every position; both have the same dtype."""
    return x + _spread(values)


def _add_everywhere_backward(_: None, gradient: Picture) -> tuple[Picture, PerChannel]:
    return gradient, position_sums(gradient).astype(gradient.dtype)


add_everywhere.defvjp(lambda x, values: (add_everywhere(x, values), None), _add_everywhere_backward)


class GroupNorm(nnx.Module):
    """GroupNorm (arXiv 1803.08494) of 32 groups, or of fewer where a group would have less than 8 channels.

    With a channel or two a group it would be an instance norm, which wipes out how bright or large things are.

    Statistics are taken per channel in float32 and then shared within groups: the picture is never reshaped to
    a short last axis, which is slow on CPU and TPU alike. They take one pass over the picture: sums of the
    values less one of them, and of its square; the channels' means and variances are then combined exactly
    (Chan, Golub and LeVeque 1983, equation 2.1). In bfloat16 nothing is subtracted: a mean whose square takes
    the variance's digits in float32 has long taken those of the values themselves.
    """

    def __init__(self, channels: int, *, dtype: jnp.dtype, epsilon: float = 1e-5, groups: int | None = None):
        if groups is not None and channels % groups:
            raise ValueError(f"{groups} groups do not divide {channels} channels")
        usual = 32 if channels % 32 == 0 and channels >= 256 else math.gcd(32, max(1, channels // 8))
        self.groups = groups or usual
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def _share(self, values: PerChannel) -> PerChannel:
        """Means over each group's channels, one value a channel."""
        n, c = values.shape
        means = values.reshape(n, self.groups, c // self.groups).mean(axis=-1)
        return jnp.repeat(means, c // self.groups, axis=-1)

    def _moments(self, parts: Sequence[Part], shift: PerChannel) -> tuple[PerChannel, PerChannel]:
        """`moments` of pictures whose channels are side by side."""
        ends = list(itertools.accumulate(part.shape[-1] for part in parts))
        shifts = jnp.split(shift, ends[:-1], axis=-1)
        pairs = [moments(part.astype(self.dtype), part_shift) for part, part_shift in zip(parts, shifts)]
        first, second = (jnp.concatenate(values, axis=-1) for values in zip(*pairs))
        return first, second

    def __call__(
        self,
        x: Picture,
        scale: PerChannel | None = None,
        shift: PerChannel | None = None,
        *,
        bias: Float[Array, " channels"] | float = 0.0,
        parts: Sequence[Part] = (),
    ) -> Picture:
        """Normalises over height, width and the channels of a group.

        Args:
          x: a picture.
          scale: multiplies the result by 1 + scale.
          shift: and is added to that.
          bias: of x, of the convolution before: it goes into the statistics and is never added to the picture,
            nor is its gradient a sum over one.
          parts: what x is a concatenation of, if it is one: sums are then taken of what made it.
        """
        x = x.astype(self.dtype)
        # Of one position, so that it costs nothing; the result does not depend on it.
        pixel = x[:, 0, 0] if self.dtype == jnp.float32 else jnp.zeros((x.shape[0], x.shape[-1]))
        pixel = jax.lax.stop_gradient(pixel)
        first, second = checkpoint_name(self._moments(parts or (x,), pixel), "statistics")
        bias = jnp.reshape(bias, (1, -1))  # (1, C), or (1, 1) of a number
        channel_mean = first + pixel + bias  # (N, C)
        mean = self._share(channel_mean)
        within = jnp.maximum(second - jnp.square(first), 0.0)
        variance = self._share(within + jnp.square(channel_mean - mean))
        factor = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...][None]  # (N, C)
        # (x + bias − mean)·factor + own bias, written with x − pixel.
        offset = self.bias[...][None] + (pixel + bias - mean) * factor
        if scale is not None and shift is not None:
            factor, offset = factor * (1.0 + scale), offset * (1.0 + scale) + shift
        return scale_shift(x, pixel, factor, offset)
