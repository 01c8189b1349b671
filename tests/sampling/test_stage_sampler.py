"""One stage: guidance, conditions and settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config import build, to_dict
from imagen_jax.diffusion.grids import Grid, GridConfig
from imagen_jax.diffusion.guidance import GuidanceConfig
from imagen_jax.diffusion.process import Prediction
from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.diffusion.thresholding import Threshold, ThresholdConfig
from imagen_jax.models.configs import SamplingConfig
from imagen_jax.models.network import NetworkOutput
from imagen_jax.models.stage import StageNetwork
from imagen_jax.sampling.stage_sampler import StageSampler, guided_denoiser

GENERATOR = np.random.default_rng(0)
TEXT = GENERATOR.standard_normal((2, 8, 16)).astype(np.float32)
MASK = np.arange(8) < np.array([[4], [6]])
NULL = np.zeros_like(TEXT), np.arange(8) < np.array([[1], [1]])


@pytest.fixture(scope="module")
def base(stages, random_params):
    sampler, params = StageSampler(StageNetwork(stages[0])), random_params(stages[0])

    def draw(text=TEXT, mask=MASK, seeds=(3, 3), negative=NULL, **changes):
        config = dataclasses.replace(stages[0].sampling, **changes)
        seeds = np.array(seeds, np.uint32)
        given = {"text": text, "mask": mask, "negative": negative}
        return sampler(params, seeds=seeds, config=config, **given).astype(int)

    return draw


def test_without_guidance_and_with_nothing_but_the_null_text(base):
    conditional, unconditional = base(guidance_weight=1.0), base(guidance_weight=0.0)
    # w = 0: two texts make the same picture of one seed; w = 1: they do not.
    np.testing.assert_allclose(unconditional[0], unconditional[1], atol=1)
    assert np.abs(conditional[0] - conditional[1]).mean() > 2
    # The null text is one token of zeros: given as a caption, without guidance, it makes the same picture.
    null = base(text=np.zeros_like(TEXT), mask=np.tile(np.arange(8) < 1, (2, 1)), guidance_weight=1.0)
    np.testing.assert_allclose(null, unconditional, atol=1)


def test_negative_prompts(base):
    null = np.zeros_like(TEXT), np.tile(np.arange(8) < 1, (2, 1))
    np.testing.assert_allclose(base(negative=null), base(), atol=1)
    # Away from nothing but the prompt itself is no guidance at all.
    np.testing.assert_allclose(base(negative=(TEXT, MASK)), base(guidance_weight=1.0), atol=1)
    other = base(negative=(TEXT[::-1].copy(), MASK[::-1].copy()))
    assert np.abs(other - base()).mean() > 2


def test_an_interval_of_nothing_is_no_guidance(base):
    nowhere = base(guidance=GuidanceConfig(log_snr_min=100.0))
    np.testing.assert_allclose(nowhere, base(guidance_weight=1.0), atol=1)
    np.testing.assert_allclose(base(guidance=GuidanceConfig(log_snr_min=-100.0)), base(), atol=1)
    assert np.abs(nowhere - base()).mean() > 2


class Recorded(StageNetwork):
    """Gives the text's first number, and notes the size of each batch that is really computed."""

    def __init__(self, config):
        super().__init__(config)
        self.sizes = []

    def apply(self, params, x_t, log_snr, text, mask, *, low_res=None, aug_log_snr=None, mesh=None):
        jax.debug.callback(lambda size: self.sizes.append(int(size)), jnp.sum(jnp.ones(len(x_t))))
        ramp = jnp.arange(x_t[0].size, dtype=jnp.float32).reshape(1, *x_t.shape[1:])
        return NetworkOutput(prediction=text[:, :1, :1, None] * ramp)


