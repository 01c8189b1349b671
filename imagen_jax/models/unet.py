"""The text-conditional ADM-style U-Net: Imagen's base network (arXiv 2205.11487, appendix F.1)."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from imagen_jax.models.attention import Attention
from imagen_jax.models.deepfloyd import DeepFloydAttention, DeepFloydConditioning, DeepFloydOptions
from imagen_jax.models.execution import Execution, Gather, Remat
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
    image_channels: int = 3  # of the pictures: red, green, blue
    patch_size: int = (
        1  # pixels; side of the squares that become channels before the first level (2301.11093, 3.2)
    )
    dtype: str = "float32"  # of the computation: "float32" or "bfloat16"
    param_dtype: str = "float32"  # of parameters in memory; "bfloat16" halves them, for drawing pictures only
    attention: Attention = Attention.AUTO  # kernels on TPU, plain XLA elsewhere, unless told otherwise
    remat: Remat = Remat.NONE  # what the backward pass computes again; memory against time, same numbers
    gather: Gather = Gather.BLOCK  # when weights that chips share are made whole; memory against traffic
    scan: int = 0  # equal blocks in a row from which on they are one loop; 0: never
    learned_variance: bool = False  # beside each channel's output another, which says how much noise to add
    deepfloyd: DeepFloydOptions | None = None  # parts as DeepFloyd IF has them; None: as the paper has them

    def __post_init__(self) -> None:
        for name in ("channels", "num_res_blocks", "self_attention", "text_attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # configs and JSON give lists
        levels = len(self.channels)
        if not levels or min(self.channels) < 1 or self.channels[0] % 2:
            raise ValueError(f"channels must be positive, the first even, got {self.channels}")
        if self.scan < 0 or self.scan == 1:
            raise ValueError(f"scan must be 0 or at least 2 blocks, got {self.scan}")
        for name in ("text_width", "head_channels", "image_channels", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_res_blocks", "self_attention", "text_attention"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} needs one entry for each of {levels} levels, got {getattr(self, name)}"
                )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"{name} must be float32 or bfloat16, got {getattr(self, name)!r}")

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
        return self.image_channels * (2 if self.learned_variance else 1) * self.patch_size**2

    def execution(self, mesh: Mesh | None) -> Execution:
        """How the blocks are run, on parameters that lie on `mesh`."""
        return Execution(
            mesh=mesh, gather=self.gather, remat=self.remat, scan=self.scan, dtype=jnp.dtype(self.dtype)
        )

    @property
    def width(self) -> int:
        """Width of the embedding."""
        return self.embedding_width or 4 * self.channels[0]


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
        execution = self.config.execution(mesh)
        embedding, tokens = execution.run(self.conditioning, time, text, mask, aug_time)
        rest = (embedding, tokens, mask)
        h = execution.run_first(self.conv_in, to_patches(with_low_res(x_t, low_res), self.config.patch_size))
        skips = [h]
        for level, blocks in enumerate(self.down):
            h, outputs = execution.chain(list(blocks), h, *rest, keep=True, mesh=mesh)
            skips += list(outputs)
            if level < len(self.downsamples):
                h = execution.run(self.downsamples[level], h, embedding)
                skips.append(h)
        h = execution.run(self.mid2, execution.run(self.mid1, h, *rest, mesh=mesh), *rest)
        for level, blocks in enumerate(self.up):
            twins = skips[len(skips) - len(blocks) :]
            h, _ = execution.chain(list(blocks), h, *rest, twins=twins, mesh=mesh)
            del skips[len(skips) - len(blocks) :]
            if level < len(self.upsamples):
                h = execution.run(self.upsamples[level], h, embedding)
        h = execution.run(self.norm_out, h)
        options = self.config.deepfloyd
        activation = nnx.silu if options is None else options.activation.function
        output = dataclasses.replace(execution, dtype=jnp.dtype("float32")).run(self.conv_out, activation(h))
        return from_patches(output.astype(jnp.float32), self.config.patch_size)
