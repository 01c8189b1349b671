"""The device mesh, and how arrays lie on it. All sharding rules of the project are in this file."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from imagen_jax.errors import UserError
from imagen_jax.limits import MAX_DEVICES, check_numbers
from imagen_jax.parallel.jax_internals import (
    Layout,
    create_device_mesh,
    create_hybrid_device_mesh,
    with_layout_constraint,
)

T = TypeVar("T")  # a tree of arrays

AXES = ("data", "fsdp", "tensor")
_MAX_CPU_DEVICES = 1024  # each has threads of its own
# Below this a shard costs more in collectives than it saves in memory.
MIN_SHARDED_SIZE = 2**12
# Shares of fewer rows, a tile of bfloat16, are cut out of the whole sum by the TPU compiler in any case.
_CUT_ROWS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one axis may be −1 and takes what is left."""

    data: int = -1  # copies of the model that share the batch
    fsdp: int = 1  # devices that share the batch and split the parameters
    tensor: int = 1  # devices that split the features of each layer
    fsdp_limit: int = 0  # where data is 1 and fsdp −1: most devices that split one copy; 0: no limit

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh axes must be positive, at most one of them -1; got {sizes}")
        if self.fsdp_limit < 0:
            raise ValueError(f"fsdp_limit must be 0 or positive, got {self.fsdp_limit}")
        check_numbers(self, **dict.fromkeys((*AXES, "fsdp_limit"), MAX_DEVICES))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The ("data", "fsdp", "tensor") mesh over all devices of all processes, or over the given ones.

    Of several TPU slices every one has whole copies of the model: only gradients cross the network between them.

    Raises:
      UserError: if the axes' sizes do not multiply to the number of devices, or slices cannot share data equally.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = left = len(devices) // known
        if (config.data, config.fsdp) == (1, -1) and config.fsdp_limit:
            sizes[1] = max(size for size in range(1, config.fsdp_limit + 1) if left % size == 0)
            sizes[0] = left // sizes[1]
    if math.prod(sizes) != len(devices):
        shown = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes))
        raise UserError(f"config.mesh: {shown} does not make the {len(devices)} devices that there are")
    types = (AxisType.Auto,) * len(AXES)
    slices = slice_count(devices)
    if slices > 1:
        if sizes[0] % slices:
            raise UserError(f"config.mesh.data={sizes[0]}: must be a multiple of the {slices} slices")
        within = (sizes[0] // slices, *sizes[1:])
        placed = create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=types)
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # of a slice none of whose sides is such a size: 32 of 16×16 chips
        placed = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=types)


def slice_count(devices: Sequence[Any]) -> int:
    """Number of TPU slices among which the devices lie; 1 for other devices.

    GPUs have an index of that name too, of their host: how they are connected is their own library's business.
    """
    return max(1, len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}))


def use_cpu_devices(count: int | None = None) -> None:
    """Splits the CPU into devices, so that a batch keeps all cores busy; to be called before JAX is used.

    XLA runs many of a small network's operations on one core; with one device a core they run side by side. It
    changes nothing where there is an accelerator, where XLA_FLAGS already set the number, nor, unless a number is asked
    for, where JAX has been used.

    Args:
      count: devices; None: the largest power of two that is at most the number of cores, and at most 8.

    Raises:
      UserError: no such number of devices, or JAX has been used; names --cpu_devices, which is where it comes from.
    """
    asked = count is not None
    if count is not None and not 1 <= count <= _MAX_CPU_DEVICES:
        raise UserError(f"--cpu_devices {count}: must be from 1 to {_MAX_CPU_DEVICES}")
    if count is None:
        count = 2 ** int(math.log2(min(os.cpu_count() or 1, 8)))
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError as error:  # JAX has its devices already
            if asked:
                raise UserError(f"--cpu_devices {count}: {error}") from error


