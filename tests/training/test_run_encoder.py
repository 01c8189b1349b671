"""A run's text encoder stays the same: when it goes on, starts from other weights, is exported and draws."""

import contextlib
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from imagen_jax.config import to_dict
from imagen_jax.data.pipeline import record_count
from imagen_jax.data.records import write_key_index
from imagen_jax.errors import UserError
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.sampling import identity as sampling_identity
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.model_folder import ModelFolder
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.small import make_small_encoder
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.config_file import write_config
from imagen_jax.training.export import export
from imagen_jax.training.init_from import initial_params
from imagen_jax.training.keep import Keep
from imagen_jax.training.run import Run
from imagen_jax.training.run_encoder import FILE, data_encoder, recorded_encoder, write_encoder
from imagen_jax.training.trainer import train


@pytest.fixture(scope="module")
def encoder(text_encoder):
    return TextEncoder.load(text_encoder).identity


@pytest.fixture(scope="module")
def other_encoder(text_encoder, tmp_path_factory):
    """Folder of an encoder of the same width and tokenizer, with other weights."""
    from imagen_jax.data import shapes_captions

    folder = tmp_path_factory.mktemp("other") / "text_encoder"
    return make_small_encoder(folder, vocabulary_texts=shapes_captions.words(), width=16, layers=1, seed=1)


@pytest.fixture(scope="module")
def other(other_encoder):
    return TextEncoder.load(other_encoder).identity


