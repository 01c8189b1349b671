"""`imagen-jax import deepfloyd`: pipelines in diffusers' folders into a model folder."""

import dataclasses
import functools
import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from imagen_jax.config import to_dict
from imagen_jax.convert.deepfloyd.network import unet_sources
from imagen_jax.convert.deepfloyd.stage import stage_config
from imagen_jax.convert.lazy import LazyTensor
from imagen_jax.errors import UserError
from imagen_jax.files import exists, read_json
from imagen_jax.models.configs import StageConfig
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.weights import TensorSource, WeightReader, check_dtype, save_state
from imagen_jax.sampling.identity import index_encoder
from imagen_jax.sampling.model_folder import WEIGHTS, ModelIndex, check_cascade, save_index
from imagen_jax.text.encoder_folder import check_encoder_folder, copy_encoder, is_hub_id, split_hub_id
from imagen_jax.text.tokenizer import TOKENIZER_FILES


def _read_whole(
    reader: WeightReader, source: TensorSource, shape: tuple[int, ...], dtype: Any, bar: tqdm
) -> np.ndarray:
    found = source.read(reader, tuple(slice(None) for _ in shape), dtype)
    bar.update(found.nbytes)
    return found


def write_stage(
    out: epath.PathLike, config: StageConfig, weights: epath.PathLike, variant: str | None
) -> None:
    """Streams diffusers' weights into MODEL/<stage>/model.safetensors, and writes its config.json.

    Args:
      out: the model folder.
      config: the stage's.
      weights: folder (or file, or index) of the weights.
      variant: "fp16" for files so called; see `WeightReader`.

    Raises:
      UserError: a tensor is missing, unexpected, quantised or of another shape, naming it.
    """
    abstract = StageNetwork(config).abstract_params
    sources = unet_sources(abstract)
    dtype = jnp.dtype(config.network.param_dtype)
    with WeightReader(weights, variant) as reader:
        reader.check_plain()
        named = {source.names[0] for source in sources.values()}
        if missing := sorted(named - reader.names):
            raise UserError(f"{weights}: tensor {missing[0]} is missing; config.json is of another network")
        if unexpected := sorted(reader.names - named):
            raise UserError(
                f"{weights}: unexpected tensor {unexpected[0]}; config.json is of another network"
            )
        for name, leaf in abstract.items():
            check_dtype(reader, sources[name], leaf.dtype)
            if (shape := sources[name].shape(reader)) != leaf.shape:
                raise UserError(
                    f"{weights}: tensor {sources[name].names[0]} is {shape}, expected {leaf.shape}"
                )
        total = sum(leaf.size for leaf in abstract.values()) * dtype.itemsize
        folder = epath.Path(out) / config.name
        folder.mkdir(parents=True, exist_ok=True)
        with tqdm(total=total, unit="B", unit_scale=True, desc=config.name) as bar:
            leaves = {
                name: LazyTensor(
                    leaf.shape,
                    dtype,
                    functools.partial(_read_whole, reader, sources[name], leaf.shape, dtype, bar),
                )
                for name, leaf in abstract.items()
            }
            save_state(leaves, folder / WEIGHTS)
        (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What `import_deepfloyd` reads and writes. Sources are folders, or hub ids as "owner/name"."""

    stage1: str
    out: str  # the model folder
    stage2: str | None = None
    text_encoder: str | None = None  # None: the one beside stage I's network
    dtype: str = "float32"  # or "bfloat16": of parameters and computation
    variant: str | None = None  # "fp16" for files so called
    copy_text_encoder: bool = True  # else the model folder refers to it

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")


def import_deepfloyd(config: ImportConfig) -> tuple[StageConfig, ...]:
    """Writes a model folder from DeepFloyd pipelines in diffusers' format.

    Args:
      config: what and where to.

    Returns:
      The stages, base first.

    Raises:
      UserError: a source is missing, gated or not of DeepFloyd, naming the flag.
    """
    out = epath.Path(config.out)
    stages: list[StageConfig] = []
    weights: list[epath.Path] = []
    encoder = config.text_encoder
    for number, source in enumerate(filter(None, (config.stage1, config.stage2)), start=1):
        flag = f"--stage{number}"
        with_text = number == 1 and encoder is None
        folder = fetch(source, flag, variant=config.variant, text_encoder=with_text)
        if with_text:
            if not (folder / "text_encoder").is_dir():
                raise UserError(f"{flag} {source} has no text_encoder folder; name one with --text_encoder")
            encoder = os.fspath(folder)
        unet = folder / "unet" if (folder / "unet").is_dir() else folder
        scheduler = folder / "scheduler" / "scheduler_config.json"
        try:
            stages.append(
                stage_config(
                    read_json(unet / "config.json"),
                    read_json(scheduler) if exists(scheduler) else None,
                    low_resolution=stages[-1].resolution if stages else None,
                    dtype=config.dtype,
                )
            )
        except UserError as error:
            raise UserError(f"{flag} {source}: {error}") from error
        weights.append(unet)
    check_cascade(stages)
    assert encoder is not None
    reference, place = encoder, epath.Path(encoder)
    # Before gigabytes are written for it.
    if place.is_dir():
        check_encoder_folder(place, variant=config.variant)
    elif not is_hub_id(encoder):
        raise UserError(f"--text_encoder {encoder}: no such folder, nor a hub id")
    for stage, folder in zip(stages, weights, strict=True):
        write_stage(out, stage, folder, config.variant)
    if config.copy_text_encoder and place.is_dir():
        reference, place = "text_encoder", out / "text_encoder"
        copy_encoder(encoder, place, variant=config.variant)
    identity, files = index_encoder(place) if place.is_dir() else (None, None)
    names = tuple(stage.name for stage in stages)
    index = ModelIndex(stages=names, text_encoder=reference, encoder=identity, encoder_files=files)
    save_index(out, index)
    return tuple(stages)


def fetch(source: str, flag: str, *, variant: str | None, text_encoder: bool) -> epath.Path:
    """The folder of a pipeline or network: a local one, or the hub's copy of what is needed of it.

    Args:
      source: folder or hub id.
      flag: that named it.
      variant: of the weights.
      text_encoder: whether the pipeline's text encoder is needed too.

    Raises:
      UserError: neither, or gated, or no network, with what to do.
    """
    folder = epath.Path(source)
    if folder.is_dir():
        return folder
    if not is_hub_id(source):
        raise UserError(f"{flag} {source}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    dot = "" if variant is None else f".{variant}"
    parts = ("unet", "text_encoder") if text_encoder else ("unet",)
    wanted = ["scheduler/*.json", *(f"tokenizer/{name}" for name in TOKENIZER_FILES)] + [
        f"{part}/config.json" for part in parts
    ]
    for part in parts:
        wanted += [f"{part}/*{dot}.safetensors", f"{part}/*{dot}*.safetensors", f"{part}/*{dot}*.json"]
    unwanted = ["*.non_ema.*"] + (["*.fp16.*", "*.fp16-*", "*.bf16.*"] if variant is None else [])
    repository, revision = split_hub_id(source)
    try:
        return epath.Path(
            snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted)
        )
    except HFValidationError as error:
        raise UserError(f"{flag} {source}: neither a folder nor a hub id") from error
    except GatedRepoError as error:
        raise UserError(
            f"{flag} {source}: the weights are gated; accept their licence on the model's page, then "
            "log in with that account's token (`hf auth login`) and run the command again"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(
            f"{flag} {source}: no such folder, and not to be had from the hub ({type(error).__name__}); "
            "check the name and the network, or give a local folder"
        ) from error
