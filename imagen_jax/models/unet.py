"""The text-conditional ADM-style U-Net: Imagen's base network (arXiv 2205.11487, appendix F.1)."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from imagen_jax.models.execution import Execution
from imagen_jax.models.layers import ResNetBlock, conv3x3, from_patches, to_patches, with_low_res
from imagen_jax.models.levels import LevelsConfig
from imagen_jax.models.normalisation import GroupNorm
from imagen_jax.models.text_layers import Conditioning, TextAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(LevelsConfig):
    """Shape of the paper's base network."""

    KIND: ClassVar[str] = "unet"

    def make(self, rngs: nnx.Rngs) -> "UNet":
        """The network."""
        return UNet(self, rngs=rngs)


def make_conditioning(config: LevelsConfig, *, rngs: nnx.Rngs) -> Conditioning:
    """What makes the embedding and the text of the config's network."""
    return Conditioning(
        channels=config.channels[0],
        width=config.width,
        text_width=config.text_width,
        pool_heads=config.embedding_heads,
        aug_level=config.low_res_channels > 0,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


def make_attention(config: LevelsConfig, level: int, *, rngs: nnx.Rngs) -> TextAttention | None:
    """The attention that a level's blocks have, None where it has neither kind."""
    use_self, use_text = config.self_attention[level], config.text_attention[level]
    if not (use_self or use_text):
        return None
    return TextAttention(
        config.channels[level],
        head_channels=config.head_channels,
        text_width=config.width if use_text else None,
        self_attention=use_self,
        kind=config.attention,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


class Block(nnx.Module):
    """A residual block and, where the level has it, attention."""

    def __init__(self, res: nnx.Module, attention: nnx.Module | None):
        self.res, self.attention = res, attention

    def __call__(
        self, x: Array, embedding: Array, text: Array, mask: Array, skip: Array | None = None
    ) -> Array:
        """Maps x, and beside it the skip, (N, H, W, C) → (N, H, W, channels of the level)."""
        x = self.res(x, embedding, skip)
        return x if self.attention is None else self.attention(x, text, mask)


class UNet(nnx.Module):
    """ADM's U-Net (arXiv 2105.05233) with text: BigGAN resampling, scale-shift norm, concatenated skips.

    A relative that has other parts at the same places overrides the methods that make them.
    """

    def __init__(self, config: LevelsConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        first, last_level = config.channels[0], len(config.channels) - 1
        self.conditioning = self.make_conditioning(rngs)
        self.conv_in = conv3x3(config.channels_in, first, dtype=dtype, rngs=rngs)

        def block(inputs: int, level: int) -> Block:
            res = self.make_block(inputs, config.channels[level], rngs)
            return Block(res, self.make_attention(level, rngs))

        skips, x = [first], first
        down, downsamples = [], []
        for level, channels in enumerate(config.channels):
            blocks = []
            for _ in range(config.num_res_blocks[level]):
                blocks.append(block(x, level))
                x = channels
                skips.append(x)
            down.append(nnx.List(blocks))
            if level < last_level:
                downsamples.append(self.make_block(x, x, rngs, resample="down"))
                skips.append(x)
        self.down, self.downsamples = nnx.List(down), nnx.List(downsamples)
        self.mid1, self.mid2 = self.make_middle(x, rngs)
        up, upsamples = [], []
        for level in reversed(range(len(config.channels))):
            blocks = []
            for _ in range(config.num_res_blocks[level] + 1):
                blocks.append(block(x + skips.pop(), level))
                x = config.channels[level]
            up.append(nnx.List(blocks))
            if level > 0:
                upsamples.append(self.make_block(x, x, rngs, resample="up"))
        self.up, self.upsamples = nnx.List(up), nnx.List(upsamples)
        self.norm_out = self.make_norm_out(x)
        self.conv_out = conv3x3(x, config.channels_out, dtype=jnp.dtype("float32"), rngs=rngs, zero=True)

    @property
    def activation(self) -> Callable[[Array], Array]:
        """Before the last convolution."""
        return nnx.silu

    def make_conditioning(self, rngs: nnx.Rngs) -> nnx.Module:
        """What makes the embedding and the text."""
        return make_conditioning(self.config, rngs=rngs)

    def make_block(
        self, inputs: int, outputs: int, rngs: nnx.Rngs, *, resample: str | None = None
    ) -> ResNetBlock:
        """A residual block on the way down or up."""
        return ResNetBlock(
            inputs,
            outputs,
            embedding_width=self.config.width,
            resample=resample,
            dtype=jnp.dtype(self.config.dtype),
            rngs=rngs,
        )

    def make_attention(self, level: int, rngs: nnx.Rngs) -> nnx.Module | None:
        """The attention of a level's blocks; None: it has none."""
        return make_attention(self.config, level, rngs=rngs)

    def make_middle(self, channels: int, rngs: nnx.Rngs) -> tuple[Block, Block]:
        """The two blocks at the lowest level between the ways down and up."""
        outputs, last_level = self.config.channels[-1], len(self.config.channels) - 1
        first = Block(self.make_block(channels, outputs, rngs), self.make_attention(last_level, rngs))
        return first, Block(self.make_block(outputs, outputs, rngs), None)

    def make_norm_out(self, channels: int) -> GroupNorm:
        """The normalisation before the last convolution."""
        return GroupNorm(channels, dtype=jnp.dtype(self.config.dtype))

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
        skips = [h]
        for level, blocks in enumerate(self.down):
            for block in blocks:
                h = execution.run(block, h, *rest)  # (N, H / 2^level, W / 2^level, channels[level])
                skips.append(h)
            if level < len(self.downsamples):
                h = execution.run(self.downsamples[level], h, embedding)  # both sides halved
                skips.append(h)
        h = execution.run(self.mid2, execution.run(self.mid1, h, *rest), *rest)
        for level, blocks in enumerate(self.up):
            for block in blocks:
                h = execution.run(block, h, *rest, skips.pop())
            if level < len(self.upsamples):
                h = execution.run(self.upsamples[level], h, embedding)  # both sides doubled
        h = execution.run(self.norm_out, h)
        output = execution.in_float32().run(self.conv_out, self.activation(h))  # (N, H, W, channels_out)
        return from_patches(output.astype(jnp.float32), self.config.patch_size)
