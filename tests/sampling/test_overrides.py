"""Flags to settings, stage by stage."""

import dataclasses

import pytest

from imagen_jax.config import to_dict
from imagen_jax.diffusion.grids import Grid, GridConfig
from imagen_jax.diffusion.guidance import GuidanceConfig
from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.diffusion.thresholding import Threshold, ThresholdConfig
from imagen_jax.errors import UserError
from imagen_jax.models.configs import SamplingConfig
from imagen_jax.sampling.overrides import FLAGS, SamplingOverrides, override_all, parse_overrides

OWN = SamplingConfig(sampler=SamplerConfig(kind=Sampler.DDIM, steps=9, eta=0.1), guidance_weight=2.0)
# flag → (text, what the settings are then)
EVERY_FLAG = {
    "steps": ("7", {"sampler": dataclasses.replace(OWN.sampler, steps=7)}),
    "sampler": ("dpmpp", {"sampler": dataclasses.replace(OWN.sampler, kind=Sampler.DPMPP)}),
    "grid": ("karras", {"sampler": dataclasses.replace(OWN.sampler, grid=GridConfig(kind=Grid.KARRAS))}),
    "timesteps": (
        "smart50",
        {"sampler": dataclasses.replace(OWN.sampler, steps=50, grid=GridConfig(kind=Grid.SMART50))},
    ),
    "eta": ("0.5", {"sampler": dataclasses.replace(OWN.sampler, eta=0.5)}),
    "churn": ("3", {"sampler": dataclasses.replace(OWN.sampler, churn=3.0)}),
    "guidance": ("4.5", {"guidance_weight": 4.5}),
    "guidance_interval": ("-3:2.5", {"guidance": GuidanceConfig(log_snr_min=-3.0, log_snr_max=2.5)}),
    "guidance_oscillate": ("4", {"guidance": GuidanceConfig(oscillate_after=4)}),
    "guidance_rescale": ("0.7", {"guidance": GuidanceConfig(rescale=0.7)}),
    "threshold": ("static", {"threshold": ThresholdConfig(kind=Threshold.STATIC)}),
    "percentile": ("95", {"threshold": ThresholdConfig(percentile=95.0)}),
    "aug_level": ("0.3", {"aug_level": 0.3}),
}


def test_no_flag_is_forgotten():
    assert set(EVERY_FLAG) == set(FLAGS)


@pytest.mark.parametrize("flag", EVERY_FLAG)
def test_a_flag_changes_its_setting_and_no_other(flag):
    text, changed = EVERY_FLAG[flag]
    for written, expected in (
        (text, [True, True]),
        (f"{text},", [True, False]),
        (f",{text}", [False, True]),
        (None, [False, False]),
    ):
        made = override_all([OWN, OWN], parse_overrides({flag: written}, 2))
        wanted = dataclasses.replace(OWN, **changed)
        assert made == [wanted if each else OWN for each in expected]
        assert to_dict(made[0]) != to_dict(OWN) or not expected[0]


def test_turning_things_off_and_open_intervals():
    guided = dataclasses.replace(
        OWN, guidance=GuidanceConfig(log_snr_min=1.0, oscillate_after=3, rescale=0.5)
    )
    flags = {"guidance_interval": "none", "guidance_oscillate": "none"}
    (made,) = override_all([guided], parse_overrides(flags, 1))
    assert made.guidance == GuidanceConfig(rescale=0.5)
    (made,) = override_all([OWN], parse_overrides({"guidance_interval": ":2"}, 1))
    assert made.guidance == GuidanceConfig(log_snr_max=2.0)


def test_another_sampler_takes_its_own_grid():
    karras = dataclasses.replace(
        OWN, sampler=SamplerConfig(kind=Sampler.HEUN, grid=GridConfig(kind=Grid.KARRAS))
    )
    assert SamplingOverrides(sampler=Sampler.DDPM).apply(karras).sampler.grid is None
    assert SamplingOverrides(sampler=Sampler.HEUN).apply(karras) == karras
    both = SamplingOverrides(sampler=Sampler.DDPM, grid=Grid.LOG_SNR).apply(karras)
    assert both.sampler.grid == GridConfig(kind=Grid.LOG_SNR)


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("steps", "few", "--steps few: 'few' is not a whole number"),
        ("steps", "1,2,3", "--steps 1,2,3: give one value, or one for each of the 2 stages"),
        ("sampler", "euler", "--sampler euler: 'euler' is not ddpm, ddim, dpmpp, dpmpp_sde, dpmpp_3m, heun"),
        ("grid", "", "--grid : '' is not time, log_snr, karras"),
        ("guidance_interval", "3", "--guidance_interval 3: '3' is not LOW:HIGH"),
        ("threshold", "soft", "'soft' is not none, static, dynamic"),
        ("percentile", "0.995", r"percentile is given in percent \(99.5, not 0.995\)"),
        ("guidance_interval", "3:1", "log_snr_min must be below log_snr_max"),
        ("aug_level", "2", r"aug_level must be in \[0, 1\], got 2.0"),
        ("steps", "0", "steps must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_named(flag, text, message):
    with pytest.raises(UserError, match=message):
        override_all([OWN, OWN], parse_overrides({flag: text}, 2))
