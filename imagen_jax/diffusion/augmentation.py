"""Augmentation of the low-resolution input: noise (arXiv 2205.11487, section 2.4) and blur (2106.15282, 4.2)."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.diffusion.process import diffuse
from imagen_jax.diffusion.schedules import CosineSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseAugmentation:
    """Variance-preserving Gaussian noise of a level that the network is told, on a picture blurred or not.

    The level's amplitude follows the cosine schedule: aug_level 0 leaves the picture as it is, aug_level 1
    leaves only noise. A blur hides what the stage below gets wrong at its smallest scale, so that this stage
    draws it anew from the text; it is the same in training and in sampling.
    """

    max_level: float = 1.0  # training draws aug_level ~ U(0, max_level); Imagen: 1
    blur: float = 0.0  # low-resolution pixels; standard deviation of the Gaussian blur; Imagen: 0, none

    def __post_init__(self) -> None:
        if not 0.0 <= self.blur < math.inf:
            raise ValueError(f"blur must be at least 0, got {self.blur}")
        if not 0.0 <= self.max_level <= 1.0:
            raise ValueError(f"max_level must be in [0, 1], got {self.max_level}")

    def log_snr(self, aug_level: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Log-SNR of the low-resolution input at aug_level in [0, 1]."""
        return CosineSchedule().log_snr(aug_level)

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


def _blur_matrix(side: int, std: float) -> Float[np.ndarray, "side side"]:
    """A Gaussian blur along one axis as a matrix; beyond the edge the picture goes on as its last pixel."""
    reach = math.ceil(4 * std)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * np.square(offsets / std))
    matrix = np.zeros((side, side), np.float32)
    for pixel in range(side):
        np.add.at(matrix[pixel], np.clip(pixel + offsets, 0, side - 1), weights / weights.sum())
    return matrix
