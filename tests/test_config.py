"""Configs to dictionaries and back."""

import dataclasses
import enum
import json
from typing import ClassVar

import pytest

from imagen_jax.config import build, differences, nearest, to_dict
from imagen_jax.diffusion.augmentation import NoiseAugmentation
from imagen_jax.diffusion.grids import Grid, GridConfig
from imagen_jax.diffusion.guidance import GuidanceConfig
from imagen_jax.diffusion.process import Prediction
from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.diffusion.schedules import CosineSchedule, LinearSchedule
from imagen_jax.diffusion.thresholding import Threshold, ThresholdConfig
from imagen_jax.errors import UserError
from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.models.deepfloyd import DeepFloydUNetConfig
from imagen_jax.models.efficient_unet import EfficientUNetConfig
from imagen_jax.models.network import Attention, Gather, Remat
from imagen_jax.models.unet import UNetConfig
from imagen_jax.training.config import LoopConfig

SIZES = {
    "channels": (8, 16),
    "num_res_blocks": (1, 2),
    "self_attention": (False, True),
    "text_attention": (True, True),
    "text_width": 12,
}
PLAIN = StageConfig(name="base64", resolution=64, network=UNetConfig(**SIZES, head_channels=8))
DEEPFLOYD = StageConfig(
    name="if64",
    resolution=64,
    padded_text=True,
    network=DeepFloydUNetConfig(**SIZES, head_channels=8, text_channels=32, pool_heads=4, norm_groups=8),
)
# No field that has a default keeps it.
FULL = StageConfig(
    name="sr256",
    resolution=256,
    network=EfficientUNetConfig(
        **SIZES,
        head_channels=8,
        embedding_width=32,
        low_res_channels=1,
        image_channels=1,
        patch_size=2,
        dtype="bfloat16",
        attention=Attention.FLASH,
        remat=Remat.PRODUCTS,
        gather=Gather.ONCE,
        concat_skips=(False, True),
        param_dtype="bfloat16",
        learned_variance=True,
    ),
    low_resolution=64,
    crop=64,
    max_text_length=256,
    padded_text=True,
    schedule=LinearSchedule(log_snr_max=12.0),
    prediction=Prediction.V,
    augmentation=NoiseAugmentation(max_level=0.5, blur=0.5, enlarge=True, schedule=CosineSchedule(shift=1.0)),
    sampling=SamplingConfig(
        sampler=SamplerConfig(
            kind=Sampler.DDIM,
            steps=50,
            grid=GridConfig(kind=Grid.KARRAS, rho=5.0, log_snr_min=-10.0, log_snr_max=10.0),
            variance_interpolation=0.5,
            eta=0.3,
            churn=2.0,
            churn_noise=1.003,
            learned_variance=False,
            first_step=3,
            resamplings=2,
            jump=5,
        ),
        guidance_weight=8.0,
        guidance=GuidanceConfig(log_snr_min=-3.0, log_snr_max=3.0, oscillate_after=4, rescale=0.7),
        threshold=ThresholdConfig(kind=Threshold.STATIC, percentile=90.0, max_scale=2.0),
        aug_level=0.1,
    ),
)


