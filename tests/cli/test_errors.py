"""Wrong input gives one line that names what is at fault, exit code 1, and loses nothing."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from imagen_jax.cli.main import main
from imagen_jax.data import records
from imagen_jax.data.pipeline import open_batches
from imagen_jax.data.tfrecord import TFRecordReader
from imagen_jax.errors import UserError
from imagen_jax.models.stage import StageNetwork
from imagen_jax.sampling.model_folder import ModelIndex, save_index, save_stage
from imagen_jax.training.batches import pipeline_config
from imagen_jax.training.config_file import write_config


@pytest.fixture
def fails(capsys):
    """fails(argument, …) runs a command that must fail, and returns its one line on stderr."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        start = f"imagen-jax {arguments[0]}: error: "
        assert lines[0].startswith(start)
        return lines[0].removeprefix(start)

    return run


@pytest.fixture
def train_fails(fails, config_file, tmp_path):
    """The same for `train` with some overrides; the work directory must not have been touched."""

    def run(*overrides):
        workdir = tmp_path / "run"
        message = fails("train", f"--config={config_file}:sr", f"--workdir={workdir}", *overrides)
        assert not workdir.exists()
        return message

    return run


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("--config.optimizer.learning_rat=1", ["config.optimizer.learning_rat ", "'learning_rate'"]),
        ("--config.optimiser.kind=adam", ["config.optimiser ", "'optimizer'"]),
        ("--config.stage.network.chanels=[8]", ["config.stage.network.chanels ", "'channels'"]),
        ("--config.train.steps=many", ["config.train.steps ", "int", "'many'"]),
        (
            "--config.stage.network.param_dtype=bfloat16",
            ["config.stage.network.param_dtype=bfloat16", "float32"],
        ),
        ("--config.train.steps=1.5", ["config.train.steps ", "int", "1.5"]),
        ("--config.data.flip=1", ["config.data.flip ", "bool", "1"]),
        ("--config.optimizer.kind=sgd", ["config.optimizer.kind ", "adam, adafactor", "'sgd'"]),
        ("--config.stage.network.kind=vit", ["config.stage.network.kind ", "unet", "'vit'"]),
        ("--config.train.steps=0", ["config.train", "steps", "at least 1", "0"]),
        ("--config.train.steps.x=1", ["--config.train.steps.x", "not a group"]),
        ("--config.train.steps", ["--config.train.steps", "=value"]),
        ("--workdirs=elsewhere", ["--workdirs=elsewhere", "unexpected"]),
        ("--config.data.path=/no/such/folder", ["/no/such/folder/dataset_info.json", "record folder"]),
        ("--config.data.split=valid", ["no split 'valid'", "test, train"]),
        ("--config.data.batch_size=104", ["config.data.batch_size=104", "'train'", "96 records"]),
        ("--config.data.batch_size=12", ["config.data.batch_size=12", "8 devices"]),
        ("--config.stage.network.text_width=32", ["config.stage.network.text_width is 32", "width 16"]),
        ("--config.mesh.data=3", ["config.mesh", "data 3", "8 devices"]),
        ("--config.mesh.fsdp=3", ["config.mesh", "fsdp 3", "8 devices"]),
    ],
)
def test_train_names_the_field(override, parts, train_fails):
    message = train_fails(override)
    assert all(part in message for part in parts), message


def test_train_names_a_config_that_it_cannot_read(fails, config_file, tmp_path):
    out = f"--workdir={tmp_path / 'run'}"
    assert "--config: no file 'shapes/base33.py'" in fails("train", "--config=shapes/base33.py", out)
    message = fails("train", f"--config={config_file}:big", out)
    assert f"--config {config_file}:big" in message and "variants 'base' and 'sr', not 'big'" in message
    assert "not 'tiny'" in fails("train", "--config=shapes/base16.py:tiny", out)
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\ndef get_config(:\n")
    assert f"{broken}, line 2" in fails("train", f"--config={broken}", out)
    broken.write_text("x = 1\n")
    assert f"{broken} has no function get_config" in fails("train", f"--config={broken}", out)


def test_train_leaves_a_work_directory_of_another_config_alone(fails, config_file, make_config, tmp_path):
    write_config(epath.Path(tmp_path), make_config("sr"))
    before = (tmp_path / "config.json").read_bytes()
    command = ["train", f"--config={config_file}:sr", f"--workdir={tmp_path}"]
    message = fails(*command, "--config.optimizer.learning_rate=0.5", "--config.seed=3")
    assert str(tmp_path) in message and "config.optimizer.learning_rate: 0.001 → 0.5" in message
    assert "1 more" in message
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path / 'config.json'} is not valid JSON" in fails(*command)
    (tmp_path / "config.json").write_bytes(before)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def place_of(folder, key):
    """File and byte offset of a record."""
    info = records.read_folder_info(folder)
    for shard in info.shards("train"):
        reader = TFRecordReader(shard)
        for number in range(len(reader)):
            if records.parse(reader[number], info.encoder.width, "").key == key:
                return shard, int(reader.offsets[number]), int(reader.offsets[number + 1])
    raise AssertionError(f"no record {key!r}")


