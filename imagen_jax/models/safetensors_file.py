"""One safetensors file: its tensors, mapped and not copied."""

import json
import mmap
import os
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from imagen_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class SafetensorsFile:
    """An open file; arrays that were read from it stay valid after `close`.

    Args:
        local: of the local disk.
        name: what errors call it.

    Raises:
        UserError: it is no such file.
    """

    def __init__(self, local: str, name: os.PathLike):
        self._local, self._name = local, os.fspath(name)
        self._data: tuple[np.ndarray, dict[str, Any]] | None = None
        try:
            self._handle = safe_open(local, framework="numpy")
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self._name}: not a readable safetensors file ({reason})") from error
        self.names = frozenset(self._handle.keys())

    def close(self) -> None:
        """Closes it; what was mapped stays."""
        self._handle.__exit__(None, None, None)

    def metadata(self) -> dict[str, str]:
        """The text beside the tensors."""
        return self._handle.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._handle.get_slice(name).get_shape())

    def dtype_name(self, name: str) -> str:
        """What the file calls a tensor's dtype."""
        return self._handle.get_slice(name).get_dtype()

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor.

        Raises:
            UserError: it is not supported: 8 bits and fewer of other projects.
        """
        code = self.dtype_name(name)
        if code not in DTYPES:
            raise UserError(
                f"{self._name}: tensor {name} has dtype {code}, which is not supported: "
                "are the weights quantised?"
            )
        return DTYPES[code]

    def array(self, name: str) -> np.ndarray:
        """A tensor, mapped and read-only."""
        if self._data is None:
            with open(self._local, "rb") as opened:
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            # 8 bytes of length, then JSON, of which the library has checked that it fits the file.
            start = 8 + int.from_bytes(mapped[:8], "little")
            self._data = np.frombuffer(mapped, np.uint8)[start:], json.loads(mapped[8:start])
        data, header = self._data
        begin, end = header[name]["data_offsets"]
        return data[begin:end].view(self.dtype(name)).reshape(self.shape(name))
