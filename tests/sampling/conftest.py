"""A tiny cascade in a model folder, with random weights: fresh ones would draw nothing but zeros."""

import dataclasses

import pytest

TEXT_WIDTH = 16
PROMPTS = ("a red circle", "a blue square", "一个红色的圆形", "two green triangles")


@pytest.fixture(scope="session")
def stages():
    """A base of 8×8 and a super-resolution stage to 16×16."""
    from imagen_jax.diffusion.process import Prediction
    from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
    from imagen_jax.models.configs import SamplingConfig, StageConfig
    from imagen_jax.models.efficient_unet import EfficientUNetConfig
    from imagen_jax.models.unet import UNetConfig

    sizes = {
        "num_res_blocks": (1,),
        "self_attention": (False,),
        "text_attention": (True,),
        "text_width": TEXT_WIDTH,
        "head_channels": 4,
        "embedding_width": 64,  # kernels large enough to be split over a mesh
    }
    base = StageConfig(
        name="base8",
        resolution=8,
        max_text_length=8,
        network=UNetConfig(channels=(4,), **sizes),
        prediction=Prediction.V,
        sampling=SamplingConfig(sampler=SamplerConfig(steps=3), guidance_weight=2.0),
    )
    sr = StageConfig(
        name="sr16",
        resolution=16,
        low_resolution=8,
        max_text_length=6,
        network=EfficientUNetConfig(channels=(8,), **sizes),
        prediction=Prediction.V,
        sampling=SamplingConfig(
            sampler=SamplerConfig(kind=Sampler.DDIM, steps=2), guidance_weight=1.0, aug_level=0.2
        ),
    )
    return base, sr


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, stages, random_params):
    """A complete model folder."""
    from imagen_jax.sampling.model_folder import ModelIndex, save_index, save_stage
    from imagen_jax.text.small import make_small_encoder

    folder = tmp_path_factory.mktemp("model")
    for stage in stages:
        save_stage(folder, stage, random_params(stage))
    make_small_encoder(folder / "text_encoder", vocabulary_texts=PROMPTS, width=TEXT_WIDTH, layers=1)
    save_index(folder, ModelIndex(stages=("base8", "sr16"), text_encoder="text_encoder"))
    return folder


@pytest.fixture(scope="session")
def one_step():
    """one_step(stage) → its sampling settings with a single step."""

    def make(stage):
        sampler = dataclasses.replace(stage.sampling.sampler, steps=1)
        return dataclasses.replace(stage.sampling, sampler=sampler)

    return make
