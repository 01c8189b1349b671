"""DeepFloyd IF's pipelines in diffusers' folders, into a model folder and back.

Weights are streamed: one tensor at a time is in memory, whatever the size of the file. Nothing pickled is read.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from imagen_jax.config import to_dict
from imagen_jax.diffusion.augmentation import NoiseAugmentation
from imagen_jax.diffusion.grids import Grid, GridConfig
from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.diffusion.schedules import DiscreteCosineSchedule
from imagen_jax.diffusion.thresholding import Threshold, ThresholdConfig
from imagen_jax.errors import UserError
from imagen_jax.files import exists, json_field, read_json
from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.models.deepfloyd_files import diffusers_config, unet_config, unet_sources
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.weight_files import check_config_is_plain
from imagen_jax.models.weights import SafetensorsReader, TensorSource, check_dtype, save_state
from imagen_jax.sampling.identity import check_encoder, has_files_of, index_encoder
from imagen_jax.sampling.model_folder import WEIGHTS, ModelFolder, ModelIndex, check_cascade, save_index
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.encoder_folder import check_encoder_folder, copy_encoder, is_hub_id
from imagen_jax.text.tokenizer import TOKENIZER_FILES

TEXT_LENGTH = 77  # tokens to which every caption is padded
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SCHEDULER = "scheduler_config.json"

# Flags of the scheduler with one supported value, and diffusers' default where the file leaves it out.
_SCHEDULER_FIXED: dict[str, tuple[Any, Any]] = {
    "beta_schedule": ("squaredcos_cap_v2", "linear"),
    "prediction_type": ("epsilon", "epsilon"),
    "timestep_spacing": ("leading", "leading"),
    "steps_offset": (0, 0),
    "trained_betas": (None, None),
    "rescale_betas_zero_snr": (False, False),
    "clip_sample_range": (1.0, 1.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Defaults:
    """How diffusers' pipeline samples a stage unless told otherwise."""

    steps: int
    guidance_weight: float
    max_scale: float  # of dynamic thresholding, where there is no scheduler_config.json
    aug_level: float  # noise_level / 1000


_BASE = _Defaults(steps=100, guidance_weight=7.0, max_scale=1.5, aug_level=0.0)
_SUPER = _Defaults(steps=50, guidance_weight=4.0, max_scale=1.0, aug_level=0.25)


def _number(scheduler: Mapping[str, Any], name: str, default: float) -> float:
    return json_field(scheduler, name, float, _SCHEDULER, default=default)


def _flag(scheduler: Mapping[str, Any], name: str, *, default: bool) -> bool:
    return json_field(scheduler, name, bool, _SCHEDULER, default=default)


def _threshold(scheduler: Mapping[str, Any]) -> ThresholdConfig:
    dynamic = _flag(scheduler, "thresholding", default=False)
    static = _flag(scheduler, "clip_sample", default=True)
    if dynamic:
        return ThresholdConfig(
            kind=Threshold.DYNAMIC,
            percentile=100.0 * _number(scheduler, "dynamic_thresholding_ratio", 0.995),
            max_scale=_number(scheduler, "sample_max_value", 1.0),
        )
    if static:
        return ThresholdConfig(kind=Threshold.STATIC)
    return ThresholdConfig(kind=Threshold.NONE)


def _scheduler_parts(
    scheduler: Mapping[str, Any] | None, usual: _Defaults
) -> tuple[DiscreteCosineSchedule, ThresholdConfig, bool]:
    """Schedule, thresholding, and whether a learned variance is used."""
    if scheduler is None:
        return DiscreteCosineSchedule(), ThresholdConfig(percentile=95.0, max_scale=usual.max_scale), True
    for name, (supported, default) in _SCHEDULER_FIXED.items():
        if scheduler.get(name, default) != supported:
            raise UserError(f"{name} is {scheduler.get(name, default)!r}; only {supported!r} is supported")
    kind = scheduler.get("variance_type", "fixed_small")
    if kind not in ("learned_range", "fixed_small"):
        raise UserError(f"variance_type is {kind!r}; only learned_range and fixed_small are supported")
    steps = json_field(scheduler, "num_train_timesteps", int, _SCHEDULER, default=1000)
    schedule = DiscreteCosineSchedule(steps=steps)
    return schedule, _threshold(scheduler), kind == "learned_range"


