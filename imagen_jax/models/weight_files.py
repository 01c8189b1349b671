"""Safetensors files: which ones hold a network's weights, and a reader of single tensors.

What is refused: pickles, paths out of the folder, quantised weights, Git LFS's stand-ins.
"""

import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from imagen_jax.errors import UserError
from imagen_jax.files import check_no_pointer, check_regular, is_cloud, json_field, read_json

_STEMS = ("model", "diffusion_pytorch_model")  # the names transformers and diffusers save under
_VARIANTS = ("fp16", "bf16")  # tried, in this order, where the folder has no plain file
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")

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

# Under which config.json says that the weights are not what the network's shapes say.
_QUANTISED_CONFIGS = ("quantization_config", "compression_config", "quantization")
# Last parts of the names under which quantised weights, or what belongs to them, are stored: bitsandbytes' 8 and
# 4 bits, GPTQ and AWQ, compressed-tensors, torchao, and the scaled 8-bit floats of ComfyUI.
_QUANTISED_TENSORS = frozenset(
    {
        *("SCB", "weight_format", "absmax", "quant_map", "nested_absmax", "nested_quant_map"),
        *("qweight", "qzeros", "scales", "g_idx"),
        *("weight_scale", "weight_scale_inv", "weight_zero_point", "weight_packed", "weight_shape"),
        *("input_scale", "output_scale", "scale_weight", "scale_input", "scaled_fp8", "zero_point"),
    }
)
_QUANTISED_PARTS = ("bitsandbytes__", "_quantized", "__qdata")


