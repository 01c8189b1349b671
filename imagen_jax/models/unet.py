"""The text-conditional ADM-style U-Net: Imagen's base network (arXiv 2205.11487, appendix F.1)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from imagen_jax.models.configs import UNetConfig
from imagen_jax.models.deepfloyd import DeepFloydAttention, DeepFloydConditioning
from imagen_jax.models.execution import Execution
from imagen_jax.models.layers import (
    Conditioning,
    GroupNorm,
    ResNetBlock,
    TextAttention,
    conv3x3,
    from_patches,
    to_patches,
    with_low_res,
)


def level_attention(
    config: UNetConfig, level: int, *, middle: bool = False, rngs: nnx.Rngs
) -> TextAttention | DeepFloydAttention | None:
    """The attention that a level's blocks have, None where it has neither kind; `middle`: that of the middle."""
    if (options := config.deepfloyd) is not None:
        if not (middle or config.text_attention[level]):
            return None
        return DeepFloydAttention(
            config.channels[level],
            options,
            head_channels=config.head_channels,
            self_attention=options.mid_self_attention if middle else config.self_attention[level],
            kind=config.attention,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
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


def residual_block(
    config: UNetConfig,
    inputs: int,
    outputs: int,
    *,
    resample: str | None = None,
    middle: bool = False,
    rngs: nnx.Rngs,
) -> ResNetBlock:
    """A residual block as the config has it; `middle`: one of the middle block."""
    parts: dict[str, Any] = {}
    if (options := config.deepfloyd) is not None:
        parts = {
            "activation": options.activation.function,
            "activate_embedding": not options.skip_time_act,
            "norm_groups": options.norm_groups,
            "scale": options.mid_scale if middle else options.block_scale,
        }
    return ResNetBlock(
        inputs,
        outputs,
        embedding_width=config.width,
        resample=resample,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
        **parts,
    )


def make_conditioning(config: UNetConfig, *, rngs: nnx.Rngs) -> Conditioning | DeepFloydConditioning:
    """What makes the embedding and the text of the config's network."""
    common: dict[str, Any] = {
        "channels": config.channels[0],
        "width": config.width,
        "text_width": config.text_width,
        "aug_level": config.low_res_channels > 0,
        "dtype": jnp.dtype(config.dtype),
        "rngs": rngs,
    }
    if config.deepfloyd is not None:
        return DeepFloydConditioning(config.deepfloyd, **common)
    return Conditioning(pool_heads=max(1, config.width // config.head_channels), **common)


class Block(nnx.Module):
    """A residual block and, where the level has it, attention."""

    def __init__(
        self,
        config: UNetConfig,
        inputs: int,
        level: int,
        *,
        attend: bool = True,
        middle: bool = False,
        rngs: nnx.Rngs,
    ):
        self.res = residual_block(config, inputs, config.channels[level], middle=middle, rngs=rngs)
        self.attention = level_attention(config, level, middle=middle, rngs=rngs) if attend else None

    def __call__(
        self,
        x: Array,
        embedding: Array,
        text: Array,
        mask: Array,
        skip: Array | None = None,
        *,
        mesh: Mesh | None = None,
    ) -> Array:
        """Maps x, and beside it the skip, (N, H, W, C) → (N, H, W, channels of the level)."""
        x = self.res(x, embedding, skip)
        return x if self.attention is None else self.attention(x, text, mask, mesh=mesh)


class UNet(nnx.Module):
    """ADM's U-Net (arXiv 2105.05233) with text: BigGAN resampling, scale-shift norm, concatenated skips."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        first, last_level = config.channels[0], len(config.channels) - 1
        self.conditioning = make_conditioning(config, rngs=rngs)
        self.conv_in = conv3x3(config.channels_in, first, dtype=dtype, rngs=rngs)

        def resample(channels: int, how: str) -> ResNetBlock:
            return residual_block(config, channels, channels, resample=how, rngs=rngs)

        skips, x = [first], first
        down, downsamples = [], []
        for level, channels in enumerate(config.channels):
            blocks = []
            for _ in range(config.num_res_blocks[level]):
                blocks.append(Block(config, x, level, rngs=rngs))
                x = channels
                skips.append(x)
            down.append(nnx.List(blocks))
            if level < last_level:
                downsamples.append(resample(x, "down"))
                skips.append(x)
        self.down, self.downsamples = nnx.List(down), nnx.List(downsamples)
        self.mid1 = Block(config, x, last_level, middle=True, rngs=rngs)
        self.mid2 = Block(config, x, last_level, attend=False, middle=True, rngs=rngs)
        up, upsamples = [], []
        for level in reversed(range(len(config.channels))):
            blocks = []
            for _ in range(config.num_res_blocks[level] + 1):
                blocks.append(Block(config, x + skips.pop(), level, rngs=rngs))
                x = config.channels[level]
            up.append(nnx.List(blocks))
            if level > 0:
                upsamples.append(resample(x, "up"))
        self.up, self.upsamples = nnx.List(up), nnx.List(upsamples)
        options = config.deepfloyd
        self.norm_out = GroupNorm(x, groups=None if options is None else options.norm_groups, dtype=dtype)
        self.conv_out = conv3x3(x, config.channels_out, dtype=jnp.dtype("float32"), rngs=rngs, zero=True)

    def __call__(
        self,
        x_t: Float[Array, "batch height width channels"],
        time: Float[Array, " batch"],
        text: Float[Array, "batch length text_width"],
        mask: Bool[Array, "batch length"],
        *,
        low_res: Float[Array, "batch low_height low_width low_channels"] | None = None,
        aug_time: Float[Array, " batch"] | None = None,
        mesh: Mesh | None = None,
    ) -> Float[Array, "batch height width outputs"]:
        """The network's output, float32; what it means is the stage's prediction type.

        With a learned variance it has twice the picture's channels: the prediction's, then the variance's.

        Args:
          x_t: noisy pictures; both sides divisible by patch_size × 2 to the number of levels minus one.
          time: noise level in [0, 1000] (`models.stage.StageNetwork`).
          text: text embeddings.
          mask: True for real tokens.
          low_res: the low-resolution pictures of a super-resolution network.
          aug_time: their noise level in [0, 1000].
          mesh: where the parameters lie by the rules of `parallel.mesh`; None: they lie whole.
        """
        execution = Execution.of(self.config, mesh)
        embedding, tokens = execution.run(self.conditioning, time, text, mask, aug_time)
        rest = (embedding, tokens, mask)
        h = execution.run_first(self.conv_in, to_patches(with_low_res(x_t, low_res), self.config.patch_size))
        skips = [h]
        for level, blocks in enumerate(self.down):
            for block in blocks:
                h = execution.run(block, h, *rest, mesh=mesh)
                skips.append(h)
            if level < len(self.downsamples):
                h = execution.run(self.downsamples[level], h, embedding)
                skips.append(h)
        h = execution.run(self.mid2, execution.run(self.mid1, h, *rest, mesh=mesh), *rest)
        for level, blocks in enumerate(self.up):
            for block in blocks:
                h = execution.run(block, h, *rest, skips.pop(), mesh=mesh)
            if level < len(self.upsamples):
                h = execution.run(self.upsamples[level], h, embedding)
        h = execution.run(self.norm_out, h)
        options = self.config.deepfloyd
        activation = nnx.silu if options is None else options.activation.function
        output = dataclasses.replace(execution, dtype=jnp.dtype("float32")).run(self.conv_out, activation(h))
        return from_patches(output.astype(jnp.float32), self.config.patch_size)
