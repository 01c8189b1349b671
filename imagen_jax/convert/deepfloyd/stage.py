"""A DeepFloyd stage in diffusers' files: scheduler_config.json, and with the network's config.json the whole stage."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from imagen_jax.convert.deepfloyd.network import unet_config
from imagen_jax.diffusion.augmentation import NoiseAugmentation
from imagen_jax.diffusion.grids import Grid, GridConfig
from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.diffusion.schedules import DiscreteCosineSchedule
from imagen_jax.diffusion.thresholding import Threshold, ThresholdConfig
from imagen_jax.errors import UserError
from imagen_jax.files import json_field
from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.models.weight_files import check_config_is_plain

TEXT_LENGTH = 77  # tokens to which every caption is padded
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
