"""What a stage draws pictures from, and pixels as numbers and back."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8, UInt32


class StageInputs(NamedTuple):
    """What a batch of pictures is made from."""

    seeds: UInt32[Any, " batch"]
    text: Float[Any, "batch length text_width"]  # float32
    mask: Bool[Any, "batch length"]  # True for real tokens
    # For SR stages: float32 in [−1, 1]. Not uint8: a value that lies between two grey levels, and a rounding
    # error apart on two machines, would come out a whole level apart.
    low_res: Float[Any, "batch low_height low_width channels"] | None = None
    negative_text: Float[Any, "batch length text_width"] | None = None  # None: where nothing is guided
    negative_mask: Bool[Any, "batch length"] | None = None
    # What the way begins with instead of noise alone, in [−1, 1]; None: noise.
    picture: Float[Any, "batch height width channels"] | None = None
    hooks: tuple[Any, ...] = ()  # see `diffusion.loop.Hook`; their arrays have an axis over the batch first


def not_finite(x0: Float[np.ndarray, "batch height width channels"]) -> Bool[np.ndarray, " batch"]:
    """Which pictures of a batch are none: they hold a number that is not finite."""
    return ~np.isfinite(x0).all(axis=(1, 2, 3))


def to_pixels(x0: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Pictures in [−1, 1] as uint8; what lies beyond is cut.

    Raises:
      ValueError: a number is not finite, which no grey level means.
    """
    if not np.isfinite(x0).all():
        raise ValueError("a picture has numbers that are not finite")
    return np.clip(np.round((x0 + 1.0) * 127.5), 0, 255).astype(np.uint8)


def to_unit(pixels: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """uint8 pictures as float32 in [−1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
