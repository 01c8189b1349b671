"""Weights on disk: from files to NNX state and back, slice by slice.

Three layers. `weight_files.WeightReader` opens what the hub's libraries write (one file, or shards under an
index) and maps single tensors, or slices of them, into memory. `load_tensors` fills an abstract NNX state from any
reader through a table of `TensorSource`: the importer of a foreign checkpoint is that table and nothing
more. `save_state` and `load_state` are the project's own files, whose names are the state's paths.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.files import AtomicFile, make_folder
from imagen_jax.models.safetensors_file import DTYPES
from imagen_jax.models.weight_files import WeightReader
from imagen_jax.parallel.jax_internals import process_allgather

_CODE_OF = {dtype: code for code, dtype in DTYPES.items()}
SCALE = ":int8_scale"  # after a tensor's name, that of what its int8 values are multiplied by
_ALIGNMENT = 64  # bytes: arrays that begin at a multiple of it are used by the CPU where they lie
_TILE = 64  # of rows that are read or written side by side, few enough for the processor's cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSource:
    """Where one tensor of our state comes from in a stored checkpoint."""

    names: tuple[str, ...]  # stored tensors: exactly one, or one per layer where stacked
    # Our axis i is stored axis axes[i]; stored axes that are not among them have length one. None: as stored.
    axes: tuple[int, ...] | None = None
    stacked: bool = False  # whether ours has a leading axis over `names` (layers under a scan)
    # What the stored int8 values are multiplied by: a tensor over our last axis. None: they are values as they are.
    scale: str | None = None

    def __post_init__(self):
        if not self.names or (len(self.names) > 1 and not self.stacked):
            raise ValueError(f"a source that is not stacked has exactly one name, got {self.names!r}")

    def shape(self, reader: WeightReader) -> tuple[int, ...]:
        """Our shape, from the first stored tensor."""
        stored = reader.shape(self.names[0])
        axes = tuple(range(len(stored))) if self.axes is None else self.axes
        if any(size != 1 for axis, size in enumerate(stored) if axis not in axes) or max(
            axes, default=-1
        ) >= len(stored):
            raise UserError(
                f"{reader.location}: tensor {self.names[0]} has shape {stored}, not {len(axes)} axes"
            )
        shape = tuple(stored[axis] for axis in axes)
        return (len(self.names), *shape) if self.stacked else shape

    def read(self, reader: WeightReader, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """The part of our tensor under `index` (one slice per axis) as `dtype`, reading nothing else."""
        if not self.stacked:
            return self._read_one(reader, self.names[0], index).astype(dtype, copy=False)
        # Each layer is converted before they are stacked: the stack is the largest array there is.
        layers = [
            _in_order(self._read_one(reader, name, index[1:]).astype(dtype, copy=False))
            for name in self.names[index[0]]
        ]
        return np.stack(layers) if len(layers) > 1 else layers[0][None]

    def _read_one(self, reader: WeightReader, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if self.scale is not None:
            return reader.read(name, index).astype(np.float32) * reader.read(self.scale, index[-1:])
        if self.axes is None:
            return reader.read(name, index)
        stored_index = [slice(None)] * len(reader.shape(name))
        for ours, stored in enumerate(self.axes):
            stored_index[stored] = index[ours]
        rest = tuple(axis for axis in range(len(stored_index)) if axis not in self.axes)
        found = reader.read(name, stored_index).transpose((*self.axes, *rest))
        return found.reshape(found.shape[: len(self.axes)])


def _in_order(array: np.ndarray) -> np.ndarray:
    """The array in C order. Transposed matrices go tile by tile, several times as fast as NumPy copies them."""
    if array.ndim != 2 or array.flags.c_contiguous or array.size < _TILE**2:
        return np.asarray(array, order="C")
    made = np.empty(array.shape, array.dtype)
    for row in range(0, array.shape[0], _TILE):
        for column in range(0, array.shape[1], _TILE):
            tile = np.s_[row : row + _TILE, column : column + _TILE]
            made[tile] = array[tile]
    return made


def flatten_names(state: Any) -> tuple[dict[str, Any], Any]:
    """Leaves of an NNX state (or any pytree) under dotted path names, and its tree definition.

    `state.down_blocks[0].conv1.kernel` is `down_blocks.0.conv1.kernel`. The order is the tree's.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    named = {}
    for path, leaf in leaves:
        # The last step inside a Variable is its `value`, which is not part of the name.
        keys = [key for key in path if not isinstance(key, jax.tree_util.GetAttrKey)]
        named[".".join(jax.tree_util.keystr((key,), simple=True) for key in keys)] = leaf
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same dotted name")
    return named, treedef


