"""Configurations of networks and stages, without the networks.

A program that is compiled already needs no network, and what only reads configurations must not wait for flax, which
takes longer to import than a small stage's program to load.
"""

import dataclasses
import enum
import re
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from jaxtyping import Array

from imagen_jax.diffusion.augmentation import NoiseAugmentation
from imagen_jax.diffusion.guidance import GuidanceConfig
from imagen_jax.diffusion.process import Prediction
from imagen_jax.diffusion.samplers import SamplerConfig
from imagen_jax.diffusion.schedules import CosineSchedule, DiscreteCosineSchedule, LinearSchedule
from imagen_jax.diffusion.thresholding import ThresholdConfig
from imagen_jax.limits import (
    MAX_BLOCKS,
    MAX_CHANNELS,
    MAX_GUIDANCE,
    MAX_IMAGE_CHANNELS,
    MAX_LEVELS,
    MAX_NAME,
    MAX_SIDE,
    MAX_TEXT_LENGTH,
    check_numbers,
)

Params = dict[str, Any]  # arrays (or their shapes) under dotted names


class Attention(enum.StrEnum):
    """Which implementation of attention a network runs."""

    AUTO = "auto"  # FLASH on a mesh of TPUs where the shapes allow it and pictures lie whole, else XLA
    XLA = "xla"  # `jax.nn.dot_product_attention`
    FLASH = "flash"  # `models.flash_attention`; where there is no TPU its kernels are interpreted, slowly


class Remat(enum.StrEnum):
    """What is kept of a block's forward pass for its backward pass."""

    NONE = "none"  # everything
    PRODUCTS = (
        "products"  # results of convolutions, matrix products and attention; the rest is computed again
    )
    BLOCK = "block"  # the block's input only; all of it is computed again


class Gather(enum.StrEnum):
    """When the weights that fsdp splits are made whole, in the dtype of the computation."""

    BLOCK = "block"  # when their block runs, and again for its backward pass: one block's are whole at a time
    ONCE = "once"  # once a step: half the traffic, none of it inside loops, two bytes a parameter of memory


