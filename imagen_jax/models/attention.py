"""Softmax attention: plain XLA anywhere, or kernels that never write the logits, on TPU."""

import functools

import jax
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
      mask: True for keys that are attended to.
      heads: that share the channels.
      kind: which implementation. AUTO looks at the devices of the current `Execution`'s mesh, over which examples,
        and with tensor parallelism heads, are split: a program may be compiled for devices that are not here.
        Without a mesh it is XLA.

    Raises:
      ValueError: for FLASH, where the kernels do not take the shapes, or a kind that there is not.
    """
    kind = Attention(kind)
    mesh = Execution.current().mesh
    length, channels = query.shape[1:]
    platform = None if mesh is None else mesh.devices.flat[0].platform
    parts = 1 if mesh is None else mesh.shape["tensor"]
    size = key.dtype.itemsize
    shapes = length, key.shape[1], channels // parts, channels // heads
    possible = channels % parts == 0 and supports(*shapes, size)
    if kind is Attention.FLASH and not possible:
        raise ValueError(
            f"attention 'flash' needs a multiple of 16 positions and of {LANES} channels a device, whole heads "
            f"in each {LANES}, and at most {most_keys(size)} keys; got {length} positions and {channels} channels in "
            f"{heads} heads, and {key.shape[1]} keys"
        )
    # A kernel sees whole pictures: where their rows lie on several devices each would do the work of all.
    whole = mesh is None or mesh.shape.get(ROWS, 1) == 1
    if kind is Attention.FLASH or (kind is Attention.AUTO and possible and whole and platform == "tpu"):
        interpret = (platform or jax.default_backend()) != "tpu"
        run = functools.partial(flash_attention, head_channels=channels // heads, interpret=interpret)
        if mesh is None or works_locally():
            return checkpoint_name(run(query, key, value, mask), "attended")
        # The compiler does not know how to split a kernel: each device runs it on its own examples and heads.
        split = P(("data", "fsdp"), None, "tensor")
        split_run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(split, split, split, P(("data", "fsdp"))),
            out_specs=split,
            check_vma=False,
        )
        return checkpoint_name(split_run(query, key, value, mask), "attended")
    attended = jax.nn.dot_product_attention(
        split_heads(query, heads),
        split_heads(key, heads),
        split_heads(value, heads),
        mask=mask[:, None, None, :],
    )
    return checkpoint_name(attended.reshape(query.shape), "attended")