def find_weights(location: epath.Path, variant: str | None) -> epath.Path:
    """The safetensors file, or the index of several, that holds a network's weights.

    Args:
      location: the file or index itself, or a folder.
      variant: "fp16" for `model.fp16.safetensors` and the like; None takes the plain file, and a variant only
        where the folder has nothing else.

    Raises:
      UserError: nothing to read there, or only pickled weights.
    """
    if location.is_file():
        if location.suffix in _PICKLES:
            raise UserError(f"{location}: pickled weights are never loaded; convert them to safetensors")
        return location
    if not location.is_dir():
        raise UserError(f"{location}: no such file or folder")
    for wanted in (variant,) if variant else (None, *_VARIANTS):
        for stem in _STEMS:
            dotted = f".{wanted}" if wanted else ""
            for name in (
                f"{stem}{dotted}.safetensors",
                f"{stem}.safetensors.index{dotted}.json",
                f"{stem}{dotted}.safetensors.index.json",
            ):
                if (location / name).exists():
                    return location / name
    pickles = sorted(p.name for p in location.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise UserError(
            f"{location}: only pickled weights ({pickles[0]}), which are never loaded; convert to safetensors"
        )
    kind = f"{variant} " if variant else ""
    raise UserError(f"{location}: no {kind}safetensors weights (looked for {_STEMS[0]} and {_STEMS[1]})")


def read_index(index: epath.Path) -> dict[str, str]:
    """Tensor name to file name, from a `*.index.json`.

    Raises:
      UserError: it is no such index, or names files that are not beside it.
    """
    content = read_json(index)
    if "weight_map" not in content:
        raise UserError(f"{index}: not an index of safetensors shards (no weight_map)")
    weight_map = json_field(content, "weight_map", dict, str(index))
    for name in weight_map:
        file = json_field(weight_map, name, str, f"{index}: weight_map")
        if not file.endswith(".safetensors") or "/" in file or "\\" in file:
            raise UserError(f"{index}: shard {file} is not a safetensors file beside the index")
    return weight_map


def check_config_is_plain(config: Mapping[str, Any]) -> None:
    """Refuses a network's config.json that says that its weights are quantised.

    Raises:
      UserError: it does; names the field.
    """
    for name in _QUANTISED_CONFIGS:
        if config.get(name) is not None:
            raise UserError(
                f"config.json has {name}: the weights are quantised, which is not supported; "
                "use those in float16, bfloat16 or float32"
            )


def quantised_tensor(names: Iterable[str]) -> str | None:
    """The first of these tensors' names that only quantised weights have; None: they are plain."""

    def is_quantised(name: str) -> bool:
        last = name.rpartition(".")[2]
        return last in _QUANTISED_TENSORS or any(part in name for part in _QUANTISED_PARTS)

    return min(filter(is_quantised, names), default=None)


class SafetensorsReader:
    """Reads single tensors, or slices of them, from safetensors files.

    What is read is mapped, not copied: it takes memory when it is looked at, shared with all who look at the file, and
    stays valid after `close`.

    Args:
        folder_or_file: a `.safetensors` file, a `*.index.json` of a sharded checkpoint, or a folder with
            `model.safetensors`, `diffusion_pytorch_model.safetensors` or the index of either.
        variant: "fp16" for `model.fp16.safetensors` and the like; None takes the plain file, and a
            variant only where the folder has nothing else.

    Raises:
        UserError: nothing to read there, only pickled weights, or an unreadable file.
    """

    def __init__(self, folder_or_file: epath.PathLike, variant: str | None = None):
        self.location = epath.Path(folder_or_file)
        entry = find_weights(self.location, variant)
        self._handles: dict[epath.Path, Any] = {}
        self._data: dict[epath.Path, tuple[np.ndarray, dict[str, Any]]] = {}
        self._scratch: tempfile.TemporaryDirectory | None = None
        self._files: dict[str, epath.Path]
        if entry.suffix == ".json":
            self._files = {name: entry.parent / file for name, file in read_index(entry).items()}
        else:
            self._files = dict.fromkeys(self._open(entry).keys(), entry)

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes every file that was opened; reading again opens it again."""
        for handle in self._handles.values():
            handle.__exit__(None, None, None)
        self._handles.clear()
        self._data.clear()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files)

    @property
    def files(self) -> tuple[epath.Path, ...]:
        """The safetensors files, sorted by name."""
        return tuple(sorted(set(self._files.values())))

    def metadata(self) -> dict[str, str]:
        """The text metadata of all files together."""
        merged: dict[str, str] = {}
        for file in self.files:
            merged.update(self._open(file).metadata() or {})
        return merged

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Dtype of one tensor (bfloat16 is that of ml_dtypes), without reading it."""
        code = self._slice(name).get_dtype()
        if code not in DTYPES:  # 8 bits and fewer of other projects
            raise UserError(
                f"{self._files[name]}: tensor {name} has dtype {code}, which is not supported: "
                "are the weights quantised?"
            )
        return DTYPES[code]

    def check_float(self, name: str) -> None:
        """Refuses a tensor that does not hold a parameter as it is.

        Raises:
            UserError: its dtype is no floating-point one, so that the parameter is quantised or something else.
        """
        if not jnp.issubdtype(found := self.dtype(name), jnp.floating):
            raise UserError(
                f"{self._files[name]}: tensor {name} is {found}: the weights are quantised ({found}), which is "
                "not supported; use those in float16, bfloat16 or float32"
            )

    def check_plain(self) -> None:
        """Refuses files with tensors that belong to quantised weights.

        Raises:
            UserError: there is one; names file, tensor and dtype.
        """
        if (name := quantised_tensor(self.names)) is not None:
            raise UserError(
                f"{self._files[name]}: tensor {name} ({self._slice(name).get_dtype()}) belongs to quantised "
                "weights, which are not supported; use those in float16, bfloat16 or float32"
            )

    def read(self, name: str, index: Sequence[slice] | None = None) -> np.ndarray:
        """One tensor, or only the given slice of it (one slice per axis); read-only.

        Raises:
            UserError: no such tensor, or its dtype is not supported.
        """
        dtype, file = self.dtype(name), self._files[name]
        data, header = self._map(file)
        begin, end = header[name]["data_offsets"]
        whole = data[begin:end].view(dtype).reshape(self.shape(name))
        return whole[tuple(index)] if index else whole

    def _map(self, file: epath.Path) -> tuple[np.ndarray, dict[str, Any]]:
        """The bytes behind a file's header, and the header: 8 bytes of length, then JSON."""
        if file not in self._data:
            self._open(file)  # the library checks that the header fits the file
            with open(self._local(file), "rb") as opened:
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            start = 8 + int.from_bytes(mapped[:8], "little")
            self._data[file] = np.frombuffer(mapped, np.uint8)[start:], json.loads(mapped[8:start])
        return self._data[file]

    def _open(self, file: epath.Path) -> Any:
        if file not in self._handles:
            if not file.exists():
                raise UserError(f"{self.location}: weights file {file.name} is missing; copy it there")
            check_regular(file)
            try:
                local = self._local(file)
                with open(local, "rb") as opened:
                    check_no_pointer(opened.read(64), file)
                self._handles[file] = safe_open(local, framework="numpy")
            except (SafetensorError, OSError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{file}: not a readable safetensors file ({reason})") from error
        return self._handles[file]

    def _local(self, file: epath.Path) -> str:
        """Where the file can be memory-mapped: a cloud file is copied to the local disk first."""
        if not is_cloud(file):
            return os.fspath(file)
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory()
        copy = os.path.join(self._scratch.name, file.name)
        if not os.path.exists(copy):
            file.copy(copy, overwrite=True)
        return copy

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise UserError(f"{self.location}: no tensor {name}; is this the right checkpoint?")
        try:
            return self._open(self._files[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{self._files[name]}: no tensor {name}, though the index names it") from error
