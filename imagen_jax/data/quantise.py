"""Text embeddings as int8 values with a float32 scale per token and block of channels."""

import numpy as np
from jaxtyping import Float, Float32, Int8

# Channels that share a scale: a channel 60 standard deviations out costs precision to its 63 neighbours
# only, and the scales add one byte to 16.
BLOCK_SIZE = 64
_INT8_MAX = 127


def quantise(
    embedding: Float[np.ndarray, "tokens width"], *, block_size: int = BLOCK_SIZE
) -> tuple[Int8[np.ndarray, "tokens width"], Float32[np.ndarray, "tokens blocks"]]:
    """Int8 values and their scales: per token and block of channels, the largest magnitude becomes 127.

    Args:
      embedding: finite values.
      block_size: channels that share a scale; the last block may be smaller.

    Returns:
      values from -127 to 127, and scales; value · scale is the embedding to within half a scale.

    Raises:
      ValueError: a value is not finite, or the block size is below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    tokens, width = embedding.shape
    blocks = -(-width // block_size)
    padded = np.zeros((tokens, blocks * block_size), np.float32)
    padded[:, :width] = embedding
    if not np.isfinite(padded).all():
        raise ValueError("the text embedding holds values that are not finite")
    grouped = padded.reshape(tokens, blocks, block_size)
    scale = np.abs(grouped).max(axis=-1) / np.float32(_INT8_MAX)
    divisor = np.where(scale > 0, scale, np.float32(1))[..., None]
    # The clip is for scales so small that they are rounded themselves.
    values = np.clip(np.rint(grouped / divisor), -_INT8_MAX, _INT8_MAX).astype(np.int8)
    return values.reshape(tokens, -1)[:, :width].copy(), scale


def dequantise(
    values: Int8[np.ndarray, "tokens width"],
    scale: Float32[np.ndarray, "tokens blocks"],
    *,
    block_size: int = BLOCK_SIZE,
) -> Float32[np.ndarray, "tokens width"]:
    """The inverse of `quantise`, up to rounding.

    Raises:
      ValueError: the number of scales is not that of the blocks.
    """
    width = values.shape[1]
    if scale.shape[1] != -(-width // block_size):
        raise ValueError(f"{scale.shape[1]} scales per token for {width} channels in blocks of {block_size}")
    return values.astype(np.float32) * np.repeat(scale, block_size, axis=1)[:, :width]
