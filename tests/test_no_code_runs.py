"""Nothing that is loaded can run code: hostile folders of every kind that is read, each with code to leave a file."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from etils import epath
from PIL import Image, PngImagePlugin

from imagen_jax.convert.deepfloyd.importing import ImportConfig, import_deepfloyd
from imagen_jax.data import records
from imagen_jax.data.pipeline import RecordSource
from imagen_jax.data.sources import open_source
from imagen_jax.errors import UserError
from imagen_jax.models.weights import WeightReader
from imagen_jax.sampling.model_folder import ModelFolder
from imagen_jax.sampling.record import read_record
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.small import make_small_encoder


class Payload:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that no loader may bring about, by pickle or by the module `evil`, which is found by its name."""
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(marker))).close()
    assert marker.exists()
    marker.unlink()
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    yield marker
    assert not marker.exists()


def refused(load, *arguments):
    with pytest.raises(UserError) as caught:
        load(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.fixture
def encoder(tmp_path, marker):
    """A text encoder's folder with a module beside its files."""
    folder = make_small_encoder(tmp_path / "encoder", vocabulary_texts=["a red circle"], width=8, layers=1)
    (folder / "evil.py").write_text((tmp_path / "evil.py").read_text())
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "part"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": ["evil.Tokenizer", None]}, "auto_map"),
        ("config.json", {"auto_map": {"AutoTokenizer": "evil.Tokenizer"}}, "auto_map"),
        ("config.json", {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}, "auto_map"),
        ("tokenizer_config.json", {"tokenizer_class": "evil.Tokenizer"}, "tokenizer_class 'evil.Tokenizer'"),
        ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}, "tokenizer_class 'RagTokenizer'"),
        ("config.json", {"model_type": "evil"}, "model_type 'evil'"),
    ],
)
def test_tokenizer_and_encoder(encoder, file, values, part):
    change(encoder / file, **values)
    assert part in refused(TextEncoder.load, encoder)


def test_a_class_that_config_json_names(encoder):
    """Where the tokenizer's own file names none."""
    (encoder / "tokenizer_config.json").unlink()
    change(encoder / "config.json", tokenizer_class="evil.Tokenizer")
    assert "tokenizer_class 'evil.Tokenizer'" in refused(TextEncoder.load, encoder)


def test_pickled_weights(encoder, marker, tmp_path):
    payload = pickle.dumps(Payload(marker))
    (encoder / "model.safetensors").unlink()
    (encoder / "pytorch_model.bin").write_bytes(payload)
    assert "not weights that PyTorch has pickled" in refused(TextEncoder.load, encoder)
    # As PyTorch packs it, and under names that promise something else.
    with zipfile.ZipFile(encoder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    assert "no part of a tensor" in refused(TextEncoder.load, encoder)
    for name in ("model.safetensors", "model.safetensors.index.json"):
        for content in (payload, (encoder / "pytorch_model.bin").read_bytes()):
            (encoder / name).write_bytes(content)
            refused(TextEncoder.load, encoder)
    index = encoder / "model.safetensors.index.json"
    for file in ("../pytorch_model.bin", "evil.py"):
        index.write_text(json.dumps({"weight_map": {"shared.weight": file}}))
        assert "not a file of weights beside" in refused(WeightReader, index)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model_index.json", {"stages": ["evil"], "text_encoder": "x", "_class_name": ["evil", "Pipeline"]}),
        ("model_index.json", {"stages": ["../../evil"], "text_encoder": "x"}),
        ("model_index.json", ["evil"]),
        ("stage/config.json", {"name": "stage", "network": {"kind": "evil.Network"}}),
        ("stage/config.json", {"py/object": "evil.Stage", "py/reduce": ["evil.f"]}),
        ("stage/config.json", "!!python/object/apply:os.system ['true']"),
    ],
)
def test_model_folders(tmp_path, marker, file, content):
    folder = tmp_path / "model"
    (folder / "stage").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"stages": ["stage"], "text_encoder": "x"}))
    (folder / "stage" / "model.safetensors").write_bytes(pickle.dumps(Payload(marker)))
    (folder / file).write_text(json.dumps(content))
    refused(ModelFolder, folder)


