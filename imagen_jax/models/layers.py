"""Building blocks of U-Nets: convolutions, embeddings of numbers, residual blocks, patches.

Pictures are NHWC. Parameters are float32; convolutions and matrix products run in the configured dtype,
normalisation statistics in float32.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from imagen_jax.models.normalisation import GroupNorm, add_bias
from imagen_jax.parallel.jax_internals import Layout, with_layout_constraint

zeros_init = nnx.initializers.zeros_init()
lecun_init = nnx.initializers.lecun_normal()


def sinusoidal_embedding(values: Float[Array, " batch"], width: int) -> Float[Array, "batch {width}"]:
    """Sines and cosines of `values` at geometric frequencies 1 … 1e-4 (arXiv 1706.03762, section 3.5)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = values.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Conv3x3(nnx.Module):
    """3×3 convolution with padding one; parameters are float32, the rest is in `dtype`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stride: int,
        upsample: bool,
        init: Any,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(zeros_init(rngs.params(), (outputs,), jnp.float32))
        self.stride, self.upsample, self.dtype = stride, upsample, dtype

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """The convolution."""
        return add_bias(self.without_bias(x), self.bias[...])

    def without_bias(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """What a normalisation sees that adds the bias itself."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.upsample:
            return checkpoint_name(upsampled_convolution(x, kernel), "upsampled")
        return _convolve(x, kernel, stride=self.stride)


class Linear(nnx.Module):
    """Product over the last axis; parameters are float32, the rest is in `dtype`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool = True,
        kernel_init: Any = lecun_init,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(zeros_init(rngs.params(), (outputs,), jnp.float32)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*shape c"]) -> Float[Array, "*shape c2"]:
        """The product."""
        product = jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return product if self.bias is None else add_bias(product, self.bias[...])


def conv3x3(
    inputs: int,
    outputs: int,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    stride: int = 1,
    upsample: bool = False,
    zero: bool = False,
) -> Conv3x3:
    """3×3 convolution with padding one; `zero` starts it at zero, so that its branch starts as the identity.

    It sees one position in `stride`, or with `upsample` a picture of twice the sides, by repetition.
    """
    init = zeros_init if zero else lecun_init
    return Conv3x3(inputs, outputs, stride=stride, upsample=upsample, init=init, dtype=dtype, rngs=rngs)


@jax.custom_vjp
def upsample_nearest(x: Float[Array, "n h w c"]) -> Float[Array, "n 2*h 2*w c"]:
    """Doubles both sides by repetition."""
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


def _upsample_backward(_: None, gradient: Float[Array, "n h w c"]) -> tuple[Float[Array, "n h2 w2 c"]]:
    """Sums of 2×2, written as additions: the vector unit reduces axes far slower than it adds arrays."""
    n, h, w, c = gradient.shape
    parts = gradient.astype(jnp.float32).reshape(n, h // 2, 2, w // 2, 2, c)
    total = (parts[:, :, 0, :, 0] + parts[:, :, 0, :, 1]) + (parts[:, :, 1, :, 0] + parts[:, :, 1, :, 1])
    return (total.astype(gradient.dtype),)


upsample_nearest.defvjp(lambda x: (upsample_nearest(x), None), _upsample_backward)


def _convolve(
    x: Float[Array, "n h w inputs"],
    kernel: Float[Array, "k k c c2"],
    *,
    stride: int = 1,
    kernel_is: str = "HWIO",
) -> Float[Array, "n h2 w2 outputs"]:
    """Convolution with padding one; `kernel_is`: the order of the kernel's axes."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", kernel_is, "NHWC"),
    )


def upsampled_convolution(
    x: Float[Array, "n h w c"], kernel: Float[Array, "3 3 c c2"]
) -> Float[Array, "n 2*h 2*w c2"]:
    """3×3 convolution, with padding one, of a picture whose sides are doubled by repetition.

    The gradient of a large picture never sees the repetition: both steps together are a transposed convolution of
    stride 2 with a 4×4 kernel, whose gradients read 16 values for four pixels where the 3×3 kernel's read 36.
    """
    if math.prod(x.shape[:3]) < _MANY_PIXELS:
        return _convolve(upsample_nearest(x), kernel)
    return _upsampled_convolution(x, kernel)


# Fewer are not worth a kernel's sums, which take as long as the gradients of some 1500 pixels (predicted, v5e).
_MANY_PIXELS = 4096
# Of a row of four of the adjoint's kernel, turned by half a turn: which of the three rows two equal pixels met.
_MET = ((2,), (2, 1), (1, 0), (0,))


@jax.custom_vjp
def _upsampled_convolution(x: Array, kernel: Array) -> Array:
    return _convolve(upsample_nearest(x), kernel)


def _upsampled_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept

    def total(array: Array, rows: Iterable[int], columns: Iterable[int]) -> Array:
        parts = [array[row, column].astype(jnp.float32) for row in rows for column in columns]
        return functools.reduce(jnp.add, parts).astype(kernel.dtype)

    def table(array: Array, groups: Sequence[Iterable[int]]) -> Array:
        return jnp.stack([jnp.stack([total(array, rows, columns) for columns in groups]) for rows in groups])

    # <gradient, f(x)> = <adjoint(gradient), x>: its derivative by the kernel is that of the right side.
    adjoint = table(kernel, _MET)
    x_gradient, pull = jax.vjp(lambda k: _convolve(gradient, k, stride=2, kernel_is="HWOI"), adjoint)
    kernel_gradient = table(pull(x)[0], [(2 - row, 3 - row) for row in range(3)])
    # The TPU compiler gives another order of the axes to what no convolution made. Over several chips that would be
    # summed whole before it is cut, with all others of its shape.
    return x_gradient, with_layout_constraint(kernel_gradient, Layout(major_to_minor=(0, 1, 2, 3)))


