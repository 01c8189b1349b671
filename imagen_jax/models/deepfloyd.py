"""DeepFloyd IF's U-Nets.

DeepFloyd IF is a replica of Imagen's base and first super-resolution stage with published weights. Its networks
are ADM-style U-Nets as the paper's; they differ in how text enters (never masked, pooled with a class token,
normalised by groups over all its tokens), in the activation, and in scaled residual sums.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from imagen_jax.limits import MAX_CHANNELS, check_numbers
from imagen_jax.models.attention import attend, split_heads
from imagen_jax.models.layers import ResNetBlock, TimeEmbedding
from imagen_jax.models.levels import LevelsConfig, check_heads
from imagen_jax.models.network import Activation
from imagen_jax.models.normalisation import GroupNorm
from imagen_jax.models.unet import Block, UNet

_POSITIVE = ("text_channels", "pool_heads", "norm_groups", "text_norm_groups")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepFloydUNetConfig(LevelsConfig):
    """Shape of a DeepFloyd network. The text's width is that of T5; `text_channels` that in which it is seen."""

    KIND: ClassVar[str] = "deepfloyd_unet"
    SEES_MASK: ClassVar[bool] = False
    RETIRED: ClassVar[dict[str, Any]] = {"scan": 0}
    text_channels: int  # width to which the text is projected; every block attends to that
    pool_heads: int = 64  # heads of the attention that pools the text
    norm_groups: int = 32  # groups of every GroupNorm over a picture
    text_norm_groups: int = 32  # groups of the GroupNorm over the text's tokens
    mid_self_attention: bool = True  # whether positions attend to each other in the middle block
    activation: Activation = Activation.GELU  # of blocks and of the time embedding
    embedding_activation: Activation | None = None  # once on the summed embedding; None: none
    skip_time_act: bool = (
        False  # whether blocks take the embedding as it is, without an activation of their own
    )
    block_scale: float = 1.0  # by which the residual sums of blocks on the way down and up are divided
    mid_scale: float = 1.0  # by which those of the middle block are

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_numbers(self, **dict.fromkeys(_POSITIVE, MAX_CHANNELS))
        if self.text_channels % self.text_norm_groups:
            raise ValueError(
                f"text_norm_groups {self.text_norm_groups} does not divide text_channels {self.text_channels}"
            )
        for name in ("block_scale", "mid_scale"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        super().__post_init__()

    def _check_buildable(self) -> None:
        """Refuses what the layers refuse; the middle attends to the text, whatever the levels do."""
        for level, channels in enumerate(self.channels):
            if self.text_attention[level] or level == len(self.channels) - 1:
                check_heads(self.head_channels, channels, level)
            if channels % self.norm_groups:
                raise ValueError(
                    f"norm_groups {self.norm_groups} does not divide {channels} channels of level {level}"
                )
        if self.text_width % self.pool_heads:
            raise ValueError(
                f"{self.pool_heads} heads, which pool the text, do not divide text_width {self.text_width}"
            )

    @classmethod
    def from_former(cls, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The fields of a config that has these networks as an option of the kind "unet"; None: it does not."""
        options = values.get("deepfloyd")
        if values.get("kind") != "unet" or not isinstance(options, Mapping):
            return None
        return {name: value for name, value in values.items() if name != "deepfloyd"} | {
            **options,
            "kind": cls.KIND,
        }

    def make(self, rngs: nnx.Rngs) -> "DeepFloydUNet":
        """The network."""
        return DeepFloydUNet(self, rngs=rngs)


class DeepFloydAttention(nnx.Module):
    """Attention over the text's tokens and, unless only they are wanted, the picture's positions.

    Text keys come first. The text is normalised by groups of channels over all tokens, padding included.
    """

    def __init__(
        self,
        config: DeepFloydUNetConfig,
        channels: int,
        *,
        self_attention: bool,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(config.dtype)
        if channels % config.head_channels:
            raise ValueError(f"head_channels {config.head_channels} does not divide {channels} channels")

        def linear(inputs: int, *, zero: bool = False) -> nnx.Linear:
            init = nnx.initializers.zeros_init() if zero else nnx.initializers.lecun_normal()
            return nnx.Linear(inputs, channels, kernel_init=init, dtype=dtype, rngs=rngs)

        self.heads, self.kind = channels // config.head_channels, config.attention
        self.norm = GroupNorm(channels, groups=config.norm_groups, dtype=dtype)
        self.text_norm = GroupNorm(config.text_channels, groups=config.text_norm_groups, dtype=dtype)
        self.query = linear(channels)
        self.key = linear(channels) if self_attention else None
        self.value = linear(channels) if self_attention else None
        self.text_key = linear(config.text_channels)
        self.text_value = linear(config.text_channels)
        self.out = linear(channels, zero=True)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        text: Float[Array, "batch length text_channels"],
        mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch height width channels"]:
        """Residual attention; `mask` has no say, as in the published networks."""
        n, height, width, channels = x.shape
        text = self.text_norm(text[:, :, None, :])[:, :, 0, :]
        h = self.norm(x).reshape(n, height * width, channels)
        keys, values = self.text_key(text), self.text_value(text)
        if self.key is not None and self.value is not None:
            keys = jnp.concatenate([keys, self.key(h)], axis=1)
            values = jnp.concatenate([values, self.value(h)], axis=1)
        seen = jnp.ones(keys.shape[:2], bool)
        attended = attend(self.query(h), keys, values, seen, heads=self.heads, kind=self.kind)
        return x + self.out(attended).reshape(x.shape)


class TextPooling(nnx.Module):
    """The text as one vector: a class token, the tokens' mean and a learned offset, attends to itself and them."""

    def __init__(self, text_width: int, width: int, *, heads: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        if text_width % heads:
            raise ValueError(f"{heads} pooling heads do not divide the text's width {text_width}")
        self.heads = heads
        self.norm = nnx.LayerNorm(text_width, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)
        offset = jax.random.normal(rngs.params(), (1, text_width)) * text_width**-0.5
        self.positional_embedding = nnx.Param(offset)
        self.query = nnx.Linear(text_width, text_width, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(text_width, text_width, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(text_width, text_width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(text_width, width, dtype=dtype, rngs=rngs)
        self.out_norm = nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)

    def __call__(self, text: Float[Array, "batch length text_width"]) -> Float[Array, "batch width"]:
        """Pools all tokens, padding included."""
        tokens = self.norm(text)
        mean = tokens.mean(axis=1, keepdims=True)
        token = mean + self.positional_embedding[...][None].astype(tokens.dtype)  # (N, 1, text width)
        both = jnp.concatenate([token, tokens], axis=1)
        pooled = jax.nn.dot_product_attention(
            split_heads(self.query(token), self.heads),
            split_heads(self.key(both), self.heads),
            split_heads(self.value(both), self.heads),
        )
        return self.out_norm(self.out(pooled.reshape(pooled.shape[0], -1)))


class DeepFloydConditioning(nnx.Module):
    """The embedding (time, pooled text and, in super-resolution, the input's noise level) and the text."""

    def __init__(self, config: DeepFloydUNetConfig, *, rngs: nnx.Rngs):
        dtype, width, text_width = jnp.dtype(config.dtype), config.width, config.text_width
        act = config.activation.function

        def level() -> TimeEmbedding:
            return TimeEmbedding(config.channels[0], width, activation=act, dtype=dtype, rngs=rngs)

        self.activation = config.embedding_activation
        self.time = level()
        self.aug_level = level() if config.low_res_channels else None
        self.pool = TextPooling(text_width, width, heads=config.pool_heads, dtype=dtype, rngs=rngs)
        self.project = nnx.Linear(text_width, config.text_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        time: Float[Array, " batch"],
        text: Float[Array, "batch length text_width"],
        mask: Bool[Array, "batch length"],
        aug_time: Float[Array, " batch"] | None,
    ) -> tuple[Float[Array, "batch width"], Float[Array, "batch length text_channels"]]:
        """The embedding and the projected text; `time` and `aug_time` are timesteps, `mask` has no say."""
        embedding = self.time(time)
        if self.aug_level is not None:
            if aug_time is None:
                raise ValueError("a super-resolution network needs aug_time, the level of its low-res input")
            embedding = embedding + self.aug_level(aug_time)
        embedding = embedding + self.pool(text)
        if self.activation is not None:
            embedding = self.activation.function(embedding)
        return embedding, self.project(text)


class DeepFloydUNet(UNet):
    """The paper's U-Net with DeepFloyd's parts in its places."""

    config: DeepFloydUNetConfig

    @property
    def activation(self) -> Callable[[Array], Array]:
        """Before the last convolution."""
        return self.config.activation.function

    def make_conditioning(self, rngs: nnx.Rngs) -> DeepFloydConditioning:
        """What makes the embedding and the text."""
        return DeepFloydConditioning(self.config, rngs=rngs)

    def make_block(
        self,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
        *,
        resample: str | None = None,
        scale: float | None = None,
    ) -> ResNetBlock:
        """A residual block; `scale` divides its sum, by default as on the way down or up."""
        config = self.config
        return ResNetBlock(
            inputs,
            outputs,
            embedding_width=config.width,
            resample=resample,
            activation=config.activation.function,
            activate_embedding=not config.skip_time_act,
            norm_groups=config.norm_groups,
            scale=config.block_scale if scale is None else scale,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )

    def make_attention(self, level: int, rngs: nnx.Rngs) -> DeepFloydAttention | None:
        """The attention of a level's blocks: all of it hangs on the text's."""
        config = self.config
        if not config.text_attention[level]:
            return None
        self_attention = config.self_attention[level]
        return DeepFloydAttention(config, config.channels[level], self_attention=self_attention, rngs=rngs)

    def make_middle(self, channels: int, rngs: nnx.Rngs) -> tuple[Block, Block]:
        """The middle always attends to the text, and its sums have a divisor of their own."""
        config, outputs = self.config, self.config.channels[-1]
        res = self.make_block(channels, outputs, rngs, scale=config.mid_scale)
        attention = DeepFloydAttention(config, outputs, self_attention=config.mid_self_attention, rngs=rngs)
        return Block(res, attention), Block(
            self.make_block(outputs, outputs, rngs, scale=config.mid_scale), None
        )

    def make_norm_out(self, channels: int) -> GroupNorm:
        """The normalisation before the last convolution."""
        return GroupNorm(channels, groups=self.config.norm_groups, dtype=jnp.dtype(self.config.dtype))
