"""The whole cascade against diffusers' pipelines, on random weights and the same noise; and the way back."""

import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

from imagen_jax.convert.deepfloyd.exporting import export_diffusers  # noqa: E402
from imagen_jax.convert.deepfloyd.importing import ImportConfig, import_deepfloyd  # noqa: E402
from imagen_jax.diffusion import loop  # noqa: E402
from imagen_jax.diffusion.rules import SamplerState  # noqa: E402
from imagen_jax.sampling import stage_sampler  # noqa: E402
from imagen_jax.sampling.cascade import Imagen  # noqa: E402
from imagen_jax.sampling.drawing import Drawing  # noqa: E402
from imagen_jax.sampling.programs import ProgramSpec  # noqa: E402

PROMPTS = ["A red circle, left of a blue square ", "two green stars"]
NEGATIVE = "a red star"
STEPS = 8
SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "clip_sample": False,
}
PAIRS = {"dummy": ("dummy-1", "dummy-2"), "real flags": ("stage-1", "stage-2")}


def make_pipelines(names, unet_folder, folder):
    """diffusers' two pipelines of these networks, saved in FOLDER/one and FOLDER/two."""
    from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    from imagen_jax.text.small import make_small_encoder

    networks = [copy.deepcopy(unet_folder(name)[0]) for name in names]
    for network in networks:
        # A network of random weights answers a small change with a larger one, guidance multiplies that, and eight
        # steps raise it to a power: as made, diffusers in float32 ends 0.6 from diffusers in float64. With this the
        # two stay within 1.2e-4, and three quarters of the last picture's values are not cut.
        network.conv_out.weight.data.mul_(0.3)
    width = networks[0].config.encoder_hid_dim
    words = [*PROMPTS, NEGATIVE, *(each.lower() for each in PROMPTS)]
    make_small_encoder(folder / "encoder", vocabulary_texts=words, width=width, layers=2)
    common = {
        "text_encoder": T5EncoderModel.from_pretrained(folder / "encoder").eval(),
        "tokenizer": AutoTokenizer.from_pretrained(folder / "encoder"),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    first, second = (DDPMScheduler(**SCHEDULER, sample_max_value=value) for value in (1.5, 1.0))
    base = IFPipeline(unet=networks[0], scheduler=first, **common)
    enlarge = IFSuperResolutionPipeline(
        unet=networks[1], scheduler=second, image_noising_scheduler=second, **common
    )
    for name, pipeline in (("one", base), ("two", enlarge)):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder / name)
    return base, enlarge


class Noise:
    """The same numbers for both sides: of each picture size one array a step, and one for the low-res input."""

    def __init__(self, monkeypatch, sides):
        generator = np.random.default_rng(0)
        self.steps = {
            side: generator.standard_normal((STEPS + 1, len(PROMPTS), side, side, 3)).astype(np.float32)
            for side in sides
        }
        self.low = generator.standard_normal((len(PROMPTS), sides[1], sides[1], 3)).astype(np.float32)
        self._queue: list[np.ndarray] = []
        for module in ("pipeline_if", "pipeline_if_superresolution"):
            monkeypatch.setattr(f"diffusers.pipelines.deepfloyd_if.{module}.randn_tensor", self.theirs)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", self.theirs)
        for module in (loop, stage_sampler):
            monkeypatch.setattr(module, "image_noise", self.ours)

    def begin(self, side, low):
        first, *rest = self.steps[side]
        self._queue = [first, *([self.low] if low else []), *rest]

    def theirs(self, shape, **_):
        noise = torch.from_numpy(self._queue.pop(0)).permute(0, 3, 1, 2)
        assert tuple(shape) == tuple(noise.shape)
        return noise

    def ours(self, keys, step, shape):
        if isinstance(step, int) and step == stage_sampler._AUG_NOISE:
            return jnp.asarray(self.low)
        return jnp.asarray(self.steps[shape[0]])[step]


