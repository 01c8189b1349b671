"""A picture's rows on several devices: the same picture, and really in parts."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from imagen_jax.errors import UserError
from imagen_jax.models.stage import StageNetwork
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.parallel.spatial import split_rows
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.inputs import StageInputs
from imagen_jax.sampling.programs import ProgramSpec, prepare


@pytest.fixture(scope="module")
def stage(stages):
    """Super-resolution with two levels, self-attention, guidance and noise of its own."""
    sizes = {"channels": (8, 8), "num_res_blocks": (1, 1), "text_attention": (False, True)}
    network = dataclasses.replace(stages[1].network, self_attention=(False, True), **sizes)
    sampler = dataclasses.replace(stages[1].sampling.sampler, steps=4, eta=0.5)
    sampling = dataclasses.replace(stages[1].sampling, guidance_weight=2.0, sampler=sampler)
    return dataclasses.replace(stages[1], network=network, sampling=sampling)


def draw(stage, params, batch, mesh):
    """x0 of the first pictures, and the compiled program."""
    length, low = stage.max_text_length, stage.low_resolution
    generator = np.random.default_rng(2)
    inputs = StageInputs(
        seeds=np.arange(batch, dtype=np.uint32),
        text=generator.standard_normal((2, length, 16)).astype(np.float32)[:batch],
        mask=np.arange(length) < np.array([[4], [2]])[:batch],
        low_res=np.clip(generator.standard_normal((2, low, low, 3)), -1, 1).astype(np.float32)[:batch],
        negative_text=np.zeros((batch, length, 16), np.float32),
        negative_mask=np.arange(length) < np.ones((batch, 1)),
    )
    spec = ProgramSpec(stage=stage, sampling=stage.sampling, batch=batch, negative=True, mesh=mesh)
    program = prepare(spec)
    placed = jax.device_put(params, program.parameter_shardings)
    state = program(placed, program.place(inputs), program.empty_state(), 0, 4)
    return np.asarray(state.x0), program


@pytest.mark.parametrize(("batch", "devices"), [(1, 4), (2, 8)])
def test_four_parts_make_the_same_picture(stage, random_params, batch, devices):
    params = random_params(stage)
    whole, _ = draw(stage, params, batch, None)
    mesh = split_rows(make_mesh(MeshConfig(), jax.devices()[:devices]), 4)
    assert dict(mesh.shape) == {"data": batch, "fsdp": 1, "tensor": 1, "rows": 4}
    split, program = draw(stage, params, batch, mesh)
    assert whole.std() > 0.1
    np.testing.assert_allclose(split, whole, atol=1e-4)
    text = program._compiled.as_text()
    # No convolution sees more than 4 of 16 rows of one picture, doubled for guidance, and the halos.
    heights = {int(each) for each in re.findall(r"= f32\[2,(\d+),\d+,\d+\]\S* convolution\(", text)}
    assert heights and max(heights) <= 6, heights
    assert "collective-permute" in text and "all-reduce" in text


def test_the_cascade_splits_the_stages_it_is_told_to(model_folder):
    mesh = make_mesh(MeshConfig())
    split = Imagen.load(model_folder, mesh=mesh, rows={"sr16": 4})
    options = {"seed": 3, "num_images": 2, "batch_size": 2, "keep_x0": True}
    for one, other in zip(
        split.pictures(["a red circle"], **options),
        Imagen.load(model_folder).pictures(["a red circle"], **options),
    ):
        np.testing.assert_allclose(one.x0, other.x0, atol=1e-4)


def test_what_cannot_be_split(model_folder, stages):
    mesh = make_mesh(MeshConfig())
    with pytest.raises(UserError, match="'sr16': 16 rows cannot be split over 3 devices"):
        Imagen.load(model_folder, mesh=mesh, rows={"sr16": 3})
    with pytest.raises(UserError, match="no stage 'sr17'"):
        Imagen.load(model_folder, mesh=mesh, rows={"sr17": 2})
    with pytest.raises(UserError, match="only on a mesh"):
        Imagen.load(model_folder, rows={"sr16": 2})
    with pytest.raises(UserError, match=r"over 3 devices: there are 8"):
        split_rows(mesh, 3)
    assert StageNetwork(stages[1]).config.network.side_multiple == 2
