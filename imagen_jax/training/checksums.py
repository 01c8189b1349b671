"""Checksums of arrays that do not depend on how the arrays are spread over devices.

A checksum of a file's bytes says nothing of an array that another mesh restores in other pieces, and nothing of what
happened between memory and file. These are sums over an array's elements, of a hash of each element's bits and place:
whoever holds a part of the array adds up that part, before a save and after a restore.
"""

import collections
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes of an element
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: places that follow each other lie far apart


def _mix(bits: Any) -> Any:
    """MurmurHash3's finalizer fmix32: one to one, and each bit of uint32 decides about half of the result's."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


@jax.jit
def device_checksum(array: Array) -> UInt32[Array, ""]:
    """Σ mix(bits + place · golden ratio) modulo 2^32 over all elements, whose places count from 0, row by row.

    A change of one element, whatever it is, always changes the sum; other damage goes unseen with probability 2^-32,
    as with a CRC of that length.

    Args:
      array: of any shape, with elements of 1, 2 or 4 bytes.
    """
    bits = array.view(_UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros((1,) * array.ndim, jnp.uint32)
    for axis, side in enumerate(array.shape):
        stride = math.prod(array.shape[axis + 1 :]) % 2**32
        along = jnp.arange(side, dtype=jnp.uint32) * jnp.uint32(stride)
        place = place + along.reshape(*(1,) * axis, -1, *(1,) * (array.ndim - axis - 1))
    return jnp.sum(_mix(bits + place * jnp.uint32(_GOLDEN)), dtype=jnp.uint32)


def host_checksum(part: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """The summands of `device_checksum` that belong to a part of an array.

    Args:
      part: on the host.
      index: where it lies in the array.
      shape: of the whole array.
    """
    # Vectors where an array has no axes: NumPy warns of scalars that wrap around.
    bits = np.atleast_1d(part).view(_UNSIGNED[part.dtype.itemsize]).astype(np.uint32)
    place = np.zeros((1,) * bits.ndim, np.uint32)
    for axis, side in enumerate(shape):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        along = np.arange(*index[axis].indices(side), dtype=np.uint32) * np.uint32(stride)
        place = place + along.reshape(-1, *(1,) * (len(shape) - axis - 1))
    return int(_mix(bits + place * np.uint32(_GOLDEN)).sum(dtype=np.uint64)) % 2**32


def begin_checksums(tree: Any) -> Callable[[], dict[str, int]]:
    """Begins to sum up the arrays of a tree; all processes that hold parts of them have to call it.

    The arrays may be given away afterwards. On accelerators the sums are only dispatched, and each shape is compiled
    once a process. The memory of a CPU is summed up by NumPy when the result is asked for, without any compiling.

    Returns:
      → this process's summands, by the array's path; those of all processes are put together by `add_checksums`.
    """
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    if any(device.platform != "cpu" for _, leaf in leaves for device in leaf.sharding.device_set):
        sums = {name: device_checksum(leaf) for name, leaf in leaves}
        first = jax.process_index() == 0  # each process has the whole sum
        return lambda: {name: int(each) for name, each in jax.device_get(sums).items()} if first else {}
    parts = [
        (name, np.asarray(shard.data), shard.index, leaf.shape)
        for name, leaf in leaves
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]
    return lambda: add_checksums({name: host_checksum(*part)} for name, *part in parts)


def add_checksums(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Checksums of whole arrays from those of their parts."""
    total: collections.Counter[str] = collections.Counter()
    for part in parts:
        total.update(part)
    return {name: value % 2**32 for name, value in total.items()}


def json_checksum(values: Mapping[str, Any]) -> int:
    """CRC-32C of a JSON object, whatever the order of its fields and the space between them."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return google_crc32c.value(text.encode())
