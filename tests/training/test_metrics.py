import json
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from imagen_jax.data.tfrecord import TFRecordReader
from imagen_jax.errors import UserError
from imagen_jax.training.metrics import MetricsWriter, StepCost, WandbRun, trim_lines

MEMORY = {"host_peak_gib", "device_peak_gib"}


def write(path, steps, tail=""):
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps) + tail)


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_trim_lines_drops_what_will_be_logged_again(tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    write(path, [10, 20, 30, 40])
    trim_lines(path, 20)
    assert steps_of(path) == [10, 20]


def test_trim_lines_drops_a_torn_last_line(tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    for torn in ('{"step": 30, "lo', '{"step": 2', "{", "3"):
        write(path, [10, 20], torn)
        trim_lines(path, 30)
        assert steps_of(path) == [10, 20]
        assert path.read_text().endswith("\n")


def test_trim_lines_without_a_file_makes_none(tmp_path):
    trim_lines(epath.Path(tmp_path / "metrics.jsonl"), 3)
    assert not list(tmp_path.iterdir())


def writer(workdir, start_step, **changes):
    return MetricsWriter(epath.Path(workdir), start_step=start_step, steps=8, batch_size=4, **changes)


def test_a_resumed_writer_leaves_one_line_a_step(tmp_path):
    first = writer(tmp_path, 0)
    for step in range(1, 6):
        first.log(step, {"loss": 1.0 / step, "grad_norm": 2.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss"')
    second = writer(tmp_path, 3)
    for step in range(4, 9):
        second.log(step, {"loss": 1.0 / step, "grad_norm": 2.0})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    figures = {"images_per_s", "images_per_s_per_device", "data_s", "step_s", "rest_s"}
    assert all(set(line) - MEMORY == {"step", "loss", "grad_norm"} | figures for line in lines)
    assert all(len(set(line) & MEMORY) == 1 for line in lines)
    assert [line["loss"] for line in lines] == [1.0 / step for step in range(1, 9)]
    assert all(line["images_per_s"] > 0 for line in lines)


def test_images_per_second_counts_examples_and_leaves_pauses_out(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("imagen_jax.training.clock.time.monotonic", lambda: now[0])
    metrics = writer(tmp_path, 0, cost=StepCost(flops=3e9, peak_flops=1e10))
    now[0] += 2.0
    metrics.log(5, {"loss": 1.0})  # 5 steps of 4 examples in 2 s
    with metrics.clock.pause():
        now[0] += 50.0
    with metrics.clock.data():
        now[0] += 0.25
    now[0] += 0.75
    metrics.log(6, {"loss": 1.0})
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_per_s"] for line in lines] == [10.0, 4.0]
    devices = jax.device_count()
    assert [line["images_per_s_per_device"] for line in lines] == [10.0 / devices, 4.0 / devices]
    assert [line["mfu"] for line in lines] == [round(rate / devices * 0.3, 4) for rate in (10.0, 4.0)]
    assert (lines[1]["data_s"], lines[1]["step_s"], lines[1]["rest_s"]) == (0.25, 0.0, 0.75)


def test_a_value_that_is_not_finite_is_null(tmp_path):
    metrics = writer(tmp_path, 0)
    metrics.log(1, {"loss": float("nan"), "grad_norm": float("inf")})
    metrics.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None and line["grad_norm"] is None
    assert "loss" not in {value.tag for event in events_of(tmp_path) for value in event.summary.value}


def test_wandb_is_loaded_when_asked_for_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    writer(tmp_path, 0).close()
    with pytest.raises(UserError, match=r"--wandb needs the package wandb: pip install"):
        writer(tmp_path, 0, wandb=WandbRun(project="p", config={}))


def test_wandb_offline_goes_on_under_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for start in (0, 1):
        metrics = writer(tmp_path, start, wandb=WandbRun(project="p", config={"seed": 1}))
        metrics.log(start + 1, {"loss": 0.5, "grad_norm": 1.5})
        metrics.pictures(start + 1, np.zeros((4, 4, 3), np.uint8))
        metrics.close()
        ids.append((tmp_path / "wandb_id.txt").read_text())
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/*.wandb"))) == 2


def test_a_disabled_writer_writes_nothing(tmp_path):
    metrics = writer(tmp_path, 0, enabled=False)
    metrics.advance()
    metrics.log(1, {"loss": 1.0})
    metrics.pictures(1, np.zeros((4, 4, 3), np.uint8))
    metrics.close()
    assert not list(tmp_path.iterdir())


def events_of(workdir):
    """All events of a TensorBoard folder; the files are TFRecords, whose checksums the reader checks."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        reader = TFRecordReader(path)
        events += [event_pb2.Event.FromString(reader[i]) for i in range(len(reader))]
    return events


def test_tensorboard_events_hold_scalars_and_pictures(tmp_path):
    metrics = writer(tmp_path, 0)
    metrics.log(3, {"loss": 0.5, "grad_norm": 1.5})
    metrics.pictures(3, np.zeros((6, 4, 3), np.uint8))
    metrics.close()
    values = {
        value.tag: (event.step, value) for event in events_of(tmp_path) for value in event.summary.value
    }
    figures = {"images_per_s", "images_per_s_per_device", "data_s", "step_s", "rest_s"}
    assert values.keys() - MEMORY == {"loss", "grad_norm", "samples"} | figures
    assert {step for step, _ in values.values()} == {3}
    assert values["loss"][1].simple_value == 0.5
    assert values["grad_norm"][1].simple_value == 1.5
    picture = values["samples"][1].image
    assert (picture.height, picture.width) == (6, 4)
    assert picture.encoded_image_string.startswith(b"\x89PNG")


def test_pauses_are_in_no_rate(tmp_path):
    """Compiling and drawing samples: neither the figures nor the bar's time left know of them."""
    writer = MetricsWriter(epath.Path(tmp_path), start_step=0, steps=4, batch_size=8)
    with writer.pause():
        time.sleep(0.6)
    writer.advance()
    writer.log(1, {"loss": 1.0})
    bar = writer._bar.format_dict
    writer.close()
    [line] = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["data_s"] + line["step_s"] + line["rest_s"] < 0.4
    assert bar["elapsed"] < 0.4
