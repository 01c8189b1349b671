"""Configurations of a stage: what its weights depend on, and how it is sampled unless told otherwise."""

import dataclasses
import re

from imagen_jax.diffusion.augmentation import NoiseAugmentation
from imagen_jax.diffusion.guidance import GuidanceConfig
from imagen_jax.diffusion.process import Prediction
from imagen_jax.diffusion.samplers import SamplerConfig
from imagen_jax.diffusion.schedules import CosineSchedule, DiscreteCosineSchedule, LinearSchedule
from imagen_jax.diffusion.thresholding import ThresholdConfig
from imagen_jax.limits import MAX_GUIDANCE, MAX_NAME, MAX_SIDE, MAX_TEXT_LENGTH, check_numbers
from imagen_jax.models.kinds import AnyNetworkConfig
from imagen_jax.models.text_form import TextForm
from imagen_jax.sizes import Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a stage is sampled unless the user says otherwise."""

    sampler: SamplerConfig = SamplerConfig()
    guidance_weight: float = 1.35  # w of classifier-free guidance; 1: off. Imagen's FID runs: base 1.35, SR 8
    guidance: GuidanceConfig = GuidanceConfig()  # at which steps w applies; at all unless told otherwise
    threshold: ThresholdConfig = ThresholdConfig()
    aug_level: float = 0.0  # noise level in [0, 1] put on the low-resolution input of an SR stage

    def __post_init__(self) -> None:
        if not 0.0 <= self.aug_level <= 1.0:
            raise ValueError(f"aug_level must be in [0, 1], got {self.aug_level}")
        check_numbers(self, guidance_weight=MAX_GUIDANCE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Everything about a stage that its weights depend on, and its sampling defaults."""

    name: str  # such as "base64"; the stage's folder in a model folder
    resolution: int  # pixels, nominal: side of the square pictures it makes unless told otherwise
    network: AnyNetworkConfig
    low_resolution: int | None = None  # pixels, side of the pictures it enlarges; None: a base stage
    crop: int | None = None  # pixels, side of the crops it trains on; None: whole pictures
    max_text_length: int = 128  # tokens; captions are padded or cut to it
    padded_text: bool = False  # see `TextForm.padded`
    schedule: CosineSchedule | LinearSchedule | DiscreteCosineSchedule = CosineSchedule()
    prediction: Prediction = Prediction.EPSILON  # what the network puts out; Imagen: epsilon
    augmentation: NoiseAugmentation = NoiseAugmentation()
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or re.search(r"[/\\\x00]", self.name) or len(self.name) > MAX_NAME:
            raise ValueError(
                f"a stage's name must be a folder name of at most {MAX_NAME} characters, got {self.name[:80]!r}"
            )
        for field, side in (("resolution", self.resolution), ("crop", self.crop)):
            if side is not None and (side < 1 or side % self.network.side_multiple):
                raise ValueError(
                    f"{field} {side} is not a multiple of the {self.network.side_multiple} pixels that the "
                    "network's levels need"
                )
        if not self.network.SEES_MASK and not self.padded_text:
            raise ValueError(f"a network of kind {self.network.KIND} sees no mask: it needs padded_text")
        check_numbers(
            self,
            max_text_length=MAX_TEXT_LENGTH,
            **dict.fromkeys(("resolution", "low_resolution", "crop"), MAX_SIDE),
        )
        _ = self.text_form  # refuses what it refuses
        low = self.low_resolution
        if low is not None and (low < 1 or self.resolution % low):
            raise ValueError(f"resolution {self.resolution} is not a multiple of low_resolution {low}")
        if (low is not None) != (self.network.low_res_channels > 0):
            raise ValueError(
                f"low_resolution {low} and network.low_res_channels {self.network.low_res_channels} disagree: "
                "a super-resolution stage has both, a base stage neither (null and 0)"
            )

    @property
    def text_form(self) -> TextForm:
        """How it has its texts."""
        return TextForm(length=self.max_text_length, padded=self.padded_text)

    @property
    def size(self) -> Size:
        """Of its pictures unless told otherwise: square."""
        return Size(self.resolution, self.resolution)

    def check_size(self, size: Size) -> None:
        """Raises ValueError unless the stage can draw, or learn from, pictures of this size."""
        multiple = self.network.side_multiple
        if size.scaled(1, self.scale) is None or any(side < 1 or side % multiple for side in size):
            raise ValueError(
                f"stage {self.name!r} has sides that are multiples of {multiple} pixels"
                f"{'' if self.low_resolution is None else f' and of {self.scale}'}, got {size}"
            )

    @property
    def scale(self) -> int:
        """By which it enlarges its low-resolution input; 1 of a base stage."""
        return 1 if self.low_resolution is None else self.resolution // self.low_resolution
