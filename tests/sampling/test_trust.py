"""A picture is its seed's and prompt's alone, with every sampler, in floating-point numbers."""

import dataclasses

import jax
import numpy as np
import pytest

from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.drawing import Drawing

PROMPTS = ("a red circle", "a blue square", "一个红色的圆形", "two green triangles")
STEPS = {Sampler.HEUN: 16}  # 31 network calls


@pytest.fixture(scope="module")
def models(model_folder):
    """The same model on one and on eight devices."""
    assert len(jax.devices()) == 8
    return Imagen.load(model_folder), Imagen.load(model_folder, mesh=make_mesh(MeshConfig(data=8)))


@pytest.mark.parametrize("kind", list(Sampler))
def test_batch_position_and_devices_have_no_say(models, stages, kind):
    sampler = SamplerConfig(kind=kind, steps=STEPS.get(kind, 32), eta=0.5, churn=4.0)
    sampling = {"base8": dataclasses.replace(stages[0].sampling, sampler=sampler)}

    def draw(model, pairs, batch_size):
        drawing = Drawing(wanted=tuple(pairs), sampling=sampling, until=8)
        return model.draw(drawing, batch_size=batch_size, keep_x0=True)

    one, eight = models
    pairs = [(prompt, seed) for prompt in PROMPTS for seed in (5, 6)]
    pictures = {(each.prompt, each.seed): each.x0 for each in draw(one, pairs, 8)}
    spread = np.stack(list(pictures.values()))
    assert spread.std(axis=(1, 2, 3)).min() > 0.1 and np.mean(np.abs(spread) > 0.999) < 0.5

    def check(made):
        for each in made:
            np.testing.assert_allclose(each.x0, pictures[each.prompt, each.seed], atol=1e-4)

    check(draw(one, pairs[::-1], 8))  # first becomes last
    check(draw(one, pairs[:3], 3))
    check(draw(one, [pairs[7], pairs[0]], 1))
    check(draw(eight, pairs[::-1], 8))
