"""Model FLOPs of a network, counted on what JAX traces of it.

The count is analytic: two for each multiply-add of every matrix product and convolution, from their shapes alone,
in the network's forward pass on one picture. Walking the traced program instead of a formula keeps it right whatever
the network's code becomes; loops count as often as they run, blocks that the backward pass computes again only once,
and a hand-written kernel by its own cost estimate.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from imagen_jax.models.stage import StageNetwork
from imagen_jax.sizes import Size


def forward_flops(network: StageNetwork, *, size: Size | None = None) -> int:
    """FLOPs of one call of a stage's network on one picture, text attention included.

    Args:
      network: the stage's network; nothing of it is computed.
      size: of the picture; None: the stage's own.
    """
    stage = network.config
    size = size or stage.size
    picture = jax.ShapeDtypeStruct((1, *size, stage.network.image_channels), jnp.float32)
    level = jax.ShapeDtypeStruct((1,), jnp.float32)
    text = jax.ShapeDtypeStruct((1, stage.max_text_length, stage.network.text_width), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, stage.max_text_length), jnp.bool_)
    low = {}
    if stage.low_resolution is not None:
        shape = (1, *size.over(stage.scale), stage.network.low_res_channels)
        low = {"low_res": jax.ShapeDtypeStruct(shape, jnp.float32), "aug_log_snr": level}
    traced = jax.make_jaxpr(network.apply)(network.abstract_params, picture, level, text, mask, **low)
    return jaxpr_flops(traced.jaxpr)


def jaxpr_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of the matrix products and convolutions of a traced program.

    Raises:
      ValueError: for a loop whose number of iterations is not known before it runs.
    """
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
    params = equation.params
    match equation.primitive.name:
        case "dot_general":
            return _dot_flops(equation)
        case "conv_general_dilated":
            return _convolution_flops(equation)
        case "scan":
            return params["length"] * jaxpr_flops(params["jaxpr"].jaxpr)
        case "cond":
            return max(jaxpr_flops(branch.jaxpr) for branch in params["branches"])
        case "pallas_call" if params.get("cost_estimate") is not None:
            return int(params["cost_estimate"].flops)
        case "pallas_call":
            return math.prod(params["grid_mapping"].grid) * jaxpr_flops(params["jaxpr"])
        case "shard_map":
            return params["mesh"].size * jaxpr_flops(params["jaxpr"])
        case "while" if jaxpr_flops(params["body_jaxpr"].jaxpr):
            raise ValueError("the network has a loop of unknown length: use jax.lax.scan")
        case _:
            return sum(jaxpr_flops(inner) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs that an equation calls, such as those of jit, checkpoint and custom_vjp."""
    for value in params.values():
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


def _dot_flops(equation: Any) -> int:
    """Two for each element of the result and each contracted index."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[dim] for dim in contracted)


def _convolution_flops(equation: Any) -> int:
    """Two for each element of the result and each weight that reaches it; padding counts as picture."""
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    # Of a dilated picture only one position in so many holds a value.
    holes = math.prod(equation.params["lhs_dilation"])
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // outputs // holes
