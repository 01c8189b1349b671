"""The text-conditional ADM-style U-Net: Imagen's base network (arXiv 2205.11487, appendix F.1)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from imagen_jax.models.execution import Execution, Remat
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of an ADM-style U-Net. Tuples have one entry a level, from full resolution down by twos."""

    KIND: ClassVar[str] = "unet"
    channels: tuple[int, ...]  # channels of each level; Imagen base: 512, 1024, 1536, 2048
    num_res_blocks: tuple[int, ...]  # residual blocks of each level; Imagen base: 3
    self_attention: tuple[bool, ...]  # whether positions attend to each other at this level
    text_attention: tuple[bool, ...]  # whether positions attend to the text at this level
    text_width: int  # width of the text encoder's embeddings
    head_channels: int = 64  # channels of an attention head
    embedding_width: int | None = None  # width of the time and pooled text embedding; None: 4 × channels[0]
    low_res_channels: int = 0  # channels of the low-resolution input; 0: none, a base stage
    image_channels: int = 3
    patch_size: int = (
        1  # pixels; side of the squares that become channels before the first level (2301.11093, 3.2)
    )
    dtype: str = "float32"  # of the computation: "float32" or "bfloat16"; parameters are float32
    remat: Remat = Remat.NONE  # what the backward pass computes again; memory against time, same numbers
    scan: bool = False  # one compiled body for equal blocks in a row; compile time and memory against copies

    def __post_init__(self) -> None:
        for name in ("channels", "num_res_blocks", "self_attention", "text_attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # configs and JSON give lists
        levels = len(self.channels)
        if not levels or min(self.channels) < 1 or self.channels[0] % 2:
            raise ValueError(f"channels must be positive, the first even, got {self.channels}")
        for name in ("text_width", "head_channels", "image_channels", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_res_blocks", "self_attention", "text_attention"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} needs one entry for each of {levels} levels, got {getattr(self, name)}"
                )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")

    @property
    def side_multiple(self) -> int:
        """Pixels; both sides of a picture are multiples of it."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    @property
    def channels_in(self) -> int:
        """Channels that the first convolution sees."""
        return (self.image_channels + self.low_res_channels) * self.patch_size**2

    @property
    def channels_out(self) -> int:
        """Channels that the last convolution gives."""
        return self.image_channels * self.patch_size**2

    def execution(self, mesh: Mesh | None) -> Execution:
        """How the blocks are run, on parameters that lie on `mesh`."""
        return Execution(mesh=mesh, remat=self.remat, scan=self.scan, dtype=jnp.dtype(self.dtype))

    @property
    def width(self) -> int:
        """Width of the embedding."""
        return self.embedding_width or 4 * self.channels[0]


def level_attention(config: UNetConfig, level: int, *, rngs: nnx.Rngs) -> TextAttention | None:
    """The attention that a level's blocks have, None where it has neither kind."""
    use_self, use_text = config.self_attention[level], config.text_attention[level]
    if not (use_self or use_text):
        return None
    return TextAttention(
        config.channels[level],
        head_channels=config.head_channels,
        text_width=config.width if use_text else None,
        self_attention=use_self,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


class Block(nnx.Module):
    """A residual block and, where the level has it, attention."""

    def __init__(self, config: UNetConfig, inputs: int, level: int, *, attend: bool = True, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        channels = config.channels[level]
        self.res = ResNetBlock(inputs, channels, embedding_width=config.width, dtype=dtype, rngs=rngs)
        self.attention = level_attention(config, level, rngs=rngs) if attend else None

    def __call__(
        self, x: Array, embedding: Array, text: Array, mask: Array, skip: Array | None = None
    ) -> Array:
        """Maps x, and beside it the skip, (N, H, W, C) → (N, H, W, channels of the level)."""
        x = self.res(x if skip is None else jnp.concatenate([x, skip], axis=-1), embedding)
        return x if self.attention is None else self.attention(x, text, mask)


class UNet(nnx.Module):
    """ADM's U-Net (arXiv 2105.05233) with text: BigGAN resampling, scale-shift norm, concatenated skips."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        first, last_level = config.channels[0], len(config.channels) - 1
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

        def resample(channels: int, how: str) -> ResNetBlock:
            return ResNetBlock(
                channels, channels, embedding_width=config.width, resample=how, dtype=dtype, rngs=rngs
            )

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
        self.mid1 = Block(config, x, last_level, rngs=rngs)
        self.mid2 = Block(config, x, last_level, attend=False, rngs=rngs)
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
        self.norm_out = GroupNorm(x, dtype=dtype)
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
    ) -> Float[Array, "batch height width channels"]:
        """The network's output, float32; what it means is the stage's prediction type.

        Args:
          x_t: noisy pictures; both sides divisible by patch_size × 2 to the number of levels minus one.
          time: noise level in [0, 1000] (`diffusion.process.time_condition`).
          text: text embeddings.
          mask: True for real tokens.
          low_res: the low-resolution pictures of a super-resolution network.
          aug_time: their noise level in [0, 1000].
          mesh: where the parameters lie by the rules of `parallel.mesh`; None: they lie whole.
        """
        execution = self.config.execution(mesh)
        embedding, tokens = execution.run(self.conditioning, time, text, mask, aug_time)
        rest = (embedding, tokens, mask)
        h = execution.run(self.conv_in, to_patches(with_low_res(x_t, low_res), self.config.patch_size))
        skips = [h]
        for level, blocks in enumerate(self.down):
            h, outputs = execution.chain(list(blocks), h, *rest)
            skips += outputs
            if level < len(self.downsamples):
                h = execution.run(self.downsamples[level], h, embedding)
                skips.append(h)
        h = execution.run(self.mid2, execution.run(self.mid1, h, *rest), *rest)
        for level, blocks in enumerate(self.up):
            each = [skips.pop() for _ in blocks]
            h, _ = execution.chain(list(blocks), h, *rest, each=each)
            if level < len(self.upsamples):
                h = execution.run(self.upsamples[level], h, embedding)
        h = execution.run(self.norm_out, h)
        output = dataclasses.replace(execution, dtype=jnp.dtype("float32")).run(self.conv_out, nnx.silu(h))
        return from_patches(output.astype(jnp.float32), self.config.patch_size)
