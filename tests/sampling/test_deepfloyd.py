"""From a pipeline's folder into a model folder and back; pictures of it. Against diffusers: tests/parity."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from imagen_jax.cli.main import main
from imagen_jax.convert.deepfloyd.exporting import export_pipeline
from imagen_jax.data import shapes_captions
from imagen_jax.errors import UserError
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.weights import WeightReader
from imagen_jax.text.small import make_small_encoder
from imagen_jax.training.config import load_config


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folders of two pipelines with random weights, as `export_pipeline` writes them."""
    folder, generator = tmp_path_factory.mktemp("pipelines"), np.random.default_rng(0)
    make_small_encoder(
        folder / "encoder", vocabulary_texts=shapes_captions.all_captions(), width=96, layers=1
    )
    for name, file in (("one", "stage1"), ("two", "stage2")):
        stage = load_config(f"deepfloyd/{file}.py:tiny").stage
        params = {
            key: (generator.standard_normal(leaf.shape) * 0.05).astype(np.float32)
            for key, leaf in StageNetwork(stage).abstract_params.items()
        }
        export_pipeline(folder / name, stage, params, text_encoder=str(folder / "encoder"))
    return folder


@pytest.fixture(scope="module")
def model(pipelines):
    out = pipelines / "model"
    flags = [f"--stage1={pipelines / 'one'}", f"--stage2={pipelines / 'two'}", f"--out={out}"]
    assert main(["import", "deepfloyd", *flags]) == 0
    return out


def tensors(folder):
    with WeightReader(folder) as reader:
        return {name: reader.read(name) for name in reader.names}


def test_there_and_back_gives_the_same_tensors(pipelines, model):
    out = pipelines / "back"
    assert main(["export", f"--from={model}", "--format=diffusers", f"--out={out}"]) == 0
    for name, stage in (("one", "deepfloyd16"), ("two", "deepfloyd32")):
        before, after = tensors(pipelines / name / "unet"), tensors(out / stage / "unet")
        assert before.keys() == after.keys()
        for key, value in before.items():
            np.testing.assert_array_equal(value, after[key], err_msg=key)
        for part in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
            assert (pipelines / name / part).read_text() == (out / stage / part).read_text()
    assert (out / "deepfloyd16" / "tokenizer" / "tokenizer.json").exists()


def test_imported_stages_are_those_that_were_exported(model):
    from imagen_jax.sampling.model_folder import ModelFolder

    for stage, file in zip(ModelFolder(model).stages, ("stage1", "stage2"), strict=True):
        wanted = load_config(f"deepfloyd/{file}.py:tiny").stage
        for field in ("network", "schedule", "augmentation", "padded_text", "max_text_length"):
            assert getattr(stage, field) == getattr(wanted, field), field
        assert stage.sampling.threshold == wanted.sampling.threshold


def test_pictures_of_an_imported_model(model, tmp_path):
    from PIL import Image

    def sample(out, *flags):
        command = ["sample", "a red circle", f"--model={model}", f"--out={tmp_path / out}", "--cache=off"]
        assert main([*command, "--steps=2", *flags]) == 0
        (picture,) = (tmp_path / out).glob("0*.png")
        return np.asarray(Image.open(picture))

    first = sample("a")
    assert first.shape == (32, 32, 3) and first.std() > 0
    np.testing.assert_array_equal(sample("b"), first)
    assert not np.array_equal(first, sample("d", "--negative_prompt=a blue square"))


def test_bfloat16_is_stored_and_used(pipelines, tmp_path):
    from imagen_jax.sampling.model_folder import ModelFolder

    flags = [f"--stage1={pipelines / 'one'}", f"--out={tmp_path / 'm'}", "--dtype=bfloat16"]
    assert main(["import", "deepfloyd", *flags]) == 0
    folder = ModelFolder(tmp_path / "m")
    (stage,) = folder.stages
    params = folder.params(stage.name, StageNetwork(stage).abstract_params)
    assert {str(each.dtype) for each in params.values()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "relu"}, "act_fn"),
        ({"block_out_channels": [32, 96]}, "expected"),
        ({"layers_per_block": 2}, "missing"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "config.json has quantization_config"),
    ],
)
def test_a_config_that_is_not_of_the_weights_is_refused(change, message, pipelines, tmp_path, capsys):
    import shutil

    shutil.copytree(pipelines / "one", tmp_path / "one")
    path = tmp_path / "one" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert main(["import", "deepfloyd", f"--stage1={tmp_path / 'one'}", f"--out={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and str(tmp_path / "one") in error


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("extra", [False, True])
def test_quantised_weights_are_refused(part, extra, pipelines, tmp_path, capsys):
    import shutil

    shutil.copytree(pipelines / "one", tmp_path / "one")
    [path] = (tmp_path / "one" / part).glob("*.safetensors")
    weights = tensors(path)
    name = min(each for each in weights if weights[each].ndim > 1 and "relative" not in each)
    if extra:
        weights[f"{name.removesuffix('.weight')}.SCB"] = np.ones(len(weights[name]), np.float32)
    else:
        weights[name] = np.ones(weights[name].shape, np.int8)
    save_file(weights, path)
    assert main(["import", "deepfloyd", f"--stage1={tmp_path / 'one'}", f"--out={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(path) in error and name.removesuffix(".weight") in error and "quantised" in error
    assert ("SCB (F32)" if extra else "int8") in error
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_stages_in_the_wrong_place_are_refused(pipelines, tmp_path, capsys):
    flags = [f"--stage1={pipelines / 'two'}", f"--out={tmp_path / 'out'}"]
    assert main(["import", "deepfloyd", *flags]) == 1
    assert "--stage1" in capsys.readouterr().err


def test_a_missing_folder_is_one_line(tmp_path, capsys):
    assert main(["import", "deepfloyd", "--stage1=./nowhere", f"--out={tmp_path / 'out'}"]) == 1
    assert "--stage1 ./nowhere: no such folder" in capsys.readouterr().err


def test_a_gated_model_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    from imagen_jax.convert.deepfloyd.importing import fetch

    def refuse(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match="accept their licence"):
        fetch("someone/something", "--stage1", variant=None, text_encoder=True)
