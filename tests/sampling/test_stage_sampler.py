"""One stage: guidance, conditions and settings."""

import dataclasses

import numpy as np
import pytest

from imagen_jax.diffusion.samplers import Sampler
from imagen_jax.models.stage import StageNetwork
from imagen_jax.sampling.stage_sampler import StageSampler, override_sampling

GENERATOR = np.random.default_rng(0)
TEXT = GENERATOR.standard_normal((2, 8, 16)).astype(np.float32)
MASK = np.arange(8) < np.array([[4], [6]])


@pytest.fixture(scope="module")
def base(stages, random_params):
    sampler, params = StageSampler(StageNetwork(stages[0])), random_params(stages[0])

    def draw(text=TEXT, mask=MASK, seeds=(3, 3), **changes):
        config = dataclasses.replace(stages[0].sampling, **changes)
        seeds = np.array(seeds, np.uint32)
        return sampler(params, seeds=seeds, text=text, mask=mask, config=config).astype(int)

    return draw


def test_without_guidance_and_with_nothing_but_the_null_text(base):
    conditional, unconditional = base(guidance_weight=1.0), base(guidance_weight=0.0)
    # w = 0: two texts make the same picture of one seed; w = 1: they do not.
    np.testing.assert_allclose(unconditional[0], unconditional[1], atol=1)
    assert np.abs(conditional[0] - conditional[1]).mean() > 2
    # The null text is one token of zeros: given as a caption, without guidance, it makes the same picture.
    null = base(text=np.zeros_like(TEXT), mask=np.tile(np.arange(8) < 1, (2, 1)), guidance_weight=1.0)
    np.testing.assert_allclose(null, unconditional, atol=1)


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


def test_override_sampling(stages):
    config = stages[0].sampling
    assert override_sampling(config) == config
    made = override_sampling(config, steps=7, guidance_weight=3.0, sampler="ddim")
    assert (made.sampler.steps, made.guidance_weight, made.sampler.kind) == (7, 3.0, Sampler.DDIM)
    assert dataclasses.replace(made, sampler=config.sampler, guidance_weight=2.0) == config
    with pytest.raises(ValueError, match="got 0"):
        override_sampling(config, steps=0)
    with pytest.raises(ValueError, match="euler"):
        override_sampling(config, sampler="euler")
