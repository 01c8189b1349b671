"""Arrays that are read one at a time while a file is written."""

from typing import Any

import numpy as np


class LazyTensor:
    """An array that is read or made when it is asked for, and not kept."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Any):
        self.shape, self.dtype, self._read = shape, np.dtype(dtype), read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._read()
