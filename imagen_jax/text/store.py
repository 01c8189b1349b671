"""What becomes of an embedding on its way to the records: bfloat16, or int8 with scales."""

import dataclasses

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Float, Float32, Int8

from imagen_jax.data.quantise import BLOCK_SIZE, dequantise, quantise
from imagen_jax.data.records import EmbeddingDtype

__all__ = [
    "BLOCK_SIZE",
    "WHOLE_LENGTH",
    "EmbeddingDtype",
    "StoredEmbedding",
    "TokenCounts",
    "dequantise",
    "pack",
    "quantise",
]

# Tokens of a text that the encoder sees, </s> included: as many as T5 was trained with. What is kept of them is cut
# from the embeddings (`cut_embedding`), so that it is the same whatever was cut before.
WHOLE_LENGTH = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """What it takes to encode some captions."""

    unknown: tuple[int, ...]  # tokens of each caption that the vocabulary lacks
    useful: int  # tokens of the distinct captions, before they are cut
    computed: int  # tokens of the batches that encode them, padding included
    cut: tuple[bool, ...] = ()  # of each caption, whether it has more tokens than are kept; (): not counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredEmbedding:
    """An embedding as a record holds it."""

    values: BFloat16[np.ndarray, "tokens width"] | Int8[np.ndarray, "tokens width"]
    scale: Float32[np.ndarray, "tokens blocks"] | None = None  # of int8 values

    @property
    def nbytes(self) -> int:
        """Size in memory and in a record, bytes."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)


def pack(embedding: Float[np.ndarray, "tokens width"], dtype: EmbeddingDtype) -> StoredEmbedding:
    """An embedding in the form in which it is stored.

    Raises:
      ValueError: a value is not finite.
    """
    if dtype is EmbeddingDtype.INT8:
        values, scale = quantise(embedding)
        return StoredEmbedding(values=values, scale=scale)
    if not np.isfinite(embedding).all():
        raise ValueError("the text embedding holds values that are not finite")
    return StoredEmbedding(values=np.asarray(embedding).astype(ml_dtypes.bfloat16))
