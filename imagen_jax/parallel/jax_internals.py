"""The names of JAX that are experimental or private, each with the reason why it is needed: nowhere else is one used.

Pallas, in which kernels are written (`models.flash_attention`), is experimental as a whole.
"""

# The key-value store of the service that starts a job of several processes has no public name: the processes tell
# each other of failures by it, where a collective would wait for the one that failed.
from jax._src import distributed

# Tests turn the compilation cache to another folder within a process: JAX decides once whether and where it is.
from jax.experimental.compilation_cache.compilation_cache import reset_cache

# A gradient's order of axes in memory is prescribed where the TPU compiler would sum it whole on all chips.
from jax.experimental.layout import Layout, with_layout_constraint

# `jax.make_mesh` cannot divide the side of a slice among two axes of the mesh, nor place devices of several slices.
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh

# Arrays of several processes on the host, and the step at which all of them stop for a preemption.
from jax.experimental.multihost_utils import process_allgather, reached_preemption_sync_point

# Devices of slices that are not here, to compile for.
from jax.experimental.topologies import get_topology_desc

__all__ = [
    "Layout",
    "create_device_mesh",
    "create_hybrid_device_mesh",
    "distributed",
    "get_topology_desc",
    "process_allgather",
    "reached_preemption_sync_point",
    "reset_cache",
    "with_layout_constraint",
]
