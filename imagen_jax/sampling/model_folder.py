"""The model folder: a cascade's stages and its text encoder, as configs and safetensors.

MODEL/model_index.json names the stages in order and the text encoder; MODEL/<stage>/ holds config.json and
model.safetensors; MODEL/text_encoder/ is a copy of the encoder, or the index refers to one by path or hub id.
"""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from imagen_jax.config import build, nearest, to_dict
from imagen_jax.data.encoder_identity import EncoderIdentity
from imagen_jax.demo import NAME, packaged
from imagen_jax.errors import UserError
from imagen_jax.files import check_regular, exists, is_cloud, make_folder, read_json, write_text
from imagen_jax.models.configs import StageConfig
from imagen_jax.models.network import Params
from imagen_jax.models.weights import (
    WeightReader,
    flatten_names,
    load_state,
    quantise_weights,
    save_state,
)

INDEX = "model_index.json"
WEIGHTS = "model.safetensors"
FORMAT = 1  # of the folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelIndex:
    """Contents of model_index.json."""

    stages: tuple[str, ...]  # folder names, base first
    text_encoder: str  # a folder below the model folder, a path or a hub id
    format: int = FORMAT
    encoder: EncoderIdentity | None = None  # what the text encoder does; None: not known
    encoder_files: str | None = None  # `sampling.identity.encoder_identity` of its files; None: not known


def check_cascade(stages: Sequence[StageConfig]) -> None:
    """Raises UserError unless the stages follow each other: a base, then SR stages that fit."""
    if not stages:
        raise UserError("a cascade needs at least one stage, got none")
    for previous, stage in zip((None, *stages), stages):
        expected = None if previous is None else previous.resolution
        if stage.low_resolution != expected:
            raise UserError(
                f"stage {stage.name!r} enlarges pictures of {stage.low_resolution}, but it follows "
                + (
                    "nothing: the first stage must be a base"
                    if previous is None
                    else f"{previous.name!r} of {expected}"
                )
            )
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise UserError(f"two stages have the same name: {names}")


def save_stage(
    folder: epath.PathLike, config: StageConfig, params: Params, *, dtype: str | None = None
) -> None:
    """Writes MODEL/<stage>/config.json and model.safetensors.

    Args:
      folder: the model folder.
      config: the stage.
      params: its weights.
      dtype: that they are stored in, "int8" with a float32 scale a channel; None: the weights'. A stage computes as
        its config says, whatever is stored.

    Raises:
      UserError: a weight is too large for the dtype, naming it.
    """
    if dtype == "int8":
        params = quantise_weights(params)
    elif dtype is not None:
        params = _cast(params, dtype)
    folder = make_folder(epath.Path(folder) / config.name)
    save_state(params, folder / WEIGHTS)
    write_text(folder / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def _cast(params: Params, dtype: str) -> Params:
    limit = float(jnp.finfo(dtype).max)
    for name, leaf in flatten_names(params)[0].items():
        largest = float(jnp.max(jnp.abs(leaf))) if leaf.size else 0.0
        if largest > limit:
            raise UserError(f"--dtype={dtype}: {name} has {largest:g}, but the largest {dtype} is {limit:g}")
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def save_index(folder: epath.PathLike, index: ModelIndex) -> None:
    """Writes model_index.json: last, so that a folder with an index is complete."""
    write_text(epath.Path(folder) / INDEX, json.dumps(to_dict(index), indent=2) + "\n")


class ModelFolder:
    """A model folder opened for reading; weights are read stage by stage when asked for."""

    def __init__(self, folder: epath.PathLike):
        """Reads the index and the stages' configs.

        Args:
          folder: local or cloud; or "demo", the model in the box.

        Raises:
          UserError: if the folder is missing, is no model folder, or its stages do not fit each other.
        """
        self.name = os.fspath(folder)  # as it was asked for, and as the pictures' records have it
        folder = packaged(folder)
        there = exists(folder)  # asked first: no path is made of an address of a kind that is not read
        self.path = epath.Path(folder)
        if not there or not self.path.is_dir():
            near = nearest(str(folder), [NAME])
            raise UserError(f"--model {folder}: there is no such folder{near}")
        if not (self.path / INDEX).exists():
            raise UserError(f"--model {folder} is not a model folder: it has no {INDEX}")
        self.index = build(ModelIndex, read_json(self.path / INDEX), str(self.path / INDEX))
        if self.index.format > FORMAT:
            raise UserError(
                f"{self.path / INDEX} has format {self.index.format}; this version reads up to {FORMAT}"
            )
        self.stages = tuple(self._stage(name) for name in self.index.stages)
        try:
            check_cascade(self.stages)
        except UserError as error:
            raise UserError(f"{self.path / INDEX}: {error}") from error

    def _stage(self, name: str) -> StageConfig:
        if name in (".", "..") or not re.fullmatch(r"[^/\\\0]+", name):
            raise UserError(
                f"{self.path / INDEX}: {name!r} in 'stages' is no name of a folder in the model folder"
            )
        path = self.path / name / "config.json"
        config = build(StageConfig, read_json(path), str(path))
        if config.name != name:  # the weights are looked for under the config's name
            raise UserError(f"{path}: the stage is called {config.name!r}, but its folder {name!r}")
        return config

    def check_weights(self) -> None:
        """Looks at the beginning of each stage's weights, before anything is compiled for them; cloud files wait.

        Raises:
          UserError: they are missing, cut off or no weights at all; names the file.
        """
        for stage in self.stages:
            path = self.path / stage.name / WEIGHTS
            if is_cloud(path):
                continue
            check_regular(path)
            if not path.exists():
                raise UserError(f"{path} is missing")
            WeightReader(path).close()

    def text_encoder(self) -> str:
        """Path or hub id of the text encoder."""
        inside = self.path / self.index.text_encoder
        return str(inside) if inside.is_dir() else self.index.text_encoder

    def params(self, stage: str, abstract_params: Params, shardings: Any = None) -> Params:
        """Weights of a stage whose parameters have these shapes, put onto `shardings` slice by slice.

        Raises:
          UserError: there are none, or they are of another network.
        """
        path = self.path / stage / WEIGHTS
        if not path.exists():
            raise UserError(f"{path} is missing")
        if shardings is None:
            # A placement of its own spares JAX a small program for each shape.
            shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return load_state(abstract_params, path, shardings=shardings)

    def weight_bytes(self, stage: str) -> int:
        """Size of a stage's weights on disk, and about as many in memory."""
        path = self.path / stage / WEIGHTS
        if not path.exists():
            raise UserError(f"{path} is missing")
        return path.stat().length