def test_a_damaged_record_stops_training_and_nothing_is_lost(
    config_file, make_config, records_folder, tmp_path, capsys
):
    folder, workdir = tmp_path / "records", tmp_path / "run"
    shutil.copytree(records_folder, folder)
    overrides = [f"--config.data.path={folder}", "--config.train.steps=6"]
    with open_batches(pipeline_config(make_config("sr", f"data.path={folder}"))) as batches:
        fifth = [next(batches) for _ in range(5)][-1]
    shard, start, end = place_of(folder, fifth["key"][3])
    intact = shard.read_bytes()
    middle = (start + end) // 2
    shard.write_bytes(intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :])
    command = ["train", f"--config={config_file}:sr", f"--workdir={workdir}", *overrides]

    assert main(command) == 1
    captured = capsys.readouterr().err
    message = captured.splitlines()[-1]
    assert message.startswith(f"imagen-jax train: error: {shard}: CRC of the record data at byte {start} ")
    assert "Traceback" not in captured
    saved = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert "2" in saved and not [name for name in saved if "tmp" in name]

    shard.write_bytes(intact)
    assert main(command) == 0
    # The whole run's last checkpoint, and the first run's is still there.
    assert {"2", "6"} <= {path.name for path in (workdir / "checkpoints").iterdir()}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert "step 2 of 6" in capsys.readouterr().out


def test_export_names_what_is_missing(fails, make_config, tmp_path):
    model = tmp_path / "model"
    for name, variant in (("base", "base"), ("sr", "sr")):
        write_config(epath.Path(tmp_path / name), make_config(variant))
    (tmp_path / "empty").mkdir()
    message = fails("export", f"--from={tmp_path / 'empty'}", f"--out={model}")
    assert f"{tmp_path / 'empty'} is not a work directory" in message
    message = fails("export", f"--from={tmp_path / 'sr'}", f"--out={model}")
    assert "'sr' enlarges pictures of 8" in message and "must be a base" in message
    message = fails("export", f"--from={tmp_path / 'base'},{tmp_path / 'sr'}", f"--out={model}")
    assert f"--from {tmp_path / 'base'}: no complete checkpoint" in message
    assert not (model / "model_index.json").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_config, text_encoder):
    """A model folder of two untrained stages."""
    folder = tmp_path_factory.mktemp("models") / "model"
    for variant in ("base", "sr"):
        stage = make_config(variant).stage
        shapes = StageNetwork(stage).abstract_params
        save_stage(folder, stage, {name: np.zeros(each.shape, each.dtype) for name, each in shapes.items()})
    save_index(folder, ModelIndex(stages=("base", "sr"), text_encoder=str(text_encoder)))
    return folder


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--steps=few"], "--steps few"),
        (["--steps=1,2,3"], "--steps 1,2,3: give one value, or one for each of the 2 stages"),
        (["--steps=0"], "steps must be at least 1, got 0"),
        (["--guidance=strong"], "--guidance strong"),
        (["--sampler=euler"], "'euler'"),
        (["--num_images=0"], "num_images"),
        (["--seed=-1"], "seeds must lie in 0"),
    ],
)
def test_sample_names_the_flag(flags, part, model, fails, tmp_path):
    out = tmp_path / "pictures"
    assert part in fails("sample", "a red circle", f"--model={model}", f"--out={out}", *flags)
    assert not out.exists()


def test_sample_names_a_model_or_prompt_that_is_missing(fails, tmp_path):
    model, out = f"--model={tmp_path / 'none'}", f"--out={tmp_path / 'pictures'}"
    assert f"--model {tmp_path / 'none'}: there is no such folder" in fails("sample", "x", model, out)
    assert "has no model_index.json" in fails("sample", "x", f"--model={tmp_path}", out)
    assert "--prompts_file" in fails("sample", model, out)
    message = fails("sample", model, out, f"--prompts_file={tmp_path / 'list.txt'}")
    assert f"--prompts_file {tmp_path / 'list.txt'}" in message
    assert not list(tmp_path.iterdir())
    assert "unknown argument '--stepz=3'" in fails("sample", "x", model, out, "--stepz=3")


def test_quickstart_names_an_unknown_scale(fails, tmp_path):
    assert "--scale must be one of full, smoke; got 'big'" in fails(
        "quickstart", f"--out={tmp_path / 'out'}", "--scale=big"
    )


@pytest.mark.parametrize("command", [["--debug", "train"], ["train", "--debug"]])
def test_debug_lets_the_traceback_through(command, tmp_path):
    with pytest.raises(UserError, match="no file 'none"):
        main([*command, "--config=none.py", f"--workdir={tmp_path}"])


def test_the_command_itself_prints_one_line_and_exits_with_1(tmp_path, subprocess_env):
    command = [sys.executable, "-m", "imagen_jax", "train", "--config=none.py", f"--workdir={tmp_path}"]
    done = subprocess.run(command, env=subprocess_env(), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "imagen-jax train: error: --config: no file 'none.py', here or below the installed configs/\n"
    )
    debugged = subprocess.run(
        [*command, "--debug"], env=subprocess_env(), capture_output=True, text=True, timeout=300
    )
    assert debugged.returncode == 1
    assert debugged.stderr.startswith("Traceback (most recent call last):")
