"""Numbers that are no picture are never drawn, and cost no picture that is one."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli.main import main
from imagen_jax.diffusion.rules import SamplerState
from imagen_jax.diffusion.samplers import SamplerConfig
from imagen_jax.errors import UserError
from imagen_jax.models.configs import SamplingConfig
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.weights import load_state, save_state
from imagen_jax.sampling.batches import first_not_finite
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.drawing import Drawing
from imagen_jax.sampling.inputs import StageInputs, to_pixels
from imagen_jax.sampling.programs import ProgramSpec, StageProgram
from imagen_jax.sampling.stage_sampler import StageSampler

PROMPTS = ("a red circle", "a blue square", "two green triangles")


@pytest.fixture
def bad_prompt(monkeypatch):
    """The embedding of the second prompt is not finite."""
    encode = Imagen.encode

    def broken(self, prompts, form):
        text = encode(self, prompts, form)
        chosen = np.array([prompt == PROMPTS[1] for prompt in prompts])
        return text._replace(embeddings=np.where(chosen[:, None, None], np.float32(np.nan), text.embeddings))

    monkeypatch.setattr(Imagen, "encode", broken)


def test_the_other_pictures_come_before_the_error(model_folder, bad_prompt):
    made, model = [], Imagen.load(model_folder)
    message = (
        r"^1 of 3 pictures are none: stage 'base8' gave numbers that are not finite at call 1 of 3 for "
        r"'a blue square' \(seed 5\); is a weight"
    )
    with pytest.raises(UserError, match=message):
        made.extend(model.draw(Drawing.of(PROMPTS, seed=5), batch_size=2))
    assert [(each.prompt, each.index) for each in made] == [(PROMPTS[0], 0), (PROMPTS[2], 2)]
    alone = model.pictures([PROMPTS[0], PROMPTS[2]], seed=5, batch_size=2)  # the program of before
    for one, other in zip(made, alone, strict=True):
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1


def test_the_command_keeps_the_others(model_folder, bad_prompt, tmp_path, capsys):
    out, arguments = tmp_path / "out", [f"--model={model_folder}", "--seed=5", "--batch_size=2", "--until=8"]
    assert main(["sample", *PROMPTS, f"--out={out}", *arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("imagen-jax sample: error: 1 of 3 pictures are none: stage 'base8' ")
    assert sorted(path.name for path in out.iterdir()) == [
        "00000-a-red-circle-5.png",
        "00002-two-green-triangles-5.png",
        "grid.png",
        "index.html",
    ]
    assert Image.open(out / "grid.png").size == (2 * 10 + 2, 10 + 2)


def test_a_weight_that_is_not_finite_draws_nothing(model_folder, stages, tmp_path, capsys):
    """Of the second stage: it is named."""
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model_folder, folder)
    path = folder / "sr16" / "model.safetensors"
    params = {
        name: np.array(value)
        for name, value in load_state(StageNetwork(stages[1]).abstract_params, path).items()
    }
    params[next(name for name in sorted(params) if name.endswith("kernel"))].flat[0] = np.nan
    save_state(params, path)
    assert main(["sample", "a red circle", f"--model={folder}", f"--out={out}"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        "1 of 1 pictures are none: stage 'sr16' gave numbers that are not finite at call 1 of 2 for" in last
    )
    assert list(out.iterdir()) == []


class FakeProgram(StageProgram):
    """Ten calls; the first picture stays finite, the second until the fourth call, the third to the last."""

    def __init__(self, stage):
        sampling = SamplingConfig(sampler=SamplerConfig(steps=10))
        self.spec = ProgramSpec(stage=stage, sampling=sampling, batch=3)

    def place(self, inputs):
        return {}

    def empty_state(self):
        return None

    def __call__(self, params, inputs, state, first, last):
        assert last == first + 1
        x0 = np.zeros((3, 2, 2, 3), np.float32)
        x0[1] = np.inf if last >= 4 else 0.0
        x0[2] = np.nan if last == 10 else 0.0
        return SamplerState(x0, x0)


def test_the_call_is_the_first_that_went_wrong(stages):
    inputs = StageInputs(np.zeros(3, np.uint32), np.zeros((3, 8, 16), np.float32), np.ones((3, 8), bool))
    assert first_not_finite(FakeProgram(stages[0]), {}, inputs, 3).tolist() == [10, 4, 10]


def test_no_number_becomes_a_black_pixel():
    assert to_pixels(np.array([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="not finite"):
            to_pixels(np.array([0.0, bad]))


def test_a_stage_alone_refuses_them(stages, monkeypatch):
    """What the sample grids of a training are drawn with."""
    sampler = StageSampler(StageNetwork(stages[0]))
    x0 = np.zeros((3, 8, 8, 3), np.float32)
    x0[1, 0, 0, 0] = np.inf
    monkeypatch.setattr(sampler, "_run", lambda *args, **rest: jax.device_put(x0))
    with pytest.raises(UserError, match=r"stage 'base8': 1 of 3 pictures are not finite \(seeds 8\)"):
        text, mask = np.zeros((3, 8, 16)), np.ones((3, 8), bool)
        sampler({}, seeds=np.array([7, 8, 9]), text=text, mask=mask, negative=(text, mask))