class Colour(enum.StrEnum):
    RED = "red"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    KIND: ClassVar[str] = "round"
    radius: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
    KIND: ClassVar[str] = "square"
    side: int = 1

    def __post_init__(self):
        if self.side < 0:
            raise ValueError(f"side must not be negative, got {self.side}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    shape: Round | Square
    title: str = ""
    colour: Colour = Colour.RED
    scale: float = 1.0
    bold: bool = False
    copies: int | None = None
    sizes: tuple[int, ...] = ()
    frame: Round | Square | None = None


def left_at_default(config):
    return [
        field.name
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING and getattr(config, field.name) == field.default
    ]


def test_full_has_no_default_left():
    parts = (FULL, FULL.network, FULL.schedule, FULL.augmentation, FULL.sampling)
    for part in (*parts, FULL.sampling.sampler, FULL.sampling.threshold):
        assert left_at_default(part) == [], part


def test_a_retired_field_opens_with_the_value_that_is_now_always_so():
    values = to_dict(PLAIN)
    values["network"]["scan"] = 0
    assert build(StageConfig, values, "stage") == PLAIN
    values["network"]["scan"] = 2
    with pytest.raises(
        UserError, match=r"^stage\.network\.scan is no field any more and means 0 always, got 2$"
    ):
        build(StageConfig, values, "stage")


def test_a_retired_field_that_changed_no_result_opens_with_any_value():
    values = to_dict(LoopConfig(steps=3))
    for value in (0, 8192):
        assert build(LoopConfig, values | {"tpu_operation_kib": value}, "train") == LoopConfig(steps=3)


def former(config):
    """The dictionary of a stage from before networks were kinds: one network, and DeepFloyd's an option of it."""
    values = to_dict(config)
    network = values["network"] | {"kind": "unet", "scan": 0, "deepfloyd": None}
    if isinstance(config.network, DeepFloydUNetConfig):
        options = ("text_channels", "pool_heads", "norm_groups", "text_norm_groups", "mid_self_attention")
        options += ("activation", "embedding_activation", "skip_time_act", "block_scale", "mid_scale")
        network["deepfloyd"] = {name: network.pop(name) for name in options}
    return values | {"network": network}


@pytest.mark.parametrize("config", [PLAIN, DEEPFLOYD], ids=lambda config: config.name)
def test_configs_from_before_networks_were_kinds_open(config):
    assert build(StageConfig, json.loads(json.dumps(former(config))), "stage") == config
    del (values := former(config))["network"]["deepfloyd"]
    assert type(build(StageConfig, values, "stage").network) is UNetConfig


def test_a_former_config_is_checked_as_today():
    values = former(DEEPFLOYD)
    values["network"]["deepfloyd"]["pool_headz"] = 4
    with pytest.raises(
        UserError, match=r"^stage\.network\.pool_headz is not a field \(did you mean 'pool_heads'\?\)$"
    ):
        build(StageConfig, values, "stage")


@pytest.mark.parametrize("config", [PLAIN, FULL, DEEPFLOYD], ids=lambda config: config.name)
def test_round_trip_through_json(config):
    made = build(StageConfig, json.loads(json.dumps(to_dict(config))), "stage")
    assert made == config
    assert type(made.network) is type(config.network)
    assert isinstance(made.network.channels, tuple) and isinstance(made.prediction, Prediction)
    assert hash(made) == hash(config)  # as a static argument of jit


def test_dictionary_is_plain():
    values = to_dict(FULL)
    assert values["network"]["kind"] == "efficient_unet" and values["schedule"]["kind"] == "linear"
    assert values["network"]["channels"] == [8, 16] and values["prediction"] == "v"
    assert values["sampling"]["sampler"] == {
        "kind": "ddim",
        "steps": 50,
        "grid": {"kind": "karras", "rho": 5.0, "log_snr_min": -10.0, "log_snr_max": 10.0},
        "variance_interpolation": 0.5,
        "eta": 0.3,
        "churn": 2.0,
        "churn_noise": 1.003,
        "learned_variance": False,
        "first_step": 3,
        "resamplings": 2,
        "jump": 5,
    }
    assert type(values["prediction"]) is str


def test_missing_fields_take_their_defaults_and_the_kind_decides():
    made = build(Drawing, {"shape": {"kind": "square"}}, "d")
    assert made == Drawing(shape=Square())
    made = build(
        Drawing,
        {"shape": {"kind": "round", "radius": 2}, "frame": {"kind": "square"}, "sizes": [1, 2], "copies": 3},
        "d",
    )
    assert made == Drawing(shape=Round(radius=2.0), frame=Square(), sizes=(1, 2), copies=3)
    assert type(made.shape.radius) is float
    assert build(Drawing, {"shape": {"kind": "square"}, "copies": None, "frame": None}, "d").copies is None
    assert build(Drawing, {"shape": {"kind": "square"}, "colour": "red"}, "d").colour is Colour.RED


SHAPE = {"shape": {"kind": "square"}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "d.shape is missing"),
        ({"shape": {"kind": "round"}}, "d.shape.radius is missing"),
        (SHAPE | {"titel": "x"}, "d.titel is not a field (did you mean 'title'?)"),
        (SHAPE | {"zzzzzz": 1}, "d.zzzzzz is not a field"),
        ({"shape": {"kind": "square", "sides": 2}}, "d.shape.sides is not a field (did you mean 'side'?)"),
        ({"shape": {"kind": "oval"}}, "d.shape.kind must be one of round, square; got 'oval'"),
        ({"shape": {"side": 1}}, "d.shape.kind must be one of round, square; got None"),
        ({"shape": "square"}, "d.shape must be a group of fields, got 'square'"),
        ({"shape": None}, "d.shape must be a group of fields, got None"),
        ({"shape": {"kind": "square", "side": True}}, "d.shape.side must be of type int, got True"),
        ({"shape": {"kind": "square", "side": 1.0}}, "d.shape.side must be of type int, got 1.0"),
        ({"shape": {"kind": "square", "side": -2}}, "d.shape: side must not be negative, got -2"),
        (SHAPE | {"scale": "1.5"}, "d.scale must be of type float, got '1.5'"),
        (SHAPE | {"scale": True}, "d.scale must be of type float, got True"),
        (SHAPE | {"scale": None}, "d.scale must be of type float, got None"),
        (SHAPE | {"bold": 1}, "d.bold must be of type bool, got 1"),
        (SHAPE | {"title": 3}, "d.title must be of type str, got 3"),
        (SHAPE | {"copies": "3"}, "d.copies must be of type int, got '3'"),
        (SHAPE | {"copies": False}, "d.copies must be of type int, got False"),
        (SHAPE | {"colour": "pink"}, "d.colour must be one of red; got 'pink'"),
        (SHAPE | {"colour": ["red"]}, "d.colour must be one of red; got ['red']"),
        (SHAPE | {"sizes": "12"}, "d.sizes must be a list, got '12'"),
        (SHAPE | {"sizes": [1, "2"]}, "d.sizes[1] must be of type int, got '2'"),
        ([], "d must be a group of fields, got []"),
    ],
)
def test_wrong_values_are_named_in_full(values, message):
    with pytest.raises(UserError) as caught:
        build(Drawing, values, "d")
    assert str(caught.value) == message