@pytest.fixture
def records_of(records_folder, tmp_path):
    """records_of(identity) → a copy of the records that says that this encoder made them; None: none."""

    def make(identity):
        folder = tmp_path / "records"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(records_folder, folder)
        content = json.loads((folder / "metadata.json").read_text())
        del content["identity"]
        if identity is not None:
            content["identity"] = to_dict(identity)
        (folder / "metadata.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture(scope="module")
def run_of(make_config, tmp_path_factory):
    """run_of(identity, variant) → a work directory with a checkpoint of its last step; None: an older one."""

    @functools.cache
    def state(variant):
        config = make_config(variant)
        run = Run.of(config, make_mesh(MeshConfig(), jax.devices()[:1]))
        return run.start_from(
            {name: jax.numpy.ones(each.shape) for name, each in run.network.abstract_params.items()}
        )._replace(step=jax.numpy.int32(4))

    def make(identity, variant="base"):
        workdir, config = epath.Path(tmp_path_factory.mktemp("runs")), make_config(variant)
        write_config(workdir, config)
        write_encoder(workdir, identity)
        with contextlib.closing(Checkpoints(workdir, keep=Keep())) as checkpoints:
            checkpoints.save(4, state(variant), examples=32, config=config, encoder=identity)
        return workdir

    return make


@pytest.fixture(scope="module")
def run(run_of, encoder):
    return run_of(encoder)


def warnings_in(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("carried_by", ["work directory", "checkpoint"])
def test_a_run_does_not_go_on_with_another_encoder(
    run, make_config, records_of, other, encoder, tmp_path, carried_by
):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    if carried_by == "checkpoint":
        (workdir / FILE).unlink()
    records = records_of(other)
    for override in (f"data.path={records}", f"data.embeddings={records}"):
        config = make_config("base", override)
        if override.startswith("data.embeddings"):
            write_key_index(
                records, config.data.split, np.zeros(record_count(records, config.data.split), np.uint64)
            )
            write_config(epath.Path(workdir), config)
        with pytest.raises(UserError) as caught:
            train(config, workdir)
        message = str(caught.value)
        assert f"the records in {records} are of another text encoder than the run's" in message
        assert "embeddings differ" in message and str(workdir) in message and "\n" not in message
    write_config(epath.Path(workdir), make_config("base"))
    assert int(train(make_config("base", f"data.path={records_of(encoder)}"), workdir).step) == 4
    assert recorded_encoder(epath.Path(workdir)) == encoder


def test_an_encoder_beside_the_training_is_the_one_that_made_the_records(
    make_config, text_encoder, other_encoder, encoder, run_of, tmp_path
):
    """Computed in bfloat16 and spread over a mesh; under another name where that is known to be the same."""
    from imagen_jax.models.text_form import TextForm
    from imagen_jax.training.online import OnlineText

    def online(folder):
        mesh = make_mesh(MeshConfig(data=4, fsdp=2))
        return OnlineText.load(folder, dtype="bfloat16", form=TextForm(length=6), mesh=mesh)

    config = make_config("base")
    assert data_encoder(config.data, None) == encoder
    assert not data_encoder(config.data, online(text_encoder)).differences(encoder)
    workdir = run_of(encoder)
    beside = make_config("base", f"data.text_encoder={text_encoder}")
    write_config(workdir, beside)
    copy = tmp_path / "copy"
    shutil.copytree(text_encoder, copy)
    assert int(train(make_config("base", f"data.text_encoder={copy}"), workdir).step) == 4
    with pytest.raises(UserError, match=r"config\.data\.text_encoder: '.*' → '.*'"):
        train(make_config("base", f"data.text_encoder={other_encoder}"), workdir)
    shutil.rmtree(copy)
    shutil.copytree(other_encoder, copy)  # replaced in its place
    with pytest.raises(UserError, match=r"text_encoder=.*copy is of another text encoder than the run's"):
        train(make_config("base", f"data.text_encoder={copy}"), workdir)


def test_what_does_not_know_its_encoder_goes_on_with_one_warning(
    run, run_of, make_config, records_of, encoder, capsys
):
    older = run_of(None)
    capsys.readouterr()
    unknown = make_config("base", f"data.path={records_of(None)}")
    for config, workdir in ((make_config("base"), older), (unknown, run)):
        train(config, workdir)
        said = warnings_in(capsys)
        assert len(said) == 1 and "not say which text encoder" in said[0], said
    train(make_config("base"), run)
    assert not warnings_in(capsys)
    assert recorded_encoder(older) == encoder  # from its records


def test_init_from_refuses_another_encoder(run, run_of, make_config, encoder, other, capsys):
    config = make_config("base")
    with pytest.raises(
        UserError, match=f"--init_from {run}: its weights were .* another text encoder .*differ"
    ):
        initial_params(str(run), config, encoder=other)
    capsys.readouterr()
    initial_params(str(run), config, encoder=encoder)
    assert not warnings_in(capsys)
    initial_params(str(run_of(None)), config, encoder=encoder)
    assert len(warnings_in(capsys)) == 1


@pytest.fixture(scope="module")
def exported(run, text_encoder, tmp_path_factory):
    """A model folder with a copy of its encoder."""
    folder = tmp_path_factory.mktemp("models") / "model"
    export([run], folder, text_encoder=str(text_encoder))
    return folder


@pytest.fixture
def model_with(exported, tmp_path):
    """model_with(encoder) → a model folder that refers to this folder; None: with its own copy."""

    def make(encoder=None):
        model = tmp_path / "model"
        shutil.copytree(exported, model)
        if encoder is not None:
            shutil.rmtree(model / "text_encoder")
            index = json.loads((model / "model_index.json").read_text())
            index |= {"text_encoder": str(encoder), "encoder_files": sampling_identity.encoder_files(encoder)}
            (model / "model_index.json").write_text(json.dumps(index))
        return model

    return make


def test_export_takes_one_encoder_only(
    run, run_of, encoder, other, other_encoder, text_encoder, tmp_path, capsys
):
    out = tmp_path / "model"
    with pytest.raises(UserError, match=r"were trained with different text encoders .*embeddings differ"):
        export([run, run_of(other, "sr")], out)
    with pytest.raises(UserError, match=r"is not the one that the stages were trained with .*differ"):
        export([run], out, text_encoder=str(other_encoder))
    assert not out.exists()
    capsys.readouterr()
    export([run_of(None)], out, text_encoder=str(text_encoder), copy_text_encoder=False)
    assert len(warnings_in(capsys)) == 1
    index = ModelFolder(out).index
    assert index.encoder == encoder and index.encoder_files == sampling_identity.encoder_files(text_encoder)


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "referred to"])
def test_an_encoder_that_was_replaced_does_not_draw(
    model_with, text_encoder, other_encoder, encoder, other, make_config, tmp_path, copied
):
    place = tmp_path / "encoder"
    shutil.copytree(text_encoder, place)
    model = model_with(None if copied else place)
    place = model / "text_encoder" if copied else place
    assert ModelFolder(model).index.encoder == encoder
    if copied:
        with pytest.raises(UserError, match=f"--init_from {model}: .*another text encoder"):
            initial_params(str(model), make_config("base"), encoder=other)
    with pytest.MonkeyPatch.context() as patch:  # as long as the files are the same, nothing is encoded
        patch.setattr(TextEncoder, "encode", lambda *_, **__: pytest.fail("encoded"))
        Imagen.load(model)
    shutil.copy(other_encoder / "model.safetensors", place / "model.safetensors")
    with pytest.raises(UserError) as caught:
        Imagen.load(model)
    message = str(caught.value)
    assert message.startswith(f"{model}: text encoder ") and "embeddings differ" in message
    assert "not the one that the stages were trained with" in message and "\n" not in message


def test_other_files_of_the_same_encoder_draw(model_with, capsys):
    model = model_with()
    place = model / "text_encoder" / "tokenizer.json"
    place.write_text(json.dumps(json.loads(place.read_text())))  # without its line breaks
    capsys.readouterr()
    imagen = Imagen.load(model)
    assert not sampling_identity.has_files_of(imagen.folder, model / "text_encoder")
    assert not warnings_in(capsys)


def test_a_tokenizer_beside_the_encoder_counts(model_with, text_encoder, tmp_path):
    """A pipeline folder: the tokenizer is in none of the encoder's own files."""
    pipeline = tmp_path / "pipeline"
    for part, pattern in (("text_encoder", "[cm]*"), ("tokenizer", "tok*")):
        (pipeline / part).mkdir(parents=True)
        for file in text_encoder.glob(pattern):
            shutil.copy(file, pipeline / part / file.name)
    model = model_with(pipeline)
    Imagen.load(model)
    assert sampling_identity.encoder_files(TextEncoder.load(pipeline).folder) is None
    place = pipeline / "tokenizer" / "tokenizer.json"
    content = json.loads(place.read_text())
    words = content["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    place.write_text(json.dumps(content))
    with pytest.raises(UserError, match="their tokenizers differ"):
        Imagen.load(model)
