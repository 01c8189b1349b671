"""Classifier-free guidance."""

from jaxtyping import Array, Float


def guide(
    conditional: Float[Array, "*shape"],
    unconditional: Float[Array, "*shape"],
    guidance_weight: Float[Array, ""] | float,
) -> Float[Array, "*shape"]:
    """w·conditional + (1 − w)·unconditional (arXiv 2205.11487, equation 2); w = 1 is no guidance.

    The weights sum to one, so that the rule is the same for ε, v and x0 of one x_t.
    """
    return guidance_weight * conditional + (1.0 - guidance_weight) * unconditional