def load_tensors(
    abstract_state: Any,
    reader: WeightReader,
    sources: Mapping[str, TensorSource],
    *,
    shardings: Any = None,
    dtype: Any = None,
) -> Any:
    """Fills an abstract state from stored tensors, at most one tensor (or shard of it) at a time.

    Args:
        abstract_state: an `nnx.State` (or another tree) whose leaves have `shape` and `dtype`, as
            `nnx.eval_shape` makes them.
        reader: the open checkpoint; tensors that no source names are left alone.
        sources: source of each leaf, under its dotted name.
        shardings: one `jax.sharding.Sharding` for all leaves, or a tree like the state; each device's
            part is then read on its own. None: the default device.
        dtype: dtype of the floating-point leaves; None keeps those of `abstract_state`.

    Returns:
        A state like `abstract_state` with `jax.Array` leaves.

    Raises:
        UserError: a stored tensor is missing, quantised, or has another shape than the state's.
    """
    named, treedef = flatten_names(abstract_state)
    check_tensors(named, reader, sources)
    per_leaf = _shardings_of(shardings, list(named))
    leaves = [
        _load_one(leaf, reader, sources[name], sharding, dtype)
        for (name, leaf), sharding in zip(named.items(), per_leaf, strict=True)
    ]
    return jax.tree_util.tree_unflatten(treedef, leaves)


def check_tensors(
    named: Mapping[str, Any], reader: WeightReader, sources: Mapping[str, TensorSource]
) -> None:
    """What `load_tensors` checks before it reads anything.

    Args:
        named: leaves with `shape` and `dtype` under their dotted names.
        reader: the open checkpoint.
        sources: source of each leaf.

    Raises:
        UserError: a stored tensor is missing, quantised, or has another shape than the leaf.
    """
    reader.check_plain()
    for name, leaf in named.items():
        if name not in sources:
            raise UserError(
                f"{reader.location}: no tensor for parameter {name}; is this the right checkpoint?"
            )
        check_dtype(reader, sources[name], leaf.dtype)
        shape = sources[name].shape(reader)
        if shape != tuple(leaf.shape):
            raise UserError(
                f"{reader.location}: tensor {name} has shape {shape}, expected {tuple(leaf.shape)}"
            )
        for other in sources[name].names[1:]:
            if reader.shape(other) != reader.shape(sources[name].names[0]):
                raise UserError(
                    f"{reader.location}: tensor {other} has shape {reader.shape(other)}, unlike its equals"
                )


def check_dtype(reader: WeightReader, source: TensorSource, dtype: Any) -> None:
    """Refuses stored tensors that a parameter cannot be read from: converting integers would make up its values.

    Args:
        reader: the open checkpoint.
        source: of the parameter.
        dtype: of the parameter.

    Raises:
        UserError: the parameter is floating-point and a stored tensor is not, or the other way round; names it.
    """
    if source.scale is not None:
        (name,) = source.names
        dtypes = reader.dtype(name), reader.dtype(source.scale)
        if dtypes != (np.int8, np.float32) or reader.shape(source.scale) != reader.shape(name)[-1:]:
            raise UserError(f"{reader.location}: {source.scale} is no scale of {name}")
        return
    for name in source.names:
        if jnp.issubdtype(dtype, jnp.floating):
            reader.check_float(name)
        elif (found := reader.dtype(name)) != dtype:
            raise UserError(f"{reader.location}: tensor {name} is {found}, expected {np.dtype(dtype)}")


def _shardings_of(shardings: Any, names: list[str]) -> list[jax.sharding.Sharding | None]:
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return [shardings] * len(names)
    by_name, _ = flatten_names(shardings)
    if list(by_name) != names:
        raise ValueError("the shardings are not a tree like the state")
    return list(by_name.values())


def _load_one(
    leaf: Any,
    reader: WeightReader,
    source: TensorSource,
    sharding: jax.sharding.Sharding | None,
    dtype: Any,
) -> jax.Array:
    target = leaf.dtype if dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating) else dtype

    whole = tuple(slice(None) for _ in leaf.shape)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        return _in_order(source.read(reader, whole if index is None else index, target))

    if sharding is not None:
        return jax.make_array_from_callback(tuple(leaf.shape), sharding, part)
    return jnp.asarray(part(None))


