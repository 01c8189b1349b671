"""Pictures whose rows lie on several devices, for stages too large or too slow for one."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from imagen_jax.errors import UserError
from imagen_jax.parallel.mesh import AXES

ROWS = "rows"  # mesh axis along which the rows of one picture are split


def split_rows(mesh: Mesh, devices: int) -> Mesh:
    """The mesh with its "data" axis divided into one of that name and a "rows" axis of `devices`.

    Weights are the same along "rows"; convolutions exchange the rows at the borders (halos), and whatever is
    taken over a whole picture (GroupNorm's statistics, attention, thresholds) crosses devices.

    Raises:
      UserError: if the devices that hold copies of the model cannot be divided so.
    """
    copies = mesh.shape["data"]
    if devices < 1 or copies % devices:
        raise UserError(
            f'rows split over {devices} devices: there are {copies} along the mesh\'s "data" axis, '
            "and the number must divide that"
        )
    data, fsdp, tensor = (mesh.shape[axis] for axis in AXES)
    arranged = mesh.devices.reshape(data // devices, devices, fsdp, tensor).transpose(0, 2, 3, 1)
    return Mesh(arranged, (*AXES, ROWS), axis_types=(AxisType.Auto,) * 4)


def picture_sharding(mesh: Mesh) -> NamedSharding:
    """Pictures (batch, height, …) over "data" and "fsdp", their rows over "rows" where the mesh has it."""
    return NamedSharding(mesh, P(("data", "fsdp"), ROWS if ROWS in mesh.shape else None))


def shard_pictures(pictures: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Tells the compiler under `jax.jit` that pictures lie by `picture_sharding`; without a mesh, nothing."""
    return pictures if mesh is None else jax.lax.with_sharding_constraint(pictures, picture_sharding(mesh))