_upsampled_convolution.defvjp(
    lambda x, kernel: (_upsampled_convolution(x, kernel), (x, kernel)), _upsampled_backward
)


def downsample_average(x: Float[Array, "n h w c"]) -> Float[Array, "n h//2 w//2 c"]:
    """Halves both sides by 2×2 averages."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


class TimeEmbedding(nnx.Module):
    """Sinusoidal embedding followed by a two-layer network; for the time and for the augmentation level."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        activation: Callable[[Array], Array] = nnx.silu,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.channels, self.activation = channels, activation
        self.dense1 = Linear(channels, width, dtype=dtype, rngs=rngs)
        self.dense2 = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, value: Float[Array, " batch"]) -> Float[Array, "batch width"]:
        """`value` in [0, 1000] (`diffusion.process.time_condition`)."""
        return self.dense2(self.activation(self.dense1(sinusoidal_embedding(value, self.channels))))


class ResNetBlock(nnx.Module):
    """GroupNorm, swish, conv, twice, on a residual path; the embedding scales and shifts the second norm.

    With `resample` "up" or "down" both paths change resolution after the first activation, as BigGAN's blocks
    do (arXiv 2105.05233, section 3). With `embedding_width` None no embedding enters (Efficient U-Net,
    arXiv 2205.11487, figure A.27). DeepFloyd's blocks have an activation of their own, take the embedding as it
    is where `activate_embedding` is off, and divide the residual sum by `scale`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        embedding_width: int | None,
        resample: str | None = None,
        activation: Callable[[Array], Array] = nnx.silu,
        activate_embedding: bool = True,
        norm_groups: int | None = None,
        scale: float = 1.0,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        if resample not in (None, "up", "down"):
            raise ValueError(f"resample must be None, 'up' or 'down', got {resample!r}")
        self.resample, self.activation = resample, activation
        self.activate_embedding, self.scale = activate_embedding, scale
        self.norm1 = GroupNorm(inputs, groups=norm_groups, dtype=dtype)
        self.conv1 = conv3x3(inputs, outputs, upsample=resample == "up", dtype=dtype, rngs=rngs)
        self.embed = (
            None if embedding_width is None else Linear(embedding_width, 2 * outputs, dtype=dtype, rngs=rngs)
        )
        self.norm2 = GroupNorm(outputs, groups=norm_groups, dtype=dtype)
        self.conv2 = conv3x3(outputs, outputs, dtype=dtype, rngs=rngs, zero=True)
        self.shortcut = (
            None if inputs == outputs else Linear(inputs, outputs, dtype=dtype, rngs=rngs)
        )  # a 1×1 convolution

    def __call__(
        self,
        x: Float[Array, "batch height width inputs"],
        embedding: Float[Array, "batch width_e"] | None = None,
        skip: Float[Array, "batch height width inputs2"] | None = None,
    ) -> Float[Array, "batch height2 width2 outputs"]:
        """`embedding` is the time and pooled-text embedding, before its activation; a skip is seen beside x."""
        parts = (x,) if skip is None else (x, skip)
        x = jnp.concatenate(parts, axis=-1)
        h = self.activation(self.norm1(x, parts=parts))
        if self.resample == "up":
            x = upsample_nearest(x)  # h is by conv1
        elif self.resample == "down":
            h, x = downsample_average(h), downsample_average(x)
        h = self.conv1.without_bias(h)
        scale = shift = None
        if self.embed is not None and embedding is not None:
            if self.activate_embedding:
                embedding = self.activation(embedding)
            scale, shift = jnp.split(self.embed(embedding).astype(jnp.float32), 2, axis=-1)
        h = self.conv2(self.activation(self.norm2(h, scale, shift, bias=self.conv1.bias[...])))
        h = h + (x if self.shortcut is None else self.shortcut(x))
        return h if self.scale == 1.0 else h / self.scale


def with_low_res(
    x: Float[Array, "batch height width channels"],
    low_res: Float[Array, "batch low_height low_width low_channels"] | None,
) -> Float[Array, "batch height width channels2"]:
    """The network's input: x_t, and beside it the low-resolution picture enlarged bicubically."""
    if low_res is None:
        return x
    enlarged = jax.image.resize(low_res, (*x.shape[:3], low_res.shape[-1]), "cubic")
    return jnp.concatenate([x, enlarged.astype(x.dtype)], axis=-1)


def to_patches(x: Float[Array, "n h w c"], size: int) -> Float[Array, "n h2 w2 c2"]:
    """Moves squares of size × size pixels into channels."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // size, w // size, size * size * c)


def from_patches(x: Float[Array, "n h w c"], size: int) -> Float[Array, "n h2 w2 c2"]:
    """Undoes `to_patches`."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, size, size, c // size**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h * size, w * size, c // size**2)
