"""Whether a generated picture is nearer to its own caption's picture than to others'."""

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image


def thumbnails(pictures: UInt8[np.ndarray, "n h w 3"], side: int = 16) -> Float[np.ndarray, "n pixels"]:
    """Antialiased side × side versions, flattened, in [0, 255]."""
    small = [Image.fromarray(picture).resize((side, side), Image.Resampling.BOX) for picture in pictures]
    return np.stack([np.asarray(picture, np.float32).ravel() for picture in small])


def nearest(
    samples: UInt8[np.ndarray, "n h w 3"], references: UInt8[np.ndarray, "m h2 w2 3"], side: int = 16
) -> Int[np.ndarray, " n"]:
    """For each sample the index of the reference at the least squared pixel distance at side × side pixels.

    The rate at which that is the sample's own caption's picture among m is 1/m by chance.
    """
    a, b = thumbnails(samples, side), thumbnails(references, side)
    distances = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)[None]
    return distances.argmin(axis=1)