def parameter_spec(shape: Sequence[int], mesh: Mesh) -> P:
    """How an array of the training state is split: parameter, moving average or optimizer statistic.

    Output features (the last axis) go over "tensor", input features (the last but one) over "fsdp"; an axis
    that its mesh axis does not divide takes the other's, and is else left whole. The rule looks at the shape
    only, so that a parameter, its EMA and its Adam moments always lie alike.
    """
    spec: list[Any] = [None] * len(shape)
    if len(shape) < 2 or math.prod(shape) < MIN_SHARDED_SIZE:
        return P(*spec)
    for axis, order in (("tensor", (-1, -2)), ("fsdp", (-2, -1))):
        size = mesh.shape[axis]
        if size == 1:
            continue
        for dim in order:
            if spec[dim] is None and shape[dim] % size == 0:
                spec[dim] = axis
                break
    return P(*spec)


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a training state, as a pytree like it."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, parameter_spec(leaf.shape, mesh)), abstract_state)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes that know where they lie."""
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def gather_weights(params: T, mesh: Mesh, *, dtype: jnp.dtype | None = None) -> T:
    """Parameters as a network uses them: whole along "fsdp", still split along "tensor".

    To be called under `jax.jit`, on parameters that lie by `parameter_spec`; their gradients lie so again. A
    network calls it block by block, so that one block's weights at a time are whole. XLA would find a layout
    itself, but a wrong one: on a mesh with all three axes the gradient with respect to the input of a
    convolution, whose kernel's input features and whose batch are split by the same axis, came out wrong
    (jaxlib 0.10.2, largest error of the order of the gradient).

    Args:
      params: any tree of arrays.
      mesh: where they lie.
      dtype: arrays of two and more axes are converted to it before they are gathered, and their gradients
        summed over the devices in it: half the traffic in bfloat16; None: as they are.
    """

    def gather(param: jax.Array) -> jax.Array:
        if dtype is not None and param.ndim > 1:
            param = param.astype(dtype)
        spec = parameter_spec(param.shape, mesh)
        if "fsdp" not in spec:
            return param
        split = NamedSharding(mesh, spec)
        whole = NamedSharding(mesh, P(*(None if axis == "fsdp" else axis for axis in spec)))

        @jax.custom_vjp
        def constrain(value: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(value, whole)

        def back(_: None, gradient: jax.Array) -> tuple[jax.Array]:
            # Summed whole and then cut, which the compiler makes one operation of. Asked for the cut alone it
            # would cut the convolution that makes the gradient into as many narrow ones, several times as slow.
            summed = jax.lax.with_sharding_constraint(gradient, whole)
            return (jax.lax.with_sharding_constraint(summed, split),)

        constrain.defvjp(lambda value: (constrain(value), None), back)
        return constrain(param)

    return jax.tree.map(gather, params)


def works_locally() -> bool:
    """Whether what is being traced sees one device's part of the arrays, under `jax.shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def gather_shard(
    shard: jax.Array, shape: Sequence[int], mesh: Mesh, *, dtype: jnp.dtype | None = None
) -> jax.Array:
    """`gather_weights` of one parameter where the code works locally, and without a "tensor" axis.

    The collectives are written out: whole weights by one all-gather, gradients by one reduce-scatter of `dtype`,
    where the partitioner would sum whole gradients in float32, four times the bytes.

    Args:
      shard: this device's part.
      shape: of the whole parameter.
      mesh: where it lies by `parameter_spec`.
      dtype: as in `gather_weights`.
    """
    if dtype is not None and len(shape) > 1:
        shard = shard.astype(dtype)
    spec = parameter_spec(shape, mesh)
    dim = spec.index("fsdp") if "fsdp" in spec else None
    summed = ("data", "fsdp") if dim is None else ("data",)
    shared = [axis for axis in summed if mesh.shape[axis] > 1]

    @jax.custom_vjp
    def gather(shard: jax.Array) -> jax.Array:
        return shard if dim is None else jax.lax.all_gather(shard, "fsdp", axis=dim, tiled=True)

    def back(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        if dim is not None:
            if shard.shape[dim] >= _CUT_ROWS:
                # Other orders of the axes, as the compiler gives to what no convolution made, are summed whole.
                gradient = with_layout_constraint(gradient, Layout(major_to_minor=tuple(range(len(shape)))))
            gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=dim, tiled=True)
        return (jax.lax.psum(gradient, shared) if shared else gradient,)

    gather.defvjp(lambda shard: (gather(shard), None), back)
    return gather(shard)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are split over "data" and "fsdp", and are the same along "tensor"."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def check_batch_size(batch_size: int, mesh: Mesh, name: str) -> None:
    """Raises UserError, naming the flag or field, unless the devices share the batch equally."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise UserError(f"{name}={batch_size} is not a multiple of the {parts} devices that share a batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataShare:
    """Which examples of a batch this process has to bring: those of number `index` modulo `count`."""

    index: int
    count: int


def data_share(mesh: Mesh) -> DataShare:
    """The part of each batch that this process's devices compute on.

    Processes that are apart along "tensor" only compute on the same examples, so that they bring the same.

    Raises:
      UserError: two processes share some of their examples but not all.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    slices = batch_sharding(mesh).devices_indices_map((parts,))
    rows: dict[int, set[int]] = {}
    device: Any
    for device, (part,) in slices.items():
        rows.setdefault(device.process_index, set()).update(range(*part.indices(parts)))
    distinct = sorted({tuple(sorted(members)) for members in rows.values()})
    if sum(map(len, distinct)) != parts or len({len(members) for members in distinct}) != 1:
        raise UserError(
            f"config.mesh: data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']} × tensor {mesh.shape['tensor']} "
            "gives some processes half of another one's examples; let tensor divide the devices of a process, or "
            "be a multiple of them"
        )
    return DataShare(index=distinct.index(tuple(sorted(rows[jax.process_index()]))), count=len(distinct))


def put_whole(arrays: T, mesh: Mesh) -> T:
    """Gives host arrays, the same in every process, as global ones of which each device has a copy."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array, array.shape), arrays
    )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Gives this process's examples (see `data_share`) as global arrays split over the mesh."""
    sharding, count = batch_sharding(mesh), data_share(mesh).count
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (len(array) * count, *array.shape[1:]))
        for name, array in batch.items()
    }