def test_wrong_values_of_a_stage_are_named_in_full():
    values = to_dict(PLAIN)
    values["sampling"]["sampler"]["stpes"] = 3
    with pytest.raises(UserError, match=r"^stage\.sampling\.sampler\.stpes .*'steps'"):
        build(StageConfig, values, "stage")
    values = to_dict(PLAIN) | {"low_resolution": 16}
    with pytest.raises(UserError, match=r"^stage: low_resolution 16 and network.low_res_channels 0"):
        build(StageConfig, values, "stage")


def test_nearest():
    assert nearest("resolutoin", ["name", "resolution"]) == " (did you mean 'resolution'?)"
    assert nearest("xyz", ["name", "resolution"]) == ""


def test_differences():
    assert differences(to_dict(PLAIN), to_dict(PLAIN)) == []
    changed = dataclasses.replace(PLAIN, schedule=LinearSchedule(log_snr_max=12.0), crop=32)
    old, new = to_dict(PLAIN), to_dict(changed)
    assert set(differences(old, new, "stage")) == {
        "stage.crop: None → 32",
        "stage.schedule.kind: 'cosine' → 'linear'",
        "stage.schedule.log_snr_max: 15.0 → 12.0",
        "stage.schedule.log_snr_min: -15.0 → None",
        "stage.schedule.shift: 0.0 → None",
    }
    assert differences({"a": [1, 2]}, {"a": [1, 3]}) == ["config.a: [1, 2] → [1, 3]"]
