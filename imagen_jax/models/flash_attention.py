"""Attention without logits in memory, as two TPU kernels: forward, and the gradients of all three inputs.

Pictures' sequences are short (64 to 1,024 positions and some 128 tokens), so that all keys and values of a head fit
in VMEM: there is no running softmax, and the backward kernel forms its logits again, keeping nothing but the
inputs. Heads stay where the projections put them, side by side in the last axis; where several share the 128 lanes
of a register, a head is picked by zeroing the others' lanes, which costs the matrix unit nothing: it would pad them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

LANES = 128
# Of the 16 MiB of VMEM that a kernel has, for what lies there of the keys; the rest is for a block of queries.
_KEY_BYTES = 13 * 2**20
_MASKED = -1e30  # finite: a row whose keys are all masked attends to all alike, as in plain attention
_MAX_LOGITS = 2**18  # float32 logits of a block: 1 MiB, a few of which live at once


def most_keys(itemsize: int) -> int:
    """Keys that fit: the backward kernel has their lanes six times in their dtype, and twice in float32."""
    return _KEY_BYTES // (LANES * (6 * itemsize + 2 * 4)) // LANES * LANES


def supports(query_length: int, key_length: int, channels: int, head_channels: int, itemsize: int) -> bool:
    """Whether the kernels take these shapes: whole heads in lanes, whole lanes, whole sublanes, keys that fit."""
    return (
        channels % LANES == 0
        and key_length <= most_keys(itemsize)
        and LANES % head_channels == 0
        and query_length % 16 == 0
        and _block(query_length, LANES) >= 16
    )


def _block(query_length: int, key_length: int) -> int:
    """Queries of a block: the largest power of two that divides them and whose logits are few enough."""
    block = math.gcd(query_length, 1024)
    while block > 16 and block * key_length > _MAX_LOGITS:
        block //= 2
    return block


def _weights(query: Array, key: Array, bias: Array, scale: float) -> Array:
    """Softmax over keys, float32 (queries, keys)."""
    logits = _dot(query, key, 1, 1) * scale + bias
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _heads(head_channels: int) -> list[Array]:
    """For each head that shares the lanes: True at its own, (1, lanes)."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1) // head_channels
    return [lane == head for head in range(LANES // head_channels)]


def _forward_kernel(query, key, value, bias, out, *, head_channels, scale):
    q, k, v = query[0], key[0], value[0]
    total = jnp.zeros(q.shape, jnp.float32)
    for own in _heads(head_channels):
        weights = _weights(jnp.where(own, q, 0), k, bias[0], scale)
        total = total + jnp.where(own, _dot(weights.astype(v.dtype), v, 1, 0), 0.0)
    out[0] = total.astype(out.dtype)


def _backward_kernel(
    query, key, value, bias, d_out, d_query, d_key, d_value, sum_key, sum_value, *, head_channels, scale
):
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        sum_key[...] = jnp.zeros_like(sum_key)
        sum_value[...] = jnp.zeros_like(sum_value)

    k, v = key[0], value[0]
    total = jnp.zeros(query.shape[1:], jnp.float32)
    for own in _heads(head_channels):
        q, d = jnp.where(own, query[0], 0), jnp.where(own, d_out[0], 0)
        weights = _weights(q, k, bias[0], scale)
        sum_value[...] += _dot(weights.astype(d.dtype), d, 0, 0)
        d_weights = _dot(d, v, 1, 1)
        d_logits = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True)) * scale
        d_logits = d_logits.astype(q.dtype)
        total = total + jnp.where(own, _dot(d_logits, k, 1, 0), 0.0)
        sum_key[...] += _dot(d_logits, q, 0, 0)
    d_query[0] = total.astype(d_query.dtype)

    @pl.when(step == steps - 1)
    def _():
        d_key[0] = sum_key[...].astype(d_key.dtype)
        d_value[0] = sum_value[...].astype(d_value.dtype)


def _specs(query: Array, key: Array) -> tuple[tuple[int, int, int], pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """The grid (examples, groups of heads, blocks of queries) and the blocks of queries, keys and bias."""
    (batch, length, channels), keys = query.shape, key.shape[1]
    block = _block(length, keys)
    return (
        (batch, channels // LANES, length // block),
        pl.BlockSpec((1, block, LANES), lambda n, h, i: (n, i, h)),
        pl.BlockSpec((1, keys, LANES), lambda n, h, i: (n, 0, h)),
        pl.BlockSpec((1, 1, keys), lambda n, h, i: (n, 0, 0)),
    )


def _cost(query: Array, key: Array, products: int, arrays: list[Array]) -> pl.CostEstimate:
    """What the compiler and `imagen-jax plan` take the kernel to cost, at the arithmetic of the heads alone."""
    (batch, length, channels), keys = query.shape, key.shape[1]
    return pl.CostEstimate(
        flops=2 * products * batch * length * keys * channels,
        transcendentals=batch * length * keys * channels // 64,
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(query, key, value, bias, head_channels, interpret):
    grid, queries, keys, biases = _specs(query, key)
    return pl.pallas_call(
        functools.partial(_forward_kernel, head_channels=head_channels, scale=head_channels**-0.5),
        grid=grid,
        in_specs=[queries, keys, keys, biases],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        cost_estimate=_cost(query, key, 2, [query, key, value, query]),
        interpret=interpret,
        name="attention_forward",
    )(query, key, value, bias)


def _attention_forward(query, key, value, bias, head_channels, interpret):
    return _attention(query, key, value, bias, head_channels, interpret), (query, key, value, bias)


def _attention_backward(head_channels, interpret, residuals, d_out):
    query, key, value, bias = residuals
    grid, queries, keys, biases = _specs(query, key)
    like = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (query, key, value)]
    gradients = pl.pallas_call(
        functools.partial(_backward_kernel, head_channels=head_channels, scale=head_channels**-0.5),
        grid=grid,
        in_specs=[queries, keys, keys, biases, queries],
        out_specs=[queries, keys, keys],
        out_shape=like,
        scratch_shapes=[pltpu.VMEM((key.shape[1], LANES), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(query, key, 5, [query, key, value, d_out, query, key, value]),
        interpret=interpret,
        name="attention_backward",
    )(query, key, value, bias, d_out)
    return *gradients, jnp.zeros_like(bias)


_attention.defvjp(_attention_forward, _attention_backward)


def flash_attention(
    query: Float[Array, "batch queries channels"],
    key: Float[Array, "batch keys channels"],
    value: Float[Array, "batch keys channels"],
    mask: Bool[Array, "batch keys"],
    *,
    head_channels: int,
    interpret: bool = False,
) -> Float[Array, "batch queries channels"]:
    """Softmax attention of heads that lie side by side in the channels (arXiv 2205.14135 for the idea).

    Args:
      query: of shapes that `supports` takes.
      key: any length; padded here to whole lanes.
      value: likewise.
      mask: True for keys that are attended to.
      head_channels: of one head; logits are scaled by its inverse root.
      interpret: run the kernels as plain JAX, where there is no TPU.
    """
    padding = -key.shape[1] % LANES
    if padding:
        key, value = (jnp.pad(each, ((0, 0), (0, padding), (0, 0))) for each in (key, value))
        mask = jnp.pad(mask, ((0, 0), (0, padding)))
    bias = jnp.where(mask, 0.0, _MASKED)[:, None, :]
    return _attention(query, key, value, bias, head_channels, interpret)
