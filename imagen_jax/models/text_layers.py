"""How the paper's networks are told what to draw: text conditioning and attention (arXiv 2205.11487, 2.5 and D.3).

Parameters are float32; matrix products run in the configured dtype, normalisation statistics and softmax in float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from imagen_jax.models.attention import attend, split_heads
from imagen_jax.models.layers import Linear, TimeEmbedding, zeros_init
from imagen_jax.models.network import Attention
from imagen_jax.models.normalisation import GroupNorm


class TextConditioning(nnx.Module):
    """Normalises the text and pools it by attention (arXiv 2205.11487, section 2.5 and appendix D.3).

    Gives the sequence that the network attends to and the pooled vector that joins the time embedding.
    """

    def __init__(self, text_width: int, width: int, *, heads: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f"{heads} pooling heads do not divide the width {width}")
        self.heads = heads
        self.norm = nnx.LayerNorm(text_width, dtype=dtype, rngs=rngs)
        self.project = Linear(text_width, width, dtype=dtype, rngs=rngs)
        self.pool_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        # A key's bias would shift all logits of a query alike, which softmax takes away again.
        self.key = Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.value = Linear(width, width, dtype=dtype, rngs=rngs)
        self.out_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, text: Float[Array, "batch length text_width"], mask: Bool[Array, "batch length"]
    ) -> tuple[Float[Array, "batch length width"], Float[Array, "batch width"]]:
        """The projected sequence and the pooled vector; padding (mask False) enters neither."""
        tokens = self.project(self.norm(text))  # (N, L, D)
        normed = self.pool_norm(tokens)
        weights = mask.astype(normed.dtype)[..., None]
        mean = (normed * weights).sum(axis=1, keepdims=True) / jnp.maximum(
            weights.sum(axis=1, keepdims=True), 1
        )
        pooled = jax.nn.dot_product_attention(
            split_heads(self.query(mean), self.heads),  # (N, 1, heads, D / heads)
            split_heads(self.key(normed), self.heads),
            split_heads(self.value(normed), self.heads),
            mask=mask[:, None, None, :],
        )
        pooled = pooled.reshape(pooled.shape[0], -1)  # (N, D)
        return tokens, self.out(self.out_norm(pooled))


class TextAttention(nnx.Module):
    """Attention over the picture's positions, the text's tokens, or both at once.

    With both, text keys and values are concatenated to the self-attention's (arXiv 2205.11487, D.3.1). Text is
    normalised before its projection and masked.
    """

    def __init__(
        self,
        channels: int,
        *,
        head_channels: int,
        text_width: int | None,
        self_attention: bool,
        kind: Attention = Attention.XLA,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        if channels % head_channels:
            raise ValueError(f"head_channels {head_channels} does not divide {channels} channels")
        if text_width is None and not self_attention:
            raise ValueError("attention needs keys: text, positions or both")
        self.heads, self.kind = channels // head_channels, kind
        self.norm = GroupNorm(channels, dtype=dtype)
        self.query = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.key_value = Linear(channels, 2 * channels, dtype=dtype, rngs=rngs) if self_attention else None
        if text_width is None:
            self.text_norm = self.text_key_value = None
        else:
            self.text_norm = nnx.LayerNorm(text_width, dtype=dtype, rngs=rngs)
            self.text_key_value = Linear(text_width, 2 * channels, dtype=dtype, rngs=rngs)
        self.out = Linear(channels, channels, kernel_init=zeros_init, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        text: Float[Array, "batch length text_width"],
        mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch height width channels"]:
        """Residual attention; `text` is TextConditioning's sequence and `mask` its real tokens."""
        n, height, width, channels = x.shape
        h = self.norm(x).reshape(n, height * width, channels)
        pairs, masks = [], []
        # Text last: its padding ends the keys, so that a number of keys says the mask.
        if self.key_value is not None:
            pairs.append(self.key_value(h))
            masks.append(jnp.ones(h.shape[:2], dtype=bool))
        if self.text_norm is not None and self.text_key_value is not None:
            pairs.append(self.text_key_value(self.text_norm(text)))
            masks.append(mask)
        keys, values = jnp.split(jnp.concatenate(pairs, axis=1), 2, axis=-1)
        attended = attend(
            self.query(h),
            keys,
            values,
            jnp.concatenate(masks, axis=1),
            heads=self.heads,
            kind=self.kind,
        )
        return x + self.out(attended).reshape(x.shape)


class Conditioning(nnx.Module):
    """Everything that tells a network what to draw and how noisy its input is.

    The embedding is the sum of the time's, the pooled text's and, in super-resolution stages, the
    augmentation level's (arXiv 2205.11487, section 2.5).
    """

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        text_width: int,
        pool_heads: int,
        aug_level: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.time = TimeEmbedding(channels, width, dtype=dtype, rngs=rngs)
        self.aug_level = TimeEmbedding(channels, width, dtype=dtype, rngs=rngs) if aug_level else None
        self.text = TextConditioning(text_width, width, heads=pool_heads, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        time: Float[Array, " batch"],
        text: Float[Array, "batch length text_width"],
        mask: Bool[Array, "batch length"],
        aug_time: Float[Array, " batch"] | None,
    ) -> tuple[Float[Array, "batch width"], Float[Array, "batch length width"]]:
        """The embedding and the text sequence; `aug_time` is the low-resolution input's noise level."""
        tokens, pooled = self.text(text, mask)
        embedding = self.time(time) + pooled
        if self.aug_level is not None:
            if aug_time is None:
                raise ValueError("a super-resolution network needs aug_time, the level of its low-res input")
            embedding = embedding + self.aug_level(aug_time)
        return embedding, tokens
