"""Cloud paths without what they need: one line, whatever the verb and the flag."""

import importlib
import sys

import pytest
from etils.epath import backend

from imagen_jax.cli.main import main
from imagen_jax.files import cloud_fault


@pytest.fixture
def no_packages(monkeypatch):
    """gcsfs and s3fs are not installed."""
    registry = importlib.import_module("fsspec.registry")  # fsspec.registry is something in it
    for package, names in {"gcsfs": ("gcs", "gs"), "s3fs": ("s3", "s3a")}.items():
        monkeypatch.setitem(sys.modules, package, None)
        for name in names:
            monkeypatch.delitem(registry._registry, name, raising=False)
    type(backend.fsspec_backend)._get_filesystem.cache_clear()


@pytest.mark.parametrize(
    "command",
    [
        "precompute --source=webdataset:{}/*.tar --text_encoder=e --out={local}",
        "precompute --source=folder:{} --text_encoder=e --out={local}",
        "precompute --source=parquet:{} --text_encoder=e --out={local}",
        "precompute --source=tfds:{} --text_encoder=e --out={local}",
        "precompute --source=shapes:count=2 --text_encoder={} --out={local}",
        "precompute --source=shapes:count=2 --text_encoder={} --make_small_encoder --out={local}",
        "precompute --source=shapes:count=2 --text_encoder=e --out={}",
        "train --config=shapes/base16.py:smoke --workdir={} --config.data.path={records} "
        "--config.stage.network.text_width=16",
        "train --config=shapes/base16.py:smoke --workdir={local} --config.data.path={}",
        "train --config=shapes/base16.py:smoke --workdir={local} --config.data.embeddings={}",
        "train --config=shapes/base16.py:smoke --workdir={local} --config.data.text_encoder={}",
        "export --from={} --out={local}",
        "sample x --model={} --out={local}",
        "sample --prompts_file={} --model={local} --out={local}",
        "sample --like={} --out={local}",
        "import deepfloyd --stage1={} --text_encoder={} --out={local}",
        "serve --port=0 --model={}",
        "quickstart --out={}",
    ],
)
@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_missing_package_is_named_with_its_extra(
    scheme, extra, command, no_packages, records_folder, capsys, tmp_path
):
    if command.startswith("serve"):
        pytest.importorskip("nicegui")
    places = {"local": tmp_path / "x", "records": records_folder}
    words = command.format(*[f"{scheme}://bucket/x"] * command.count("{}"), **places).split()
    assert main(words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "error:" in line] == lines[-1:]
    assert f"pip install 'imagen_jax[{extra}]'" in lines[-1] and f"{scheme}://" in lines[-1]


def test_what_a_client_says_is_one_line():
    class HttpError(Exception):
        pass

    HttpError.__module__ = "gcsfs.retry"
    fault = cloud_fault(HttpError("Anonymous caller does not have\nstorage.objects.get access"))
    assert fault is not None and fault.endswith("Anonymous caller does not have storage.objects.get access")
    assert cloud_fault(ImportError("no module named torch")) is None and cloud_fault(KeyError("x")) is None


@pytest.mark.parametrize(
    "command",
    [
        "precompute --source=shapes:count=2 --text_encoder=e --out=gcs://bucket/x",
        "sample x --model=s4://m --out=o",
    ],
)
def test_a_store_that_is_not_known_is_refused(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 1
    assert "gs:// and s3:// are known" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
