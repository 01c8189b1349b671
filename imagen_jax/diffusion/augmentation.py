"""Noise conditioning augmentation of the low-resolution input (arXiv 2205.11487, section 2.4)."""

import dataclasses

from jaxtyping import Array, Float

from imagen_jax.diffusion.process import diffuse
from imagen_jax.diffusion.schedules import CosineSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseAugmentation:
    """Variance-preserving Gaussian noise of a level that the network is told.

    The level's amplitude follows the cosine schedule: aug_level 0 leaves the picture as it is, aug_level 1
    leaves only noise.
    """

    max_level: float = 1.0  # training draws aug_level ~ U(0, max_level); Imagen: 1

    def __post_init__(self) -> None:
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
        """Low-resolution pictures with noise of the given levels, using the given unit Gaussian noise."""
        return diffuse(low_res, epsilon, self.log_snr(aug_level))
