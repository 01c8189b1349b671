"""Files of weights: which ones hold a network's, and a reader of single tensors.

Safetensors, or where a folder has none of these, what PyTorch has pickled, of which tensors are read and nothing else
(`models.torch_files`). What is refused: other pickles, paths out of the folder, quantised weights, Git LFS's stand-ins.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.files import check_no_pointer, check_regular, is_cloud, json_field, read_json
from imagen_jax.models.safetensors_file import SafetensorsFile
from imagen_jax.models.torch_files import TorchFile

# The names transformers and diffusers save under, by what their files end in.
_STEMS = {
    ".safetensors": ("model", "diffusion_pytorch_model"),
    ".bin": ("pytorch_model", "diffusion_pytorch_model"),
}
_VARIANTS = ("fp16", "bf16")  # tried, in this order, where the folder has no plain file
_TORCH = (".bin", ".pt", ".pth")
_PICKLES = (".ckpt", ".msgpack", ".h5")

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
    """The file of weights, or the index of several, that holds a network's.

    Args:
      location: the file or index itself, or a folder.
      variant: "fp16" for `model.fp16.safetensors` and the like; None takes the plain file, and a variant only
        where the folder has nothing else.

    Raises:
      UserError: nothing to read there, or only weights of other kinds.
    """
    if location.is_file():
        if location.suffix in _PICKLES:
            raise UserError(f"{location}: {location.suffix} is never loaded; convert it to safetensors")
        return location
    if not location.is_dir():
        raise UserError(f"{location}: no such file or folder")
    for ending, stems in _STEMS.items():
        for wanted in (variant,) if variant else (None, *_VARIANTS):
            for stem in stems:
                dotted = f".{wanted}" if wanted else ""
                for name in (
                    f"{stem}{dotted}{ending}",
                    f"{stem}{ending}.index{dotted}.json",
                    f"{stem}{dotted}{ending}.index.json",
                ):
                    if (location / name).exists():
                        return location / name
    others = sorted(p.name for p in location.iterdir() if p.suffix in (*_PICKLES, *_TORCH))
    if others:
        raise UserError(
            f"{location}: only weights of other kinds ({others[0]}), which are never loaded; convert to safetensors"
        )
    kind = f"{variant} " if variant else ""
    names = ", ".join(f"{stem}{ending}" for ending, stems in _STEMS.items() for stem in stems)
    raise UserError(f"{location}: no {kind}weights (looked for {names} and indexes of them)")


def read_index(index: epath.Path) -> dict[str, str]:
    """Tensor name to file name, from a `*.index.json`.

    Raises:
      UserError: it is no such index, or names files that are not beside it.
    """
    content = read_json(index)
    if "weight_map" not in content:
        raise UserError(f"{index}: not an index of shards (no weight_map)")
    weight_map = json_field(content, "weight_map", dict, str(index))
    for name in weight_map:
        file = json_field(weight_map, name, str, f"{index}: weight_map")
        if not file.endswith(tuple(_STEMS)) or "/" in file or "\\" in file:
            raise UserError(f"{index}: shard {file} is not a file of weights beside the index")
    return weight_map


def weight_bytes(location: epath.Path) -> int:
    """Size of the files that hold a network's weights, and about as many bytes in memory; arguments as `find_weights`.

    Raises:
      UserError: as `find_weights` and `read_index`.
    """
    entry = find_weights(location, None)
    files = {entry}
    if entry.suffix == ".json":
        files = {entry.parent / file for file in read_index(entry).values()}
    return sum(file.stat().length for file in files)


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


class WeightReader:
    """Reads single tensors, or slices of them, from files of weights.

    What is read is mapped, not copied: it takes memory when it is looked at, shared with all who look at the file, and
    stays valid after `close`.

    Args:
        folder_or_file: a `.safetensors` file, one that PyTorch has pickled (`.bin`, `.pt`, `.pth`), a `*.index.json` of
            a sharded checkpoint, or a folder with any of these under the names that transformers and diffusers use.
        variant: "fp16" for `model.fp16.safetensors` and the like; None takes the plain file, and a
            variant only where the folder has nothing else.

    Raises:
        UserError: nothing to read there, only weights of other kinds, or an unreadable file.
    """

    def __init__(self, folder_or_file: epath.PathLike, variant: str | None = None):
        self.location = epath.Path(folder_or_file)
        entry = find_weights(self.location, variant)
        self._opened: dict[epath.Path, SafetensorsFile | TorchFile] = {}
        self._scratch: tempfile.TemporaryDirectory | None = None
        self._files: dict[str, epath.Path]
        if entry.suffix == ".json":
            self._files = {name: entry.parent / file for name, file in read_index(entry).items()}
        else:
            self._files = dict.fromkeys(self._open(entry).names, entry)

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes every file that was opened; reading again opens it again."""
        for file in self._opened.values():
            file.close()
        self._opened.clear()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files)

    @property
    def files(self) -> tuple[epath.Path, ...]:
        """The files of weights, sorted by name."""
        return tuple(sorted(set(self._files.values())))

    def metadata(self) -> dict[str, str]:
        """The text metadata of all files together."""
        merged: dict[str, str] = {}
        for file in self.files:
            merged.update(self._open(file).metadata())
        return merged

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Dtype of one tensor (bfloat16 is that of ml_dtypes), without reading it."""
        return self._file(name).dtype(name)

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
                f"{self._files[name]}: tensor {name} ({self._file(name).dtype_name(name)}) belongs to quantised "
                "weights, which are not supported; use those in float16, bfloat16 or float32"
            )

    def read(self, name: str, index: Sequence[slice] | None = None) -> np.ndarray:
        """One tensor, or only the given slice of it (one slice per axis); read-only.

        Raises:
            UserError: no such tensor, or its dtype is not supported.
        """
        whole = self._file(name).array(name)
        return whole[tuple(index)] if index else whole

    def _open(self, file: epath.Path) -> SafetensorsFile | TorchFile:
        if file not in self._opened:
            if not file.exists():
                raise UserError(f"{self.location}: weights file {file.name} is missing; copy it there")
            check_regular(file)
            try:
                local = self._local(file)
                with open(local, "rb") as opened:
                    check_no_pointer(opened.read(64), file)
            except OSError as error:
                raise UserError(f"{file}: not readable ({error.strerror or error})") from error
            kind = TorchFile if file.suffix in _TORCH else SafetensorsFile
            self._opened[file] = kind(local, file)
        return self._opened[file]

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

    def _file(self, name: str) -> SafetensorsFile | TorchFile:
        """The open file of a tensor."""
        if name not in self._files:
            raise UserError(f"{self.location}: no tensor {name}; is this the right checkpoint?")
        file = self._open(self._files[name])
        if name not in file.names:
            raise UserError(f"{self._files[name]}: no tensor {name}, though the index names it")
        return file
