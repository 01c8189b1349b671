"""The Efficient U-Net of Imagen's super-resolution stages (arXiv 2205.11487, appendices B.1, F.2 and F.3)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from imagen_jax.models.layers import (
    Conditioning,
    ResNetBlock,
    conv3x3,
    from_patches,
    to_patches,
    upsample_nearest,
    with_low_res,
)
from imagen_jax.models.unet import UNetConfig, level_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientUNetConfig(UNetConfig):
    """Shape of an Efficient U-Net. Every block has stride 2: level i works at 1 / 2^(i+1) of the side."""

    KIND: ClassVar[str] = "efficient_unet"
    low_res_channels: int = 3  # the network is made for super-resolution; 0 makes a base network of it

    @property
    def side_multiple(self) -> int:
        """Pixels; both sides of a picture are multiples of it."""
        return self.patch_size * 2 ** len(self.channels)


class CombineEmbeddings(nnx.Module):
    """Adds the projected time and pooled-text embedding to every position."""

    def __init__(self, width: int, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.project = nnx.Linear(width, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, embedding: Array) -> Array:
        """Adds the embedding's projection to x."""
        return x + self.project(nnx.silu(embedding))[:, None, None, :]


class Stack(nnx.Module):
    """What DBlock and UBlock share: the embedding, the residual blocks and the optional attention."""

    def __init__(self, config: EfficientUNetConfig, level: int, *, rngs: nnx.Rngs):
        dtype, channels = jnp.dtype(config.dtype), config.channels[level]
        self.combine = CombineEmbeddings(config.width, channels, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [
                ResNetBlock(channels, channels, embedding_width=config.width, dtype=dtype, rngs=rngs)
                for _ in range(config.num_res_blocks[level])
            ]
        )
        self.attention = level_attention(config, level, rngs=rngs)

    def __call__(self, x: Array, embedding: Array, text: Array, mask: Array) -> Array:
        """Keeps the shape (N, H, W, channels of the level)."""
        x = self.combine(x, embedding)
        for block in self.blocks:
            x = block(x, embedding)
        return x if self.attention is None else self.attention(x, text, mask)


class DBlock(nnx.Module):
    """Downsamples first, so that all else is done at half the side (figure A.28)."""

    def __init__(self, config: EfficientUNetConfig, inputs: int, level: int, *, rngs: nnx.Rngs):
        self.conv = conv3x3(
            inputs, config.channels[level], stride=2, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
        self.stack = Stack(config, level, rngs=rngs)

    def __call__(self, x: Array, embedding: Array, text: Array, mask: Array) -> Array:
        """Maps x (N, H, W, inputs) → (N, H/2, W/2, channels of the level)."""
        return self.stack(self.conv(x), embedding, text, mask)


class UBlock(nnx.Module):
    """Upsamples last (figure A.29); the skip of its level is added on entry, both scaled by 1/√2."""

    def __init__(self, config: EfficientUNetConfig, outputs: int, level: int, *, rngs: nnx.Rngs):
        self.stack = Stack(config, level, rngs=rngs)
        self.conv = conv3x3(config.channels[level], outputs, dtype=jnp.dtype(config.dtype), rngs=rngs)

    def __call__(self, x: Array, skip: Array, embedding: Array, text: Array, mask: Array) -> Array:
        """Maps x and skip (N, H, W, channels of the level) → (N, 2H, 2W, outputs)."""
        h = self.stack((x + skip) * 2**-0.5, embedding, text, mask)
        return self.conv(upsample_nearest(h))


class EfficientUNet(nnx.Module):
    """DBlocks down, UBlocks up, most parameters where the picture is small."""

    def __init__(self, config: EfficientUNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        first = config.channels[0]
        self.conditioning = Conditioning(
            channels=first,
            width=config.width,
            text_width=config.text_width,
            pool_heads=max(1, config.width // config.head_channels),
            aug_level=config.low_res_channels > 0,
            dtype=dtype,
            rngs=rngs,
        )
        self.conv_in = conv3x3(config.channels_in, first, dtype=dtype, rngs=rngs)
        inputs = (first, *config.channels[:-1])
        levels = range(len(config.channels))
        self.down = nnx.List([DBlock(config, inputs[level], level, rngs=rngs) for level in levels])
        self.up = nnx.List([UBlock(config, inputs[level], level, rngs=rngs) for level in reversed(levels)])
        self.conv_out = conv3x3(first, config.channels_out, dtype=jnp.dtype("float32"), rngs=rngs, zero=True)

    def __call__(
        self,
        x_t: Float[Array, "batch height width channels"],
        time: Float[Array, " batch"],
        text: Float[Array, "batch length text_width"],
        mask: Bool[Array, "batch length"],
        *,
        low_res: Float[Array, "batch low_height low_width low_channels"] | None = None,
        aug_time: Float[Array, " batch"] | None = None,
    ) -> Float[Array, "batch height width channels"]:
        """The network's output, float32; arguments as in `UNet`.

        Both sides are divisible by patch_size × 2 to the number of levels.
        """
        embedding, tokens = self.conditioning(time, text, mask, aug_time)
        h = self.conv_in(to_patches(with_low_res(x_t, low_res), self.config.patch_size))
        first, skips = h, []
        for block in self.down:
            h = block(h, embedding, tokens, mask)
            skips.append(h)
        for up_block in self.up:
            h = up_block(h, skips.pop(), embedding, tokens, mask)
        output = self.conv_out((h + first) * 2**-0.5).astype(jnp.float32)
        return from_patches(output, self.config.patch_size)
