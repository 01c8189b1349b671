"""A run knows its records and its text encoder from any working directory, and after all have been moved together."""

import json
import shutil

import pytest
from etils import epath

from imagen_jax.config import build
from imagen_jax.errors import UserError
from imagen_jax.sampling.model_folder import ModelFolder
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.precompute import PrecomputeConfig, precompute
from imagen_jax.training.config import TrainConfig
from imagen_jax.training.config_file import check_same_config, read_config, write_config
from imagen_jax.training.export import export
from imagen_jax.training.trainer import train


@pytest.fixture(scope="module")
def project(make_config, text_encoder, tmp_path_factory):
    """A folder with enc/, records/ and runs/base/, all named relatively to it when they were made."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(text_encoder, folder / "enc")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        source = "shapes:count=8,resolution=16"
        precompute(PrecomputeConfig(source=source, text_encoder="enc", out="records", num_shards=1))
        train(make_config("base", "data.path=records", "train.steps=1"), "runs/base")
    return folder


def check_export(project, out):
    export([project / "runs" / "base"], out)
    model = ModelFolder(out)
    assert TextEncoder.load(model.text_encoder()).identity == model.index.encoder


def test_export_from_elsewhere(project, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    check_export(project, tmp_path / "model")
    assert not caplog.records  # of libraries


def test_export_after_a_move(project, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere" / "project"
    shutil.copytree(project, moved)
    hidden = project.rename(project.with_name("hidden"))
    try:
        monkeypatch.chdir(tmp_path)
        check_export(moved, tmp_path / "model")
    finally:
        hidden.rename(project)


def test_export_of_a_run_that_wrote_absolute_paths(project, tmp_path, monkeypatch):
    """As runs before this had them."""
    old = tmp_path / "base"
    shutil.copytree(project / "runs" / "base", old)
    content = json.loads((old / "config.json").read_text())
    del content["relative_paths"]
    content["data"]["path"] = str(project / "records")
    (old / "config.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    export([old], tmp_path / "model")
    assert ModelFolder(tmp_path / "model").stages[0].name == "base"


def config_of(make_config, *overrides):
    return make_config("base", *overrides)


def test_what_is_no_local_path_stays(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "enc").mkdir()
    for place in ("google/t5", "demo", "gs://bucket/enc"):
        config = config_of(make_config, "data.path=gs://bucket/records", f"data.text_encoder={place}")
        write_config(epath.Path(tmp_path / "run"), config)
        content = json.loads((tmp_path / "run" / "config.json").read_text())
        assert content["data"]["path"] == "gs://bucket/records"
        assert content["data"]["text_encoder"] == place and "relative_paths" not in content
    write_config(epath.Path(tmp_path / "run"), config_of(make_config, "data.path=r", "data.text_encoder=enc"))
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["data"]["path"] == "../r" and content["data"]["text_encoder"] == "../enc"


def test_the_same_run_from_elsewhere(make_config, tmp_path, monkeypatch):
    """The same folders under other names are the same; others are not."""
    monkeypatch.chdir(tmp_path)
    for name in ("enc", "other", "deep/down"):
        (tmp_path / name).mkdir(parents=True)
    run = epath.Path(tmp_path / "run")
    write_config(run, config_of(make_config, "data.path=r", "data.text_encoder=enc"))
    monkeypatch.chdir(tmp_path / "deep" / "down")
    for place in ("../../enc", str(tmp_path / "enc")):
        check_same_config(run, config_of(make_config, f"data.text_encoder={place}"))
    with pytest.raises(UserError, match=r"another config: config\.data\.text_encoder"):
        check_same_config(run, config_of(make_config, "data.text_encoder=../../other"))
    assert build(TrainConfig, read_config(run), "config").data.path == str(tmp_path / "r")


@pytest.mark.parametrize("content", [{"data": 3}, {"data": {"path": 3}, "relative_paths": ["path"]}, {}])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="config"):
        build(TrainConfig, read_config(tmp_path), f"{tmp_path}/config.json")