def stage_config(
    network: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
    *,
    low_resolution: int | None,
    dtype: str = "float32",
) -> StageConfig:
    """A stage from the contents of diffusers' unet/config.json and scheduler/scheduler_config.json.

    Args:
      network: config.json.
      scheduler: scheduler_config.json; None: as the published pipelines have it.
      low_resolution: pixels, side of the stage before; None: a base.
      dtype: float32 or bfloat16: of parameters and computation.

    Raises:
      UserError: for a flag that is missing or not supported, naming it.
    """
    check_config_is_plain(network)
    unet = dataclasses.replace(unet_config(network), dtype=dtype, param_dtype=dtype)
    if (low_resolution is not None) != (unet.low_res_channels > 0):
        wanted = "a super-resolution stage" if unet.low_res_channels else "a base"
        raise UserError(f"in_channels is {unet.channels_in}: this network is {wanted}")
    resolution = network.get("sample_size")
    if not isinstance(resolution, int) or isinstance(resolution, bool):
        raise UserError(f"sample_size is {resolution!r}, expected a whole number")
    usual = _BASE if low_resolution is None else _SUPER
    try:
        schedule, threshold, learned = _scheduler_parts(scheduler, usual)
        return StageConfig(
            name=f"deepfloyd{resolution}",
            resolution=resolution,
            low_resolution=low_resolution,
            network=unet,
            max_text_length=TEXT_LENGTH,
            padded_text=True,
            schedule=schedule,
            augmentation=NoiseAugmentation(schedule=schedule, enlarge=low_resolution is not None),
            sampling=SamplingConfig(
                sampler=SamplerConfig(
                    kind=Sampler.DDPM,
                    steps=usual.steps,
                    grid=GridConfig(kind=Grid.LEADING),
                    variance_interpolation=0.0,
                    learned_variance=learned,
                ),
                guidance_weight=usual.guidance_weight,
                threshold=threshold,
                aug_level=usual.aug_level,
            ),
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


class LazyTensor:
    """An array that is read or made when it is asked for, and not kept."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Any):
        self.shape, self.dtype, self._read = shape, np.dtype(dtype), read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._read()


def _read_whole(
    reader: SafetensorsReader, source: TensorSource, shape: tuple[int, ...], dtype: Any, bar: tqdm
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
      variant: "fp16" for files so called; see `SafetensorsReader`.

    Raises:
      UserError: a tensor is missing, unexpected, quantised or of another shape, naming it.
    """
    abstract = StageNetwork(config).abstract_params
    sources = unet_sources(abstract)
    dtype = jnp.dtype(config.network.param_dtype)
    with SafetensorsReader(weights, variant) as reader:
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
      UserError: a source is missing, gated, pickled or not of DeepFloyd, naming the flag.
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
    try:
        return epath.Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=unwanted))
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


def scheduler_config(stage: StageConfig) -> dict[str, Any]:
    """The scheduler_config.json with which diffusers samples a stage as `stage_config` reads it back.

    Raises:
      UserError: the stage's schedule or thresholding has no form there.
    """
    sampling, schedule = stage.sampling, stage.schedule
    if not isinstance(schedule, DiscreteCosineSchedule):
        raise UserError(f"stage {stage.name!r}: diffusers has no form of the schedule {schedule.KIND}")
    learned = stage.network.learned_variance and sampling.sampler.learned_variance
    threshold = sampling.threshold
    return {
        "_class_name": "DDPMScheduler",
        **{name: value for name, (value, _) in _SCHEDULER_FIXED.items()},
        "num_train_timesteps": schedule.steps,
        "variance_type": "learned_range" if learned else "fixed_small",
        "thresholding": threshold.kind is Threshold.DYNAMIC,
        "dynamic_thresholding_ratio": threshold.percentile / 100.0,
        "sample_max_value": threshold.max_scale or 1e9,
        "clip_sample": threshold.kind is Threshold.STATIC,
    }


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
        with SafetensorsReader(folder.path / stage.name / WEIGHTS) as reader:
            for name in sorted(reader.names):
                reader.check_float(name)
            stored = {
                name: LazyTensor(reader.shape(name), reader.dtype(name), functools.partial(reader.read, name))
                for name in sorted(reader.names)
            }
            export_pipeline(epath.Path(out) / stage.name, stage, stored, text_encoder=encoder)
    return [stage.name for stage in folder.stages]
