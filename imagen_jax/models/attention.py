"""Softmax attention: plain XLA anywhere, or kernels that never write the logits, on TPU and on GPU."""

import functools
import sys

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from imagen_jax.models.execution import Execution
from imagen_jax.models.flash_attention import LANES, flash_attention, most_keys, supports
from imagen_jax.models.network import Attention
from imagen_jax.parallel.mesh import works_locally
from imagen_jax.parallel.spatial import ROWS


def split_heads(
    x: Float[Array, "batch length channels"], heads: int
) -> Float[Array, "batch length heads head"]:
    """(batch, length, heads × head) → (batch, length, heads, head)."""
    return x.reshape(*x.shape[:2], heads, -1)


CUDNN_HEADS = 128  # channels of a head that cuDNN's attention takes on every GPU it runs on, in steps of 8


def implementation(
    kind: Attention, *, queries: int, keys: int, channels: int, heads: int, dtype: jnp.dtype
) -> Attention:
    """The implementation that runs on the devices of the current `Execution`'s mesh; without a mesh AUTO is XLA.

    Args:
      kind: what the config asks for.
      queries: their number.
      keys: their number.
      channels: of all heads.
      heads: that share the channels.
      dtype: of query, key and value.

    Raises:
      ValueError: for FLASH and CUDNN, where they do not take the shapes or the dtype.
    """
    mesh = Execution.current().mesh
    platform = None if mesh is None else mesh.devices.flat[0].platform
    parts = 1 if mesh is None else mesh.shape["tensor"]
    head, size = channels // heads, dtype.itemsize
    flash = channels % parts == 0 and supports(queries, keys, channels // parts, head, size)
    if kind is Attention.FLASH and not flash:
        raise ValueError(
            f"attention 'flash' needs a multiple of 16 positions and of {LANES} channels a device, whole heads "
            f"in each {LANES}, and at most {most_keys(size)} keys; got {queries} positions and {channels} channels in "
            f"{heads} heads, and {keys} keys"
        )
    cudnn = size == 2 and head % 8 == 0 and head <= CUDNN_HEADS
    if kind is Attention.CUDNN and not cudnn:
        raise ValueError(
            f"attention 'cudnn' needs bfloat16 and heads of a multiple of 8 and at most {CUDNN_HEADS} channels; got "
            f"{dtype} and heads of {head}"
        )
    # A kernel sees whole pictures: where their rows lie on several devices each would do the work of all.
    whole = mesh is None or mesh.shape.get(ROWS, 1) == 1
    if kind is not Attention.AUTO or not whole:
        return Attention.XLA if kind is Attention.AUTO else kind
    if platform == "gpu":
        chosen = Attention.CUDNN if cudnn else Attention.XLA
        _say(f"attention of {keys} keys in heads of {head} channels, {dtype}: {chosen.value}")
        return chosen
    return Attention.FLASH if platform == "tpu" and flash else Attention.XLA


@functools.cache
def _say(line: str) -> None:
    """Once a process, on the first host."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def attend(
    query: Float[Array, "batch queries channels"],
    key: Float[Array, "batch keys channels"],
    value: Float[Array, "batch keys channels"],
    mask: Bool[Array, "batch keys"],
    *,
    heads: int,
    kind: Attention | str = Attention.XLA,
) -> Float[Array, "batch queries channels"]:
    """Attention of heads that lie side by side in the channels, scaled by the root of a head's.

    Args:
      query: as the projections give it.
      key: likewise.
      value: likewise.
      mask: True for keys that are attended to. They are an example's first ones: CUDNN is told their number only, and
        where there are none attends to the first.
      heads: that share the channels.
      kind: which implementation. AUTO looks at the devices of the current `Execution`'s mesh, over which examples,
        and with tensor parallelism heads, are split: a program may be compiled for devices that are not here.
        Without a mesh it is XLA.

    Raises:
      ValueError: for FLASH or CUDNN, where they do not take shapes or dtype, or a kind that there is not.
    """
    length, channels = query.shape[1:]
    kind = implementation(
        Attention(kind),
        queries=length,
        keys=key.shape[1],
        channels=channels,
        heads=heads,
        dtype=key.dtype,
    )
    if kind is Attention.FLASH:
        return checkpoint_name(_flash(query, key, value, mask, channels // heads), "attended")
    q, k, v = (split_heads(x, heads) for x in (query, key, value))
    if kind is Attention.CUDNN:
        count = jnp.maximum(mask.sum(axis=1, dtype=jnp.int32), 1)
        attended = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=count, implementation="cudnn")
    else:
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
    return checkpoint_name(attended.reshape(query.shape), "attended")


def _flash(query: Array, key: Array, value: Array, mask: Array, head_channels: int) -> Array:
    """The TPU kernels, on each device's own examples and heads: the compiler does not know how to split them."""
    mesh = Execution.current().mesh
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    run = functools.partial(flash_attention, head_channels=head_channels, interpret=platform != "tpu")
    if mesh is None or works_locally():
        return run(query, key, value, mask)
    split = P(("data", "fsdp"), None, "tensor")
    in_specs = (split, split, split, P(("data", "fsdp")))
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=False)(
        query, key, value, mask
    )
