"""Hooks of the loop that keep a part of a picture."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.loop import Moment
from imagen_jax.diffusion.process import diffuse
from imagen_jax.diffusion.rules import each_example


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownRegion:
    """Inpainting: what is known is at the level of x_t before every network call, and known after it.

    RePaint (arXiv 2201.09865, equation 8): x_t = m·x_t + (1 − m)·(α_t·x0 + σ_t·ε) with fresh ε. x̂0 is the picture
    where that is known, so that the last one has it unchanged.
    """

    picture: Float[Any, "batch height width channels"]  # in [−1, 1]
    mask: Float[Any, "batch height width 1"]  # 1: to be painted; 0: known; between: a blend

    def before_call(self, x_t: Float[Array, "batch *shape"], moment: Moment) -> Float[Array, "batch *shape"]:
        """x_t with the known region at its level."""
        picture = jnp.asarray(self.picture)
        noise = jax.vmap(lambda key: jax.random.normal(key, x_t.shape[1:], jnp.float32))(moment.keys)
        known = diffuse(picture, noise, each_example(moment.log_snr, x_t))
        return jnp.where(self.mask > 0.0, x_t, known)

    def after_x0(self, x0: Float[Array, "batch *shape"], moment: Moment) -> Float[Array, "batch *shape"]:
        """x̂0 with the known region as it is."""
        del moment
        mask = jnp.asarray(self.mask)
        return mask * x0 + (1.0 - mask) * jnp.asarray(self.picture)
