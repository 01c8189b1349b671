"""What DeepFloyd IF's U-Nets have in place of the paper's parts: an option of `models.unet.UNet`.

DeepFloyd IF is a replica of Imagen's base and first super-resolution stage with published weights. Its networks
are ADM-style U-Nets as the paper's; they differ in how text enters (never masked, pooled with a class token,
normalised by groups over all its tokens), in the activation, and in scaled residual sums.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from imagen_jax.models.attention import attend, split_heads
from imagen_jax.models.configs import Attention, DeepFloydOptions
from imagen_jax.models.layers import GroupNorm, TimeEmbedding


class DeepFloydAttention(nnx.Module):
    """Attention over the text's tokens and, unless only they are wanted, the picture's positions.

    Text keys come first. The text is normalised by groups of channels over all tokens, padding included.
    """

    def __init__(
        self,
        channels: int,
        options: DeepFloydOptions,
        *,
        head_channels: int,
        self_attention: bool,
        kind: Attention = Attention.XLA,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        if channels % head_channels:
            raise ValueError(f"head_channels {head_channels} does not divide {channels} channels")

        def linear(inputs: int, *, zero: bool = False) -> nnx.Linear:
            init = nnx.initializers.zeros_init() if zero else nnx.initializers.lecun_normal()
            return nnx.Linear(inputs, channels, kernel_init=init, dtype=dtype, rngs=rngs)

        self.heads, self.kind = channels // head_channels, kind
        self.norm = GroupNorm(channels, groups=options.norm_groups, dtype=dtype)
        self.text_norm = GroupNorm(options.text_channels, groups=options.text_norm_groups, dtype=dtype)
        self.query = linear(channels)
        self.key = linear(channels) if self_attention else None
        self.value = linear(channels) if self_attention else None
        self.text_key = linear(options.text_channels)
        self.text_value = linear(options.text_channels)
        self.out = linear(channels, zero=True)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        text: Float[Array, "batch length text_channels"],
        mask: Bool[Array, "batch length"],
        *,
        mesh: Mesh | None = None,
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
        attended = attend(self.query(h), keys, values, seen, heads=self.heads, kind=self.kind, mesh=mesh)
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
        token = mean + self.positional_embedding[...].astype(tokens.dtype)
        both = jnp.concatenate([token, tokens], axis=1)
        pooled = jax.nn.dot_product_attention(
            split_heads(self.query(token), self.heads),
            split_heads(self.key(both), self.heads),
            split_heads(self.value(both), self.heads),
        )
        return self.out_norm(self.out(pooled.reshape(pooled.shape[0], -1)))


class DeepFloydConditioning(nnx.Module):
    """The embedding (time, pooled text and, in super-resolution, the input's noise level) and the text."""

    def __init__(
        self,
        options: DeepFloydOptions,
        *,
        channels: int,
        width: int,
        text_width: int,
        aug_level: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        act = options.activation.function

        def level() -> TimeEmbedding:
            return TimeEmbedding(channels, width, activation=act, dtype=dtype, rngs=rngs)

        self.activation = options.embedding_activation
        self.time = level()
        self.aug_level = level() if aug_level else None
        self.pool = TextPooling(text_width, width, heads=options.pool_heads, dtype=dtype, rngs=rngs)
        self.project = nnx.Linear(text_width, options.text_channels, dtype=dtype, rngs=rngs)

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
