"""The cascade: a picture depends on its prompt and seed only."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from imagen_jax.errors import UserError
from imagen_jax.limits import MAX_SEED
from imagen_jax.models.text_form import TextForm
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.drawing import Drawing
from imagen_jax.sampling.inputs import to_pixels
from imagen_jax.sampling.prompts import check_prompt

PROMPTS = ("a red circle", "a blue square", "一个红色的圆形", "two green triangles")


@pytest.fixture(scope="module")
def imagen(model_folder):
    return Imagen.load(model_folder)


@pytest.fixture(scope="module")
def eight(imagen):
    """Two pictures of each prompt, drawn together."""
    return imagen.pictures(PROMPTS, seed=5, num_images=2, batch_size=8, keep_x0=True)


def assert_equal(made, expected):
    """In [−1, 1], through both stages."""
    assert [(each.prompt, each.seed) for each in made] == [(each.prompt, each.seed) for each in expected]
    for one, other in zip(made, expected):
        np.testing.assert_allclose(one.x0, other.x0, atol=1e-4)
        np.testing.assert_array_equal(one.pixels, to_pixels(one.x0))


def test_pictures_are_ordered_and_differ(eight):
    assert [each.prompt for each in eight] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [each.seed for each in eight] == 4 * [5, 6]
    pixels = np.stack([each.pixels for each in eight]).astype(int)
    assert pixels.shape == (8, 16, 16, 3) and eight[0].pixels.dtype == np.uint8
    # Neither flat nor clipped nor alike: otherwise the equalities below would say nothing.
    assert pixels.std(axis=(1, 2, 3)).min() > 10
    assert np.mean((pixels == 0) | (pixels == 255)) < 0.5
    for i in range(8):
        for j in range(i):
            assert np.abs(pixels[i] - pixels[j]).mean() > 2, (i, j)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_has_no_say(imagen, eight, batch_size):
    made = imagen.pictures(PROMPTS, seed=5, num_images=2, batch_size=batch_size, keep_x0=True)
    assert_equal(made, eight)


def test_neither_position_nor_company_has_a_say(imagen, eight):
    made = imagen.pictures(PROMPTS[::-1], seed=6, num_images=2, batch_size=8, keep_x0=True)
    assert_equal(made[0::2], [eight[i] for i in (7, 5, 3, 1)])  # seed 6
    alone = imagen.pictures(PROMPTS[3:], seed=6, batch_size=1, keep_x0=True)
    assert_equal(alone, [eight[7]])


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_the_devices_have_no_say(model_folder, eight, axes):
    assert len(jax.devices()) == 8
    imagen = Imagen.load(model_folder, mesh=make_mesh(MeshConfig(**axes)))
    # 3 is no multiple of the devices: the batch is filled up.
    made = imagen.pictures(PROMPTS[:2], seed=5, num_images=2, batch_size=3, keep_x0=True)
    assert_equal(made, eight[:4])


def test_generate_gives_the_same_as_pil_images(imagen, eight):
    images = imagen.generate(PROMPTS[:1], seed=5, num_images=2, batch_size=1)
    assert [(image.size, image.mode) for image in images] == 2 * [((16, 16), "RGB")]
    for image, expected in zip(images, eight):
        assert np.abs(np.asarray(image).astype(int) - expected.pixels.astype(int)).max() <= 1


def test_long_prompts_are_cut_and_unknown_words_allowed(imagen, eight):
    """Chinese of 7 characters and more, an empty prompt and emoji all make a picture."""
    prompts = ["红色" * 40, "", "🎨 zzz"]
    pixels = [each.pixels for each in imagen.pictures(prompts, batch_size=3)]
    assert all(np.std(each) > 10 for each in pixels)


def test_text_is_padded_with_zeros_and_masked(imagen):
    text, mask = imagen.encode(["a red circle", "a"], TextForm(length=8))
    assert text.shape == (2, 8, 16) and mask.shape == (2, 8)
    # "a red circle </s>" and "a </s>"
    np.testing.assert_array_equal(mask.sum(axis=1), [4, 2])
    assert np.all(text[~mask] == 0) and np.all(np.abs(text[mask]).max(axis=-1) > 0)
    cut, cut_mask = imagen.encode(["a red circle"], TextForm(length=2))
    assert cut.shape == (1, 2, 16) and cut_mask.all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "got -1 … -1"),
        ({"seed": MAX_SEED + 1}, "seeds must lie in 0 … 4294967295, got 4294967296"),
        ({"seed": MAX_SEED, "num_images": 2}, "got 4294967295 … 4294967296"),
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"until": 12}, "--until 12: the stages make pictures of 8, 16 pixels"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": "a red circle"}, "list of captions, got the string 'a red circle'"),
    ],
)
def test_bad_arguments(imagen, arguments, message):
    with pytest.raises(UserError, match=message):
        imagen.generate(**{"prompts": ["a"], **arguments})


def test_negative_prompt(imagen, stages):
    """The base is guided, the super-resolution stage is not."""
    base = stages[0]
    plain, strong = (
        {base.name: dataclasses.replace(base.sampling, guidance_weight=weight)} for weight in (1.0, 8.0)
    )
    # Away from nothing but the prompt itself is no guidance at all, whatever the weight.
    made = imagen.pictures(PROMPTS[:2], seed=5, negative_prompt=PROMPTS[0], sampling=strong, keep_x0=True)
    assert [each.prompt for each in made] == list(PROMPTS[:2])
    assert_equal(made[:1], imagen.pictures(PROMPTS[:1], seed=5, sampling=plain, keep_x0=True))
    usual = imagen.pictures(PROMPTS[:2], seed=5, sampling=strong, keep_x0=True)
    for one, other in zip(made, usual):
        assert np.abs(one.pixels.astype(int) - other.pixels.astype(int)).mean() > 2
    alone = imagen.pictures(PROMPTS[1:2], seed=5, negative_prompt=PROMPTS[0], sampling=strong, keep_x0=True)
    assert_equal(alone, made[1:])


def test_a_negative_prompt_without_guidance(imagen, stages):
    off = {stages[0].name: dataclasses.replace(stages[0].sampling, guidance_weight=1.0)}
    with pytest.raises(UserError, match="'a blue square' needs guidance"):
        imagen.generate(["a"], negative_prompt="a blue square", sampling=off)


def test_sampling_of_a_stage_that_is_not_there(imagen, stages, model_folder):
    with pytest.raises(UserError, match=r"no stage 'base9' to sample \(did you mean 'base8'\?\)"):
        imagen.generate(["a"], sampling={"base9": stages[0].sampling})


def test_the_last_seed_and_sampling_by_stage(imagen, stages, one_step):
    sampling = {stage.name: one_step(stage) for stage in stages}
    made = imagen.pictures(["a red circle"], seed=MAX_SEED, batch_size=1, sampling=sampling)
    usual = imagen.pictures(["a red circle"], seed=MAX_SEED, batch_size=1)
    assert made[0].seed == MAX_SEED
    assert np.abs(made[0].pixels.astype(int) - usual[0].pixels.astype(int)).mean() > 2


def test_prompts_are_encoded_once_and_alone(imagen):
    before = imagen.prompt_encoder.encoded
    imagen.encode(["two red squares", "three", "two red squares"], TextForm(length=8))
    imagen.encode(["three", "two red squares"], TextForm(length=8))
    assert imagen.prompt_encoder.encoded == before + 2
    together, _ = imagen.encode(["a blue circle", "two green triangles"], TextForm(length=7))
    alone, _ = Imagen.load(imagen.folder.path).encode(["two green triangles"], TextForm(length=7))
    np.testing.assert_array_equal(together[1], alone[0])


@pytest.mark.parametrize("prompt", ["half \ud83c", b"bytes", None, 3])
def test_a_prompt_that_is_no_text_is_refused(prompt):
    with pytest.raises(UserError, match=r"the prompt (holds half a character|must be a text)"):
        check_prompt(prompt)


def test_half_a_character_is_not_drawn(imagen):
    with pytest.raises(UserError, match="the prompt holds half a character"):
        imagen.draw(Drawing(wanted=(("good", 0), ("half \ud83c", 1))))
    with pytest.raises(UserError, match="the negative prompt holds half a character"):
        imagen.draw(Drawing(wanted=(("good", 0),), negative_prompt="\udce9"))


def test_stages_that_are_freed_make_the_same_pictures(imagen, model_folder, eight, monkeypatch):
    freed = Imagen.load(model_folder, free_stages=True)
    reads, read = [], freed.folder.params
    monkeypatch.setattr(freed.folder, "params", lambda name, *rest: reads.append(name) or read(name, *rest))
    assert_equal(freed.pictures(PROMPTS[:1], seed=5, batch_size=1, keep_x0=True), eight[:1])
    assert not freed._opened._params and freed.prompt_encoder._encoder is None
    assert_equal(freed.pictures(PROMPTS[1:2], seed=5, batch_size=1, keep_x0=True), eight[2:3])
    assert reads == 2 * ["base8", "sr16"]


def test_stopping_at_an_earlier_stage(imagen, model_folder):
    made = imagen.pictures(PROMPTS[:1], seed=5, until=8, batch_size=1)
    assert made[0].pixels.shape == (8, 8, 3) and made[0].x0 is None


def test_previews_show_the_picture_as_it_forms(imagen):
    seen = []
    (made,) = imagen.pictures(PROMPTS[:1], seed=5, batch_size=1, preview=seen.append)
    assert [(each.stage, each.calls) for each in seen if each.call == each.calls] == [
        ("base8", 3),
        ("sr16", 2),
    ]
    assert seen[0].stage == "base8" and seen[0].call == 1 and seen[0].pixels.shape == (1, 8, 8, 3)
    np.testing.assert_array_equal(seen[-1].pixels[0], made.pixels)
    assert np.abs(seen[0].pixels.astype(int) - seen[1].pixels).mean() > 1  # it still changes


def test_runs_without_tensorflow(model_folder, subprocess_env):
    code = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.split(".")[0] == "tensorflow" else find(name, *rest)
)
import imagen_jax
assert "jax" not in sys.modules
images = imagen_jax.Imagen.load({str(model_folder)!r}).generate(["a red circle"], seed=0)
assert "tensorflow" not in sys.modules
print(images[0].size)
"""
    environment = {**subprocess_env(), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "(16, 16)\n"), done.stderr