def exact_gelu(x: Array) -> Array:
    """x·Φ(x) with the Gaussian's own distribution function, not its tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


class Activation(enum.StrEnum):
    """Non-linearity of a network."""

    GELU = "gelu"  # exact, with erf
    SILU = "silu"

    @property
    def function(self) -> Callable[[Array], Array]:
        """The function itself."""
        return exact_gelu if self is Activation.GELU else jax.nn.silu


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepFloydOptions:
    """Flags of a DeepFloyd network beyond those that every U-Net has."""

    text_channels: int  # width to which the text is projected; every block attends to that
    pool_heads: int = 64  # heads of the attention that pools the text
    norm_groups: int = 32  # groups of every GroupNorm over a picture
    text_norm_groups: int = 32  # groups of the GroupNorm over the text's tokens
    mid_self_attention: bool = True  # whether positions attend to each other in the middle block
    activation: Activation = Activation.GELU  # of blocks and of the time embedding
    embedding_activation: Activation | None = None  # once on the summed embedding; None: none
    skip_time_act: bool = (
        False  # whether blocks take the embedding as it is, without an activation of their own
    )
    block_scale: float = 1.0  # by which the residual sums of blocks on the way down and up are divided
    mid_scale: float = 1.0  # by which those of the middle block are

    def __post_init__(self) -> None:
        for name in ("text_channels", "pool_heads", "norm_groups", "text_norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_numbers(
            self,
            **dict.fromkeys(("text_channels", "pool_heads", "norm_groups", "text_norm_groups"), MAX_CHANNELS),
        )
        if self.text_channels % self.text_norm_groups:
            raise ValueError(
                f"text_norm_groups {self.text_norm_groups} does not divide text_channels {self.text_channels}"
            )
        for name in ("block_scale", "mid_scale"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of an ADM-style U-Net. Tuples have one entry a level, from full resolution down by twos."""

    KIND: ClassVar[str] = "unet"
    RETIRED: ClassVar[dict[str, Any]] = {"scan": 0}  # see `config.build`
    channels: tuple[int, ...]  # channels of each level; Imagen base: 512, 1024, 1536, 2048
    num_res_blocks: tuple[int, ...]  # residual blocks of each level; Imagen base: 3
    self_attention: tuple[bool, ...]  # whether positions attend to each other at this level
    text_attention: tuple[bool, ...]  # whether positions attend to the text at this level
    text_width: int  # width of the text encoder's embeddings
    head_channels: int = 64  # channels of an attention head
    embedding_width: int | None = None  # width of the time and pooled text embedding; None: 4 × channels[0]
    low_res_channels: int = 0  # channels of the low-resolution input; 0: none, a base stage
    image_channels: int = 3  # of the pictures: red, green, blue
    patch_size: int = (
        1  # pixels; side of the squares that become channels before the first level (2301.11093, 3.2)
    )
    dtype: str = "float32"  # of the computation: "float32" or "bfloat16"
    param_dtype: str = "float32"  # of parameters in memory; "bfloat16" halves them, for drawing pictures only
    attention: Attention = Attention.AUTO  # kernels on TPU, plain XLA elsewhere, unless told otherwise
    remat: Remat = Remat.NONE  # what the backward pass computes again; memory against time, same numbers
    gather: Gather = Gather.BLOCK  # when weights that chips share are made whole; memory against traffic
    learned_variance: bool = False  # beside each channel's output another, which says how much noise to add
    deepfloyd: DeepFloydOptions | None = None  # parts as DeepFloyd IF has them; None: as the paper has them

    def __post_init__(self) -> None:
        for name in ("channels", "num_res_blocks", "self_attention", "text_attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # configs and JSON give lists
        levels = len(self.channels)
        if not levels or min(self.channels) < 1 or self.channels[0] % 2:
            raise ValueError(f"channels must be positive, the first even, got {self.channels}")
        for name in ("text_width", "head_channels", "image_channels", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_res_blocks", "self_attention", "text_attention"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} needs one entry for each of {levels} levels, got {getattr(self, name)}"
                )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"{name} must be float32 or bfloat16, got {getattr(self, name)!r}")
        self._check_sizes()
        self._check_buildable()

    def _check_sizes(self) -> None:
        """Refuses numbers that nobody means."""
        if len(self.channels) > MAX_LEVELS:
            raise ValueError(f"channels has {len(self.channels)} levels; at most {MAX_LEVELS}")
        for name, least in (("num_res_blocks", 0), ("embedding_width", 1), ("low_res_channels", 0)):
            value = getattr(self, name)
            if value is not None and min(value if isinstance(value, tuple) else (value,)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        widths = dict.fromkeys(("channels", "text_width", "head_channels", "embedding_width"), MAX_CHANNELS)
        check_numbers(
            self,
            **widths,
            num_res_blocks=MAX_BLOCKS,
            low_res_channels=MAX_IMAGE_CHANNELS,
            image_channels=MAX_IMAGE_CHANNELS,
            patch_size=MAX_SIDE,
        )

    def _check_buildable(self) -> None:
        """Refuses what the layers refuse: heads and groups that do not divide the channels that they share."""
        options, last = self.deepfloyd, len(self.channels) - 1
        for level, channels in enumerate(self.channels):
            attends = self.text_attention[level] or (options is None and self.self_attention[level])
            if (attends or (options is not None and level == last)) and channels % self.head_channels:
                raise ValueError(
                    f"head_channels {self.head_channels} does not divide {channels} channels of level {level}"
                )
            if options is not None and channels % options.norm_groups:
                raise ValueError(
                    f"norm_groups {options.norm_groups} does not divide {channels} channels of level {level}"
                )
        shared, heads = self.width, max(1, self.width // self.head_channels)
        if options is not None:
            shared, heads = self.text_width, options.pool_heads
        if shared % heads:
            of = "text_width" if options is not None else "embedding_width"
            raise ValueError(f"{heads} heads, which pool the text, do not divide {of} {shared}")

    @property
    def side_multiple(self) -> int:
        """Pixels; both sides of a picture are multiples of it."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    @property
    def channels_in(self) -> int:
        """Channels that the first convolution sees."""
        return (self.image_channels + self.low_res_channels) * self.patch_size**2

    @property
    def channels_out(self) -> int:
        """Channels that the last convolution gives."""
        return self.image_channels * (2 if self.learned_variance else 1) * self.patch_size**2

    @property
    def width(self) -> int:
        """Width of the embedding."""
        return self.embedding_width or 4 * self.channels[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientUNetConfig(UNetConfig):
    """Shape of an Efficient U-Net. Every block has stride 2: level i works at 1 / 2^(i+1) of the side."""

    KIND: ClassVar[str] = "efficient_unet"
    low_res_channels: int = 3  # the network is made for super-resolution; 0 makes a base network of it
    # Levels at which every residual block of the UBlock sees, by concatenation, what its twin in the DBlock
    # made. At the others the DBlock's output is added once, on entry. () is none.
    concat_skips: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "concat_skips", tuple(self.concat_skips))
        if self.deepfloyd is not None:
            raise ValueError("deepfloyd is an option of the kind 'unet' only")
        if self.concat_skips and len(self.concat_skips) != len(self.channels):
            raise ValueError(
                f"concat_skips needs one entry for each of {len(self.channels)} levels or none, "
                f"got {self.concat_skips}"
            )

    def concatenates(self, level: int) -> bool:
        """Whether the level's UBlock concatenates its skips."""
        return bool(self.concat_skips) and self.concat_skips[level]

    @property
    def side_multiple(self) -> int:
        """Pixels; both sides of a picture are multiples of it."""
        return self.patch_size * 2 ** len(self.channels)


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
    resolution: int  # pixels, side of the pictures it makes
    network: UNetConfig | EfficientUNetConfig
    low_resolution: int | None = None  # pixels, side of the pictures it enlarges; None: a base stage
    crop: int | None = None  # pixels, side of the crops it trains on; None: whole pictures
    max_text_length: int = 128  # tokens; captions are padded or cut to it
    # Whether text is as DeepFloyd IF has it: captions in lower case, embeddings of padding count as text, and the
    # null text is the empty caption.
    padded_text: bool = False
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
                    f"network's {len(self.network.channels)} levels need"
                )
        if self.network.deepfloyd is not None and not self.padded_text:
            raise ValueError("a deepfloyd network sees no mask: it needs padded_text")
        if self.max_text_length < 1:
            raise ValueError(f"max_text_length must be at least 1, got {self.max_text_length}")
        check_numbers(
            self,
            max_text_length=MAX_TEXT_LENGTH,
            **dict.fromkeys(("resolution", "low_resolution", "crop"), MAX_SIDE),
        )
        low = self.low_resolution
        if low is not None and (low < 1 or self.resolution % low):
            raise ValueError(f"resolution {self.resolution} is not a multiple of low_resolution {low}")
        if (low is not None) != (self.network.low_res_channels > 0):
            raise ValueError(
                f"low_resolution {low} and network.low_res_channels {self.network.low_res_channels} disagree: "
                "a super-resolution stage has both, a base stage neither (null and 0)"
            )