def test_imported_pipelines(tmp_path, marker):
    folder = tmp_path / "pipeline"
    (folder / "unet").mkdir(parents=True)
    config = {"_class_name": "evil.UNet", "auto_map": {"AutoModel": "evil.UNet"}}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    text_encoder = str(tmp_path / "none")
    settings = ImportConfig(stage1=str(folder), out=str(tmp_path / "out"), text_encoder=text_encoder)
    assert str(folder) in refused(import_deepfloyd, settings)
    refused(WeightReader, folder / "unet")


@pytest.mark.parametrize("kind", ["whole", "nested", "named"])
def test_tfds_folders(tmp_path, marker, kind):
    """TFDS imports the modules that features.json names."""
    folder = tmp_path / "data" / "evil_set" / "1.0.0"
    folder.mkdir(parents=True)
    feature = {"pythonClassName": "evil.Feature", "tensor": {}}
    features = {"pythonClassName": f"{records._FEATURES}.features_dict.FeaturesDict"}
    features["featuresDict"] = {"features": {"image": feature}}
    if kind == "whole":
        features = {"type": "evil.Feature", "content": {}}
    (folder / "features.json").write_text(json.dumps(features))
    info = {"name": "evil_set", "version": "1.0.0", "fileFormat": "tfrecord", "moduleName": "evil"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    spec = f"evil_set,data_dir={tmp_path / 'data'}" if kind == "named" else folder
    assert "'evil.Feature' is not one of TFDS's own" in refused(open_source, f"tfds:{spec}")


def test_parquet_files(tmp_path, marker):
    """pyarrow once unpickled the types that a schema names; pandas's metadata are for pandas alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(marker)),
    }
    schema = pa.schema(
        [pa.field("image", pa.binary(), metadata=extension), pa.field("text", pa.string())],
        metadata={b"pandas": pickle.dumps(Payload(marker))},
    )
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    pq.write_table(pa.table([[picture.getvalue()], ["a red circle"]], schema=schema), tmp_path / "x.parquet")
    source = open_source(f"parquet:{tmp_path / 'x.parquet'}")
    [example] = [item for unit in source.units() for item in source.read(unit)]
    assert example.captions == ("a red circle",)


def test_record_folders(tmp_path, marker):
    payload = pickle.dumps(Payload(marker))
    np.save(tmp_path / "keys-train.npy", np.array([Payload(marker)], object), allow_pickle=True)
    assert "not a key index" in refused(records.KeyIndex, tmp_path, "train")
    (tmp_path / "keys-train.npy").write_bytes(payload)
    assert "not a key index" in refused(records.KeyIndex, tmp_path, "train")
    for name in ("dataset_info.json", "metadata.json"):
        (tmp_path / name).write_bytes(payload)
        refused(RecordSource, tmp_path, "train")


def test_pictures_and_notebooks(tmp_path, marker):
    """A PNG's record, in forms that other libraries would call code, and a notebook in the place of a file."""
    text = PngImagePlugin.PngInfo()
    text.add_text("imagen_jax", json.dumps({"stages": [{"py/object": "evil.Stage"}], "prompt": "x"}))
    text.add_text("parameters", pickle.dumps(Payload(marker)).decode("latin-1"))
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=text)
    refused(read_record, tmp_path / "x.png")
    cell = {"cell_type": "code", "source": ["import evil"], "outputs": [], "metadata": {}}
    notebook = json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    for name in ("x.ipynb", "model.safetensors"):
        (tmp_path / name).write_text(notebook)
    refused(read_record, tmp_path / "x.ipynb")
    refused(WeightReader, tmp_path)
    folder = tmp_path / "notebook"
    folder.mkdir()
    (folder / "model_index.json").write_text(notebook)
    refused(ModelFolder, epath.Path(folder))
