"""PyTorch's files of pickled weights, from which tensors are read and nothing is run.

A pickle is a program that may call any function by its name. The one here gets nothing but the dozen names that a
dictionary of tensors needs, each of them a stand-in that notes where the tensor lies; any other name refuses the file.
Both forms that `torch.save` has had are read: a zip archive, and pickles one after the other with the numbers behind.
"""

import collections
import io
import mmap
import os
import pickle
import struct
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.limits import shown

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older form
_PROTOCOL = 1001  # and its second
_PICKLE_BYTES = 256 * 2**20  # a list of names and shapes; larger than any network's
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a file in a zip archive

_STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


# These three are tuples: a pickle may set the attributes of any object that has such, frozen or not.


class _StorageKind(NamedTuple):
    """In the place of a class such as torch.FloatStorage."""

    dtype: np.dtype


class _Storage(NamedTuple):
    """Numbers in the file, under a key."""

    key: str
    dtype: np.dtype
    length: int


class StoredTensor(NamedTuple):
    """Where a tensor's numbers are."""

    storage: str  # its key
    dtype: np.dtype
    first: int  # its first number, counted from the storage's
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers

    @property
    def end(self) -> int:
        """One more than its last number."""
        if 0 in self.shape:
            return self.first
        return self.first + 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _rebuild_tensor(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """What torch._utils._rebuild_tensor_v2 is called with: gradients and hooks are of no concern."""
    sizes = (shape, strides)
    if not (
        isinstance(storage, _Storage)
        and _is_count(first)
        and all(isinstance(each, tuple) and all(map(_is_count, each)) for each in sizes)
        and len(shape) == len(strides)
    ):
        raise pickle.UnpicklingError("a tensor without storage, shape or strides")
    tensor = StoredTensor(storage=storage.key, dtype=storage.dtype, first=first, shape=shape, strides=strides)
    if tensor.end > storage.length:
        raise pickle.UnpicklingError(f"a tensor that ends at {tensor.end} of {storage.length} numbers")
    return tensor


def _rebuild_parameter(tensor: Any, *_: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise pickle.UnpicklingError("a parameter that is no tensor")
    return tensor


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageKind(dtype) for name, dtype in _STORAGES.items()},
}


class _TensorsOnly(pickle.Unpickler):
    """Knows `_NAMES` and no other."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name."""
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(
                f"it asks for {shown(f'{module}.{name}')}, which is no part of a tensor"
            )
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a tensor refers to."""
        match pid:
            case ("storage", _StorageKind(dtype), str(key), str(), int(length), *view) if (
                length >= 0 and view in ([], [None])
            ):
                return _Storage(key=key, dtype=dtype, length=length)
        raise pickle.UnpicklingError(f"a storage of another form: {shown(pid)}")


def _load(file: io.BufferedIOBase) -> Any:
    return _TensorsOnly(file).load()


class TorchFile:
    """An open file of pickled weights: its tensors by name.

    Args:
        local: of the local disk.
        name: what errors call it.

    Raises:
        UserError: it is no such file, holds something else than tensors, or is cut off.
    """

    def __init__(self, local: os.PathLike | str, name: epath.PathLike):
        self._name = os.fspath(name)
        try:
            with open(local, "rb") as file:
                # Of an empty file no map can be made.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._bytes = np.frombuffer(mapped, np.uint8)
                is_zip = zipfile.is_zipfile(file)
                file.seek(0)
                found = self._read_zip(file) if is_zip else self._read_sequence(file)
        except UserError:
            raise
        # All that a pickle of anything can lead to: operations on objects that do not have them.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self._name}: not weights that PyTorch has pickled ({reason})") from error
        self._tensors = self._checked(found)
        self.names = frozenset(self._tensors)

    def close(self) -> None:
        """Nothing is open; what was mapped stays."""

    def metadata(self) -> dict[str, str]:
        """There is no text beside the tensors."""
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor."""
        return self._tensors[name].dtype

    def dtype_name(self, name: str) -> str:
        """What NumPy calls a tensor's dtype."""
        return str(self.dtype(name))

    def _read_zip(self, file: io.BufferedIOBase) -> Any:
        self._offsets: dict[str, tuple[int, int]] = {}
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            [pickled] = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
            root = pickled.removesuffix("data.pkl")
            if entries[pickled].file_size > _PICKLE_BYTES:
                raise UserError(f"{self._name}: its list of tensors has {entries[pickled].file_size} bytes")
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise UserError(f"{self._name}: its numbers are not in little-endian order")
            for name, entry in entries.items():
                if name.startswith(f"{root}data/") and entry.compress_type == zipfile.ZIP_STORED:
                    begin = self._data_offset(entry.header_offset)
                    self._offsets[name.removeprefix(f"{root}data/")] = begin, begin + entry.file_size
            return _load(io.BytesIO(archive.read(pickled)))

    def _data_offset(self, header: int) -> int:
        """Where an archive's entry begins behind its header."""
        fields = _LOCAL_HEADER.unpack(self._bytes[header : header + _LOCAL_HEADER.size].tobytes())
        if fields[0] != b"PK\x03\x04":
            raise UserError(f"{self._name}: the archive's entries are not where its list says")
        return header + _LOCAL_HEADER.size + fields[-2] + fields[-1]

    def _read_sequence(self, file: io.BufferedIOBase) -> Any:
        if _load(file) != _MAGIC or _load(file) != _PROTOCOL:
            raise UserError(f"{self._name}: not weights that PyTorch has pickled")
        _load(file)  # the sizes of integers on the machine that wrote it
        found, keys = _load(file), _load(file)
        dtypes = {each.storage: each.dtype for each in _tensors(found).values()}
        self._offsets = {}
        place = file.tell()
        for key in keys:
            count = int.from_bytes(self._bytes[place : place + 8].tobytes(), "little")
            begin = place + 8
            # A storage that no tensor has needs no place, but the ones behind it do.
            if key not in dtypes:
                raise UserError(f"{self._name}: storage {shown(key)} belongs to no tensor")
            place = begin + count * dtypes[key].itemsize
            self._offsets[key] = begin, place
        return found

    def _checked(self, found: Any) -> dict[str, StoredTensor]:
        """The tensors of what was unpickled, every one within the file."""
        tensors = _tensors(found)
        if not tensors or len(tensors) < dict.__len__(found):
            raise UserError(f"{self._name}: it holds something else than a dictionary of tensors")
        for name, tensor in tensors.items():
            begin, end = self._offsets.get(tensor.storage, (0, 0))
            if end > len(self._bytes) or tensor.end * tensor.dtype.itemsize > end - begin:
                raise UserError(f"{self._name}: tensor {name} is not all there; is the file cut off?")
        return tensors

    def array(self, name: str) -> np.ndarray:
        """A tensor, mapped and read-only."""
        tensor = self._tensors[name]
        begin, _ = self._offsets[tensor.storage]
        width = tensor.dtype.itemsize
        numbers = self._bytes[begin + tensor.first * width : begin + tensor.end * width].view(tensor.dtype)
        strides = tuple(width * step for step in tensor.strides)
        return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)


def _tensors(found: Any) -> dict[str, StoredTensor]:
    """The tensors of a dictionary under their names."""
    if not isinstance(found, dict):
        return {}
    return {
        name: each
        for name, each in dict.items(found)  # not its attribute, which the pickle may have set
        if isinstance(name, str) and isinstance(each, StoredTensor)
    }
