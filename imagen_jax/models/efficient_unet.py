"""The Efficient U-Net of Imagen's super-resolution stages (arXiv 2205.11487, appendices B.1, F.2 and F.3)."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from imagen_jax.models.execution import Execution
from imagen_jax.models.layers import Linear, ResNetBlock, conv3x3, from_patches, to_patches, with_low_res
from imagen_jax.models.levels import LevelsConfig
from imagen_jax.models.normalisation import add_everywhere
from imagen_jax.models.unet import make_attention, make_conditioning


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientUNetConfig(LevelsConfig):
    """Shape of an Efficient U-Net. Every block has stride 2: level i works at 1 / 2^(i+1) of the side."""

    KIND: ClassVar[str] = "efficient_unet"
    low_res_channels: int = 3  # the network is made for super-resolution; 0 makes a base network of it
    # Levels at which every residual block of the UBlock sees, by concatenation, what its twin in the DBlock
    # put out. At the others the DBlock's output is added once, on entry. () is none.
    concat_skips: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "concat_skips", tuple(self.concat_skips))
        if self.concat_skips and len(self.concat_skips) != len(self.channels):
            raise ValueError(
                f"concat_skips needs one entry for each of {len(self.channels)} levels or none, "
                f"got {self.concat_skips}"
            )

    def concatenates(self, level: int) -> bool:
        """Whether the level's UBlock concatenates its skips."""
        return bool(self.concat_skips) and self.concat_skips[level]

    @property
    def side_multiple(self) -> int:
        """Pixels; both sides of a picture are multiples of it."""
        return self.patch_size * 2 ** len(self.channels)

    def make(self, rngs: nnx.Rngs) -> "EfficientUNet":
        """The network."""
        return EfficientUNet(self, rngs=rngs)


class CombineEmbeddings(nnx.Module):
    """Adds the projected time and pooled-text embedding to every position."""

    def __init__(self, width: int, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.project = Linear(width, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, embedding: Array) -> Array:
        """Adds the embedding's projection to x."""
        return add_everywhere(x, self.project(nnx.silu(embedding)))


class SkipBlock(nnx.Module):
    """A residual block that sees a skip beside its input."""

    def __init__(self, config: EfficientUNetConfig, channels: int, *, rngs: nnx.Rngs):
        self.res = ResNetBlock(
            2 * channels, channels, embedding_width=config.width, dtype=jnp.dtype(config.dtype), rngs=rngs
        )

    def __call__(self, x: Array, embedding: Array, skip: Array) -> Array:
        """Maps x and skip (N, H, W, C) → (N, H, W, C)."""
        return self.res(x, embedding, skip)


class Stack(nnx.Module):
    """What DBlock and UBlock share: the embedding, the residual blocks and the optional attention."""

    def __init__(self, config: EfficientUNetConfig, level: int, *, concatenate: bool = False, rngs: nnx.Rngs):
        dtype, channels = jnp.dtype(config.dtype), config.channels[level]
        self.combine = CombineEmbeddings(config.width, channels, dtype=dtype, rngs=rngs)

        def block() -> nnx.Module:
            if concatenate:
                return SkipBlock(config, channels, rngs=rngs)
            return ResNetBlock(channels, channels, embedding_width=config.width, dtype=dtype, rngs=rngs)

        self.blocks = nnx.List([block() for _ in range(config.num_res_blocks[level])])
        self.attention = make_attention(config, level, rngs=rngs)

    def __call__(
        self,
        x: Array,
        embedding: Array,
        text: Array,
        mask: Array,
        *,
        skips: Sequence[Array] | None = None,
    ) -> tuple[Array, list[Array]]:
        """The stack's output and its residual blocks', (N, H, W, channels).

        `skips`: what concatenating blocks see beside x, the last one's first.
        """
        execution = Execution.current()
        x = execution.run(self.combine, x, embedding)
        outputs = []
        for number, block in enumerate(self.blocks):
            x = execution.run(block, x, embedding, *(() if skips is None else (skips[-1 - number],)))
            outputs.append(x)
        if self.attention is not None:
            x = execution.run(self.attention, x, text, mask)
        return x, outputs


class DBlock(nnx.Module):
    """Downsamples first, so that all else is done at half the side (figure A.28)."""

    def __init__(self, config: EfficientUNetConfig, inputs: int, level: int, *, rngs: nnx.Rngs):
        self.conv = conv3x3(
            inputs, config.channels[level], stride=2, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
        self.stack = Stack(config, level, rngs=rngs)

    def __call__(self, x: Array, embedding: Array, text: Array, mask: Array) -> tuple[Array, list[Array]]:
        """Maps x (N, H, W, inputs) → the output and the residual blocks', (N, H/2, W/2, channels)."""
        return self.stack(Execution.current().run(self.conv, x), embedding, text, mask)


class UBlock(nnx.Module):
    """Upsamples last (figure A.29); the skip of its level is added on entry, both scaled by 1/√2.

    Where the config says so, each residual block sees one of the level's skips instead.
    """

    def __init__(self, config: EfficientUNetConfig, outputs: int, level: int, *, rngs: nnx.Rngs):
        self.concatenate = config.concatenates(level)
        self.stack = Stack(config, level, concatenate=self.concatenate, rngs=rngs)
        dtype = jnp.dtype(config.dtype)
        self.conv = conv3x3(config.channels[level], outputs, upsample=True, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Array,
        skip: Array,
        skips: Sequence[Array],
        embedding: Array,
        text: Array,
        mask: Array,
    ) -> Array:
        """Maps x and what its DBlock put out, (N, H, W, channels of the level), → (N, 2H, 2W, outputs)."""
        if self.concatenate:
            h, _ = self.stack(x, embedding, text, mask, skips=skips)
        else:
            h, _ = self.stack((x + skip) * 2**-0.5, embedding, text, mask)
        return Execution.current().run(self.conv, h)  # both sides doubled


class EfficientUNet(nnx.Module):
    """DBlocks down, UBlocks up, most parameters where the picture is small."""

    def __init__(self, config: EfficientUNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        first = config.channels[0]
        self.conditioning = make_conditioning(config, rngs=rngs)
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
    ) -> Float[Array, "batch height width outputs"]:
        """See `models.network.Network`."""
        execution = Execution.current()
        embedding, tokens = execution.run(self.conditioning, time, text, mask, aug_time)
        rest = (embedding, tokens, mask)
        patches = to_patches(with_low_res(x_t, low_res), self.config.patch_size)  # (N, H, W, channels_in)
        h = execution.run_first(self.conv_in, patches)  # (N, H, W, channels[0])
        first, skips = h, []
        for block in self.down:
            h, outputs = block(h, *rest)  # both sides halved
            skips.append((h, outputs))
        for up_block in self.up:
            h = up_block(h, *skips.pop(), *rest)  # both sides doubled
        h = (h + first) * 2**-0.5
        output = execution.in_float32().run(self.conv_out, h)  # (N, H, W, channels_out)
        return from_patches(output.astype(jnp.float32), self.config.patch_size)