def outputs(stage, guidance, weight=3.0, negative=None):
    """Outputs of the guided denoiser for steps 0, 1, 2 at log-SNR −3, 0, 3, and the batches computed."""
    network = Recorded(dataclasses.replace(stage, prediction=Prediction.X0))
    config = SamplingConfig(
        guidance_weight=weight, guidance=guidance, threshold=ThresholdConfig(kind=Threshold.NONE)
    )
    text, mask = jnp.asarray([[[2.0]], [[-1.0]]]), jnp.ones((2, 1), bool)
    negative = (jnp.zeros_like(text), mask) if negative is None else negative
    denoise = guided_denoiser(network, {}, text, mask, negative=negative, low_res=None, config=config)
    x_t, made = jnp.zeros((2, 2, 2, 3)), []
    run = jax.jit(denoise)
    for step, level in enumerate((-3.0, 0.0, 3.0)):
        made.append(np.asarray(run(x_t, jnp.asarray(level), jnp.asarray(step)))[:, 0, 0, 1])
    jax.effects_barrier()
    return np.stack(made), network.sizes


@pytest.mark.parametrize(
    ("guidance", "weight", "guided"),
    [
        (GuidanceConfig(), 3.0, [True, True, True]),
        (GuidanceConfig(), 1.0, [False, False, False]),
        (GuidanceConfig(log_snr_min=-1.0, log_snr_max=1.0), 3.0, [False, True, False]),
        (GuidanceConfig(oscillate_after=1), 3.0, [True, False, True]),
        (GuidanceConfig(rescale=1.0, log_snr_max=1.0), 3.0, [True, True, False]),
    ],
    ids=str,
)
def test_the_second_half_is_computed_only_where_it_is_used(stages, guidance, weight, guided):
    made, sizes = outputs(stages[0], guidance, weight)
    assert sizes == [4 if each else 2 for each in guided]
    # The null text gives 0, so that guidance multiplies by w; rescaling takes that back.
    factor = 1.0 if guidance.rescale else weight
    expected = np.where(guided, factor, 1.0)[:, None] * np.array([2.0, -1.0])
    np.testing.assert_allclose(made, expected, rtol=1e-5)


def test_the_second_half_is_the_negative_prompt(stages):
    negative = jnp.asarray([[[0.5]], [[1.0]]]), jnp.ones((2, 1), bool)
    made, _ = outputs(stages[0], GuidanceConfig(), 3.0, negative)
    np.testing.assert_allclose(made, np.tile([3 * 2.0 - 2 * 0.5, -3.0 - 2 * 1.0], (3, 1)), rtol=1e-5)


def test_one_program_for_a_shape_and_config(stages, random_params):
    sampler, params = StageSampler(StageNetwork(stages[0])), random_params(stages[0])
    guidance = GuidanceConfig(oscillate_after=1)
    for seed in (0, 5):
        config = dataclasses.replace(stages[0].sampling, guidance=dataclasses.replace(guidance))
        sampler(
            params,
            seeds=np.full(2, seed, np.uint32),
            text=TEXT + seed,
            mask=MASK,
            negative=NULL,
            config=config,
        )
    assert sampler._run._cache_size() == 1


def test_what_is_written_into_padding_is_never_seen(base):
    padded = np.where(MASK[..., None], TEXT, np.float32(50.0))
    np.testing.assert_allclose(base(text=padded), base(), atol=1)


def test_a_low_resolution_picture_where_and_only_where_it_belongs(stages, random_params):
    low_res = np.zeros((2, 8, 8, 3), np.uint8)
    for stage, given, message in (
        (stages[0], low_res, "'base8'.*None.*True"),
        (stages[1], None, "'sr16'.*8.*False"),
    ):
        sampler = StageSampler(StageNetwork(stage))
        with pytest.raises(ValueError, match=message):
            sampler(random_params(stage), seeds=np.zeros(2, np.uint32), text=TEXT, mask=MASK, low_res=given)


def test_settings_of_older_model_folders():
    written = {"sampler": {"kind": "ddpm", "steps": 32}, "guidance_weight": 1.5, "aug_level": 0.3}
    config = build(SamplingConfig, written, "sampling")
    assert (config.sampler, config.guidance_weight) == (SamplerConfig(kind=Sampler.DDPM, steps=32), 1.5)
    assert config.guidance.at_every_step and config.guidance.rescale == 0.0
    assert build(SamplingConfig, to_dict(config), "sampling") == config
    grid = {"sampler": {"kind": "dpmpp", "grid": {"kind": "karras", "rho": 5}}}
    assert build(SamplingConfig, grid, "sampling").sampler.grid == GridConfig(kind=Grid.KARRAS, rho=5.0)
