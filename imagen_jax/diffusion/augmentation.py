"""Augmentation of the low-resolution input: noise (arXiv 2205.11487, section 2.4) and blur (2106.15282, 4.2)."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.diffusion.process import diffuse
from imagen_jax.diffusion.schedules import CosineSchedule, DiscreteCosineSchedule
from imagen_jax.limits import check_numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseAugmentation:
    """Variance-preserving Gaussian noise of a level that the network is told, on a picture blurred or not.

    The level's amplitude follows the cosine schedule: aug_level 0 leaves the picture as it is (a discrete schedule:
    takes its first step), aug_level 1 leaves only noise. A blur hides what the stage below gets wrong at its smallest
    scale, so that this stage draws it anew from the text; it is the same in training and in sampling.
    """

    max_level: float = 1.0  # training draws aug_level ~ U(0, max_level); Imagen: 1
    schedule: CosineSchedule | DiscreteCosineSchedule = CosineSchedule()  # from a level to its log-SNR
    enlarge: bool = (
        False  # whether the picture is enlarged, bilinearly and corner to corner, before the noise
    )
    blur: float = 0.0  # low-resolution pixels; standard deviation of the Gaussian blur; Imagen: 0, none

    def __post_init__(self) -> None:
        if not 0.0 <= self.blur < math.inf:
            raise ValueError(f"blur must be at least 0, got {self.blur}")
        if not 0.0 <= self.max_level <= 1.0:
            raise ValueError(f"max_level must be in [0, 1], got {self.max_level}")
        check_numbers(self, blur=64.0)

    def log_snr(self, aug_level: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Log-SNR of the low-resolution input at aug_level in [0, 1]."""
        if isinstance(self.schedule, DiscreteCosineSchedule):
            # Level i/steps is step i, one further than the time i/steps lies.
            aug_level = aug_level + 1.0 / self.schedule.steps
        return self.schedule.log_snr(aug_level)

    def prepare(
        self, low_res: Float[Array, "batch height width channels"], size: Sequence[int]
    ) -> Float[Array, "batch height2 width2 channels"]:
        """The picture to which the noise is added, of that height and width where it is enlarged before."""
        if not self.enlarge:
            return low_res
        for axis, side in enumerate(size, start=1):
            low_res = _enlarge_axis(low_res, axis, side)
        return low_res

    def apply(
        self,
        low_res: Float[Array, "batch height width channels"],
        epsilon: Float[Array, "batch height width channels"],
        aug_level: Float[Array, " batch"],
    ) -> Float[Array, "batch height width channels"]:
        """Low-resolution pictures, blurred, with noise of the given levels from the given unit Gaussian noise."""
        if self.blur:
            rows, columns = (_blur_matrix(side, self.blur) for side in low_res.shape[1:3])
            low_res = jnp.einsum("ih,jw,nhwc->nijc", rows, columns, low_res)
        return diffuse(low_res, epsilon, self.log_snr(aug_level))


def _enlarge_axis(pictures: Array, axis: int, side: int) -> Array:
    """Linear interpolation along an axis between pixels' centres, the first and the last staying where they are."""
    last = pictures.shape[axis] - 1
    places = np.arange(side, dtype=np.float32) * np.float32(last / max(side - 1, 1))
    below = np.minimum(places.astype(np.int32), last)
    above = np.minimum(below + 1, last)
    shape = [1] * pictures.ndim
    shape[axis] = side
    weight = jnp.asarray((places - below).reshape(shape))
    first, second = (jnp.take(pictures, jnp.asarray(each), axis=axis) for each in (below, above))
    return (1.0 - weight) * first + weight * second


def _blur_matrix(side: int, std: float) -> Float[np.ndarray, "side side"]:
    """A Gaussian blur along one axis as a matrix; beyond the edge the picture goes on as its last pixel."""
    reach = math.ceil(4 * std)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * np.square(offsets / std))
    matrix = np.zeros((side, side), np.float32)
    for pixel in range(side):
        np.add.at(matrix[pixel], np.clip(pixel + offsets, 0, side - 1), weights / weights.sum())
    return matrix