def run_theirs(base, enlarge, noise, negative):
    """All states of both stages (NHWC), the final one last."""
    states: list[list[np.ndarray]] = []
    low = None
    for pipeline, guidance in ((base, 7.0), (enlarge, 4.0)):
        seen: list[np.ndarray] = []
        side = pipeline.unet.config.sample_size
        noise.begin(side, low is not None)
        made = pipeline(
            PROMPTS,
            negative_prompt=None if negative is None else [negative] * len(PROMPTS),
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            output_type="pt",
            clean_caption=False,
            callback=lambda i, t, x, seen=seen: seen.append(x.permute(0, 2, 3, 1).numpy().copy()),
            **({} if low is None else {"image": low, "noise_level": 250}),
        )
        low = made.images
        assert len(seen) == STEPS
        states.append([noise.steps[side][0], *seen])
    return states


def settings(model):
    return {
        stage.name: dataclasses.replace(
            stage.sampling, sampler=dataclasses.replace(stage.sampling.sampler, steps=STEPS)
        )
        for stage in model.stages
    }


@pytest.mark.parametrize(("pair", "negative"), [("dummy", NEGATIVE), ("real flags", None)])
def test_cascade_matches_diffusers(pair, negative, unet_folder, tmp_path, monkeypatch):
    base, enlarge = make_pipelines(PAIRS[pair], unet_folder, tmp_path)
    out = tmp_path / "model"
    stages = import_deepfloyd(
        ImportConfig(stage1=str(tmp_path / "one"), stage2=str(tmp_path / "two"), out=str(out))
    )
    noise = Noise(monkeypatch, [stage.resolution for stage in stages])
    states = run_theirs(base, enlarge, noise, negative)
    assert (np.abs(states[1][-1]) < 0.99).mean() > 0.5 and states[1][-1].std() > 0.3
    model = Imagen.load(out, cache="off")
    sampling = settings(model)
    drawing = Drawing.of(PROMPTS, sampling=sampling, negative_prompt=negative)
    made = np.stack([picture.x0 for picture in model.draw(drawing, batch_size=2, keep_x0=True)])
    np.testing.assert_allclose(made, np.clip(states[1][-1], -1, 1), atol=1e-3, rtol=0)
    # Every step alone, from where theirs was.
    low = None
    for stage, seen in zip(model.stages, states, strict=True):
        spec = ProgramSpec(
            stage=stage, sampling=sampling[stage.name], batch=len(PROMPTS), negative=True, mesh=None
        )
        program, params = model._opened.get(spec)
        text, mask = model.encode(PROMPTS, stage.text_form)
        away, away_mask = model.encode([negative or ""] * len(PROMPTS), stage.text_form)
        inputs = program.place(
            stage_sampler.StageInputs(
                seeds=np.zeros(len(PROMPTS), np.uint32),
                text=text,
                mask=mask,
                low_res=low,
                negative_text=away,
                negative_mask=away_mask,
            )
        )
        for i in range(STEPS):
            state = SamplerState(jnp.asarray(seen[i]), jnp.zeros_like(seen[i]))
            state = program(params, inputs, state, i, i + 1)
            got = state.x0 if i == STEPS - 1 else state.x
            np.testing.assert_allclose(np.asarray(got), seen[i + 1], atol=1e-4, rtol=0, err_msg=f"step {i}")
        low = seen[-1]
    monkeypatch.undo()
    check_the_way_back(out, tmp_path, (base, enlarge), stages)


def check_the_way_back(model, folder, pipelines, stages):
    """Exported again, tensors are identical and diffusers draws from the folder."""
    from diffusers import DiffusionPipeline

    names = export_diffusers(model, folder / "back")
    assert names == [stage.name for stage in stages]
    for name, before in zip(names, pipelines, strict=True):
        after = DiffusionPipeline.from_pretrained(folder / "back" / name)
        assert type(after) is type(before)
        old, new = before.unet.state_dict(), after.unet.state_dict()
        assert old.keys() == new.keys()
        for key, tensor in old.items():
            assert tensor.dtype == new[key].dtype and torch.equal(tensor, new[key]), key
        for key in SCHEDULER | {"sample_max_value": None}:
            assert after.scheduler.config[key] == before.scheduler.config[key]