def save_state(state: Any, path: epath.PathLike, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a state's arrays to one safetensors file, under their dotted path names.

    One tensor at a time is in host memory. The file appears under its name only when it is complete. The
    same state gives the same bytes. With several processes every one has to call this; the first writes.

    Args:
        state: an `nnx.State` of array leaves (filter out random keys: `nnx.state(model, nnx.Param)`).
        path: the file to write, usually `*.safetensors`; its folder is made where it is missing.
        metadata: text to keep in the header.

    Raises:
        ValueError: a leaf is not an array of a dtype that safetensors knows.
    """
    named, _ = flatten_names(state)
    for name, leaf in named.items():
        if _is_key(leaf) or np.dtype(leaf.dtype) not in _CODE_OF:
            raise ValueError(f"{name} has dtype {leaf.dtype}, which safetensors cannot hold")
    sizes = {name: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for name, leaf in named.items()}

    def place(name: str) -> tuple[bool, int, str]:
        # Those that leave the next one aligned come first; of the others, widest first keeps every tensor aligned to
        # its own items, as the library's own writer does.
        return sizes[name] % _ALIGNMENT != 0, -np.dtype(named[name].dtype).itemsize, name

    order = sorted(named, key=place)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        header[name] = {
            "dtype": _CODE_OF[np.dtype(named[name].dtype)],
            "shape": list(named[name].shape),
            "data_offsets": [offset, offset + sizes[name]],
        }
        offset += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    _write_file(epath.Path(path), text, [named[name] for name in order])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _write_file(path: epath.Path, header: bytes, leaves: list[Any]) -> None:
    first = jax.process_index() == 0
    if not first:
        for leaf in leaves:
            _to_host(leaf)
        return
    make_folder(path.parent)
    with AtomicFile(path, tag="partial") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for leaf in leaves:
            # As bytes of the array itself: `tobytes` would hold a second copy of the largest tensor.
            file.write(np.ascontiguousarray(_to_host(leaf)).reshape(-1).view(np.uint8).data)


def _to_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def quantise_weights(state: Any) -> dict[str, Any]:
    """A state's tensors by name, those of two and more axes in int8 and beside them what to multiply them by.

    The largest magnitude of each index of the last axis (an output channel) becomes 127, so that a value is right to
    within 1/254 of its channel's largest.
    """
    tensors: dict[str, Any] = {}
    for name, leaf in flatten_names(state)[0].items():
        if leaf.ndim < 2:
            tensors[name] = leaf
            continue
        values = _to_host(leaf).astype(np.float32)
        largest = np.abs(values).max(axis=tuple(range(leaf.ndim - 1)))
        scale = np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(127)
        tensors[name] = np.rint(values / scale).astype(np.int8)
        tensors[name + SCALE] = scale
    return tensors


def load_state(abstract_state: Any, path: epath.PathLike, *, shardings: Any = None, dtype: Any = None) -> Any:
    """Reads what `save_state` wrote, `quantise_weights` before it or not, as a state like `abstract_state`.

    Args:
        abstract_state: an `nnx.State` (or another tree) whose leaves have `shape` and `dtype`, as
            `nnx.eval_shape` makes them.
        path: the file, or a folder or index that `WeightReader` accepts.
        shardings: one sharding for all leaves, or a tree like the state: each tensor then goes slice by
            slice onto its devices. None: the default device.
        dtype: dtype of the floating-point leaves; None keeps those of `abstract_state`.

    Raises:
        UserError: naming the first tensor that is missing, unexpected, quantised or of another shape.
    """
    names = list(flatten_names(abstract_state)[0])
    with WeightReader(path) as reader:
        reader.check_plain()
        for name in names:
            if name not in reader.names:
                raise UserError(f"{path}: tensor {name} is missing; the file is of another network")
        scales = {name: name + SCALE for name in names if name + SCALE in reader.names}
        unexpected = sorted(reader.names - set(names) - set(scales.values()))
        if unexpected:
            raise UserError(f"{path}: unexpected tensor {unexpected[0]}; the file is of another network")
        sources = {name: TensorSource(names=(name,), scale=scales.get(name)) for name in names}
        return load_tensors(abstract_state, reader, sources, shardings=shardings, dtype=dtype)
