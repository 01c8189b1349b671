"""Whether weights stay in memory between a stage's turns."""

import os

import jax
from jax.sharding import Mesh

# Share of a device's memory beyond which weights that are not in use are freed: the rest is for activations.
_WEIGHTS_SHARE = 0.5
# Batches that go through a stage before the next stage's turn, where weights are read anew at each turn.
_BATCHES_A_TURN = 16


def device_memory() -> int:
    """Bytes of the first device, or of the machine where that is the CPU."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def weight_shards(mesh: Mesh | None) -> int:
    """Over how many devices a stage's weights are split."""
    return 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]


def is_short(weight_bytes: int) -> bool:
    """Whether weights of so many bytes on a device would leave too little for sampling."""
    return weight_bytes > _WEIGHTS_SHARE * device_memory()


def pictures_a_turn(batch_size: int, frees: bool) -> int:
    """Pictures that go through a stage before the next one's turn."""
    return batch_size * (_BATCHES_A_TURN if frees else 1)
