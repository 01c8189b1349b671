"""DeepFloyd stages, ours or fine-tuned, as pipeline folders that diffusers opens."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from imagen_jax.convert.deepfloyd.network import diffusers_config, unet_sources
from imagen_jax.convert.deepfloyd.stage import scheduler_config
from imagen_jax.convert.lazy import LazyTensor
from imagen_jax.errors import UserError
from imagen_jax.files import exists, json_field, read_json
from imagen_jax.models.configs import StageConfig
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.weights import WeightReader, save_state
from imagen_jax.sampling.identity import check_encoder, has_files_of
from imagen_jax.sampling.model_folder import WEIGHTS, ModelFolder
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.encoder_folder import copy_encoder

_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def _stored_form(name: str, ours: Any) -> np.ndarray:
    """A parameter as diffusers keeps it."""
    array = np.asarray(ours)
    if not name.endswith(".kernel"):
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    array = array.T
    return array[:, :, None, None] if name.endswith(".shortcut.kernel") else array


def _export_network(folder: epath.Path, stage: StageConfig, params: Mapping[str, Any]) -> None:
    """Writes FOLDER/unet and the schedulers."""
    try:
        config = diffusers_config(stage.network, stage.resolution)
        scheduler = scheduler_config(stage)
    except UserError as error:
        raise UserError(f"stage {stage.name!r}: {error}") from error
    sources = unet_sources(StageNetwork(stage).abstract_params)
    leaves = {}
    for name, leaf in params.items():
        shape = _stored_form(name, np.broadcast_to(np.zeros((), np.int8), leaf.shape)).shape
        leaves[sources[name].names[0]] = LazyTensor(
            shape, leaf.dtype, functools.partial(_stored_form, name, leaf)
        )
    unet = folder / "unet"
    save_state(leaves, unet / _DIFFUSERS_WEIGHTS, metadata={"format": "pt"})  # else diffusers refuses it
    (unet / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("scheduler",) if stage.low_resolution is None else ("scheduler", "image_noising_scheduler"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")


def _pipeline_index(stage: StageConfig) -> dict[str, Any]:
    """model_index.json of a pipeline without safety checker and watermarker."""
    optional = {name: [None, None] for name in ("safety_checker", "feature_extractor", "watermarker")}
    index: dict[str, Any] = {
        "_class_name": "IFPipeline" if stage.low_resolution is None else "IFSuperResolutionPipeline",
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        **optional,
    }
    if stage.low_resolution is not None:
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
    return index


def _tokenizer_class(folder: epath.Path) -> str:
    """The class that diffusers is to open a tokenizer with: it knows no AutoTokenizer."""
    path = folder / "tokenizer_config.json"
    content = read_json(path) if exists(path) else {}
    name = json_field(content, "tokenizer_class", str, str(path), default="")
    # What transformers 5 calls it, and what diffusers knows it by.
    return "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name or "T5Tokenizer"


def export_pipeline(
    folder: epath.PathLike, stage: StageConfig, params: Mapping[str, Any], *, text_encoder: str | None
) -> None:
    """Writes a DeepFloyd stage as a pipeline folder that diffusers opens, tensor by tensor.

    Args:
      folder: of the pipeline.
      stage: a DeepFloyd stage.
      params: its parameters, as arrays or as what becomes one under `np.asarray`.
      text_encoder: a local folder, which is copied; without one the pipeline has none, and takes embeddings.

    Raises:
      UserError: the stage has no form in diffusers.
    """
    target = epath.Path(folder)
    _export_network(target, stage, params)
    index = _pipeline_index(stage)
    if text_encoder is not None and epath.Path(text_encoder).is_dir():
        copy_encoder(text_encoder, target / "text_encoder", tokenizer=target / "tokenizer")
        index["tokenizer"] = ["transformers", _tokenizer_class(target / "tokenizer")]
    else:
        index |= {name: [None, None] for name in ("text_encoder", "tokenizer")}
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def export_diffusers(
    model: epath.PathLike, out: epath.PathLike, *, text_encoder: str | None = None
) -> list[str]:
    """Writes each stage of a model folder by `export_pipeline`: OUT/<stage>/.

    Args:
      model: the model folder.
      out: gets a folder for each stage.
      text_encoder: a local folder; None: the model folder's.

    Returns:
      The folders' names.

    Raises:
      UserError: not a model folder, or a stage that is not of DeepFloyd.
    """
    folder = ModelFolder(model)
    encoder = text_encoder or folder.text_encoder()
    if epath.Path(encoder).is_dir() and not has_files_of(folder, encoder):
        check_encoder(folder, TextEncoder.load(encoder, dtype="bfloat16"))
    for stage in folder.stages:
        with WeightReader(folder.path / stage.name / WEIGHTS) as reader:
            for name in sorted(reader.names):
                reader.check_float(name)
            stored = {
                name: LazyTensor(reader.shape(name), reader.dtype(name), functools.partial(reader.read, name))
                for name in sorted(reader.names)
            }
            export_pipeline(epath.Path(out) / stage.name, stage, stored, text_encoder=encoder)
    return [stage.name for stage in folder.stages]
