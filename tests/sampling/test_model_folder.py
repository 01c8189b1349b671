"""Model folders: what is written is read, and what is broken is said in one line."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath
from safetensors import safe_open

from imagen_jax.errors import UserError
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.text_form import TextForm
from imagen_jax.models.weights import load_state
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.model_folder import ModelFolder, check_cascade, save_stage
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.small import make_small_encoder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_reads_what_was_written(model_folder, stages, random_params):
    folder = ModelFolder(model_folder)
    assert folder.stages == stages
    assert folder.text_encoder() == str(model_folder / "text_encoder")
    for stage in stages:
        params, expected = (
            folder.params(stage.name, StageNetwork(stage).abstract_params),
            random_params(stage),
        )
        assert set(params) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(params[name], value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_may_be_stored_in_half_the_bytes(dtype, stages, random_params, tmp_path):
    stage, params = stages[0], random_params(stages[0])
    save_stage(tmp_path, stage, params, dtype=dtype)
    with safe_open(tmp_path / stage.name / "model.safetensors", "np") as file:
        named = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    assert set(named.values()) == {{"float16": "F16", "bfloat16": "BF16"}[dtype]} and len(named) == len(
        params
    )
    abstract = StageNetwork(stage).abstract_params
    read = load_state(abstract, tmp_path / stage.name / "model.safetensors")
    for name, value in params.items():
        assert read[name].dtype == np.float32
        rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
        np.testing.assert_allclose(read[name], value, rtol=rounding, atol=2.0**-25)


def test_a_weight_that_half_the_bytes_cannot_hold_is_named(stages, random_params, tmp_path):
    params = dict(random_params(stages[0]))
    name = sorted(params)[0]
    params[name] = np.asarray(params[name]) * 0 + 1e6
    with pytest.raises(UserError, match=f"--dtype=float16: {name} has 1e\\+06, but the largest"):
        save_stage(tmp_path, stages[0], params, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_the_text_encoder_may_lie_elsewhere(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    shutil.move(tmp_path / "model" / "text_encoder", tmp_path / "elsewhere")
    edit(tmp_path / "model" / "model_index.json", text_encoder=str(tmp_path / "elsewhere"))
    text, _ = Imagen.load(tmp_path / "model").encode(["red"], TextForm(length=4))
    assert text.shape[-1] == 16


# What is done to a copy of a good folder, and what the message must then say.
BREAKS = {
    "gone": (lambda m: shutil.rmtree(m), "--model {m}: there is no such folder"),
    "no index": (lambda m: (m / "model_index.json").unlink(), "{m} is not a model folder"),
    "index cut": (
        lambda m: (m / "model_index.json").write_text('{"sta'),
        "{m}/model_index.json is not valid",
    ),
    "index a list": (lambda m: (m / "model_index.json").write_text("[]"), "{m}/model_index.json must be"),
    "index not text": (
        lambda m: (m / "model_index.json").write_bytes(b"\xff\xfe"),
        "{m}/model_index.json is",
    ),
    "index misspelt": (
        lambda m: edit(m / "model_index.json", text_encodr="x"),
        "{m}/model_index.json.text_encodr is not a field (did you mean 'text_encoder'?)",
    ),
    "newer format": (lambda m: edit(m / "model_index.json", format=2), "{m}/model_index.json has format 2"),
    "no stages": (lambda m: edit(m / "model_index.json", stages=[]), "{m}/model_index.json: a cascade needs"),
    "stages swapped": (
        lambda m: edit(m / "model_index.json", stages=["sr16", "base8"]),
        "{m}/model_index.json: stage 'sr16' enlarges pictures of 8, but it follows nothing",
    ),
    "no base": (lambda m: edit(m / "model_index.json", stages=["sr16"]), "'sr16' enlarges pictures of 8"),
    "other resolution": (
        lambda m: edit(m / "sr16" / "config.json", low_resolution=4),
        "stage 'sr16' enlarges pictures of 4, but it follows 'base8' of 8",
    ),
    "twice": (
        lambda m: edit(m / "model_index.json", stages=["base8", "base8"]),
        "stage 'base8' enlarges pictures of None, but it follows 'base8' of 8",
    ),
    "stage renamed": (
        lambda m: edit(m / "sr16" / "config.json", name="sr17"),
        "{m}/sr16/config.json: the stage is called 'sr17', but its folder 'sr16'",
    ),
    "stage gone": (lambda m: shutil.rmtree(m / "sr16"), "{m}/sr16/config.json is missing"),
    "stage config wrong": (
        lambda m: edit(m / "base8" / "config.json", resolution="8"),
        "{m}/base8/config.json.resolution must be of type int, got '8'",
    ),
    "encoder gone": (lambda m: shutil.rmtree(m / "text_encoder"), "{m}: text encoder text_encoder: no such"),
    "encoder's weights gone": (
        lambda m: (m / "text_encoder" / "model.safetensors").unlink(),
        "{m}/text_encoder",
    ),
    "encoder of another width": (
        lambda m: make_small_encoder(m / "text_encoder", vocabulary_texts=["a"], width=8, layers=1),
        "{m}: stage 'base8' was trained on embeddings of width 16, but text encoder 'text_encoder' gives 8",
    ),
    "weights gone": (
        lambda m: (m / "base8" / "model.safetensors").unlink(),
        "{m}/base8/model.safetensors is missing",
    ),
    "weights cut": (
        lambda m: (m / "base8" / "model.safetensors").write_bytes(
            (m / "base8" / "model.safetensors").read_bytes()[:-100]
        ),
        "{m}/base8/model.safetensors: not a readable safetensors file",
    ),
    "weights of another network": (
        lambda m: shutil.copy(m / "sr16" / "model.safetensors", m / "base8" / "model.safetensors"),
        "{m}/base8/model.safetensors",
    ),
}


@pytest.mark.parametrize("how", BREAKS)
def test_broken_folders_are_named_in_one_line(model_folder, tmp_path, how):
    broken = tmp_path / "model"
    shutil.copytree(model_folder, broken)
    breaks, message = BREAKS[how]
    breaks(broken)
    with pytest.raises(UserError) as caught:
        Imagen.load(broken).generate(["a"])
    text = str(caught.value)
    assert message.format(m=broken) in text
    assert "\n" not in text


def test_cascades_that_do_not_fit(stages):
    base, sr = stages
    check_cascade([base, sr])
    again = dataclasses.replace(sr, name=base.name)
    with pytest.raises(UserError, match="same name"):
        check_cascade([base, again])
    with pytest.raises(UserError, match="'sr16' enlarges pictures of 8, but it follows 'sr16' of 16"):
        check_cascade([base, sr, sr])


def test_demo_is_the_packaged_model(model_folder, tmp_path, monkeypatch):
    """By that name, for models and for text encoders, unless a folder here has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("imagen_jax.demo.FOLDER", epath.Path(model_folder))
    opened = ModelFolder("demo")
    assert opened.path == epath.Path(model_folder) and opened.name == "demo"
    assert TextEncoder.load("demo").identity == TextEncoder.load(model_folder / "text_encoder").identity
    (tmp_path / "demo").mkdir()
    with pytest.raises(UserError, match="--model demo is not a model folder"):
        ModelFolder("demo")
