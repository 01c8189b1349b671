"""Which checkpoints stay, and what happens when one cannot be written or read."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.config import Best
from imagen_jax.training.keep import Keep
from imagen_jax.training.lock import WorkdirLock
from imagen_jax.training.state import TrainState
from imagen_jax.training.trainer import train


def state_of(value):
    params = {"weight": jnp.full((64, 64), float(value))}
    moments = {"mu": jnp.full((3,), float(value))}
    return TrainState(jnp.asarray(value, jnp.int32), {"d": params}, {"d": params}, {"d": moments})


def abstract():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state_of(0)
    )


def saved(workdir, keep, steps, config, metrics=None):
    checkpoints = Checkpoints(workdir, keep=keep)
    for step in steps:
        metric = None if metrics is None else metrics.get(step)
        checkpoints.save(step, state_of(step), examples=step * 8, config=config, metric=metric)
        checkpoints.wait()
    checkpoints.close()
    return sorted(int(path.name) for path in checkpoints.folder.iterdir())


METRICS = {1: 5.0, 2: 1.0, 3: 2.0, 4: 9.0, 5: 4.0, 6: 4.0, 7: 6.0}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (Keep(newest=2), [6, 7]),
        (Keep(newest=1, every=3), [3, 6, 7]),
        (Keep(newest=1, best=2), [2, 3, 7]),
        (Keep(newest=1, best=1, best_is=Best.HIGHEST), [4, 7]),
        (Keep(newest=1, every=5, best=1), [2, 5, 7]),
        (Keep(), [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_checkpoints_that_a_rule_names_stay(keep, expected, make_config, tmp_path):
    assert saved(tmp_path, keep, range(1, 8), make_config(), METRICS) == expected
    if keep.best:
        reader = Checkpoints(tmp_path)
        assert reader.best_step() == (2 if keep.best_is is Best.LOWEST else 4)
        reader.close()


def test_the_best_are_remembered_by_the_next_start(make_config, tmp_path):
    keep = Keep(newest=1, best=1)
    assert saved(tmp_path, keep, [1, 2, 3], make_config(), METRICS) == [2, 3]
    assert saved(tmp_path, keep, [4, 5], make_config(), METRICS) == [2, 5]
    # One whose metric nobody knows is not among the best.
    assert saved(tmp_path, keep, [6, 7], make_config(), {}) == [2, 7]


def test_reading_leaves_a_save_in_progress_alone(make_config, tmp_path):
    saved(tmp_path, Keep(newest=3), [1], make_config())
    going_on = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    going_on.mkdir()
    reader = Checkpoints(tmp_path)
    assert reader.latest_step() == 1
    reader.close()
    assert going_on.exists()
    # What a save left is cleared in the background, at the latest before the next save.
    saved(tmp_path, Keep(), [3], make_config())
    assert not going_on.exists()
    assert Checkpoints(tmp_path / "nothing").latest_step() is None
    assert not (tmp_path / "nothing").exists()


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_a_truncated_checkpoint_is_set_aside_and_the_one_before_taken(make_config, tmp_path, capfd):
    """Whichever of its files it is: either the checkpoint is whole all the same, or the one before is."""
    original, workdir, fell_back = tmp_path / "original", tmp_path / "run", 0
    saved(original, Keep(), [3, 5], make_config())
    capfd.readouterr()
    for name in files_of(original / "checkpoints" / "5"):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(original, workdir)
        path = workdir / "checkpoints" / "5" / name
        os.truncate(path, path.stat().st_size // 2)
        checkpoints = Checkpoints(workdir, keep=Keep(newest=3))
        state, examples, step = checkpoints.restore_newest(abstract())
        assert examples == step * 8
        for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(state_of(step))):
            assert np.array_equal(leaf, expected)
        said = [line for line in capfd.readouterr().err.splitlines() if "is damaged" in line]
        if step == 5:
            assert not said and not (workdir / "damaged_checkpoints").exists()
            continue
        fell_back += 1
        damaged = workdir / "damaged_checkpoints" / "5"
        assert len(said) == 1 and str(damaged) in said[0] and f"{workdir / 'checkpoints' / '5'} is" in said[0]
        assert files_of(damaged) == files_of(original / "checkpoints" / "5")
        # The step is made and saved again.
        checkpoints.save(5, state_of(5), examples=40, config=make_config())
        checkpoints.wait()
        assert checkpoints.latest_step() == 5
        checkpoints.close()
    assert fell_back >= 5


def test_without_an_intact_checkpoint_nothing_begins_anew(make_config, tmp_path):
    saved(tmp_path, Keep(), [3, 5], make_config())
    for step in (3, 5):
        (tmp_path / "checkpoints" / str(step) / "state" / "manifest.ocdbt").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, keep=Keep())
    with pytest.raises(UserError, match=r"none of the 2 checkpoints can be restored; they are in .*damaged_"):
        checkpoints.restore_newest(abstract())


def test_a_second_run_in_a_work_directory_is_refused(make_config, tmp_path):
    train(make_config("base", "train.steps=2"), tmp_path)
    before = {path: (tmp_path / path).read_bytes() for path in files_of(tmp_path)}
    # The lock of another process: this one's would not be in its own way after a fork.
    code = "import sys, time; from imagen_jax.training.lock import WorkdirLock\n"
    code += f"lock = WorkdirLock({str(tmp_path)!r}); print('held', flush=True); time.sleep(1000)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another run is going on in it \(host .*, pid {other.pid}\)"):
        train(make_config("base", "train.steps=2"), tmp_path)
    after = {path: (tmp_path / path).read_bytes() for path in files_of(tmp_path)}
    assert {**after, "lock": None} == {**before, "lock": None} or set(after) == set(before)
    other.kill()
    other.wait()
    lock = WorkdirLock(tmp_path)  # a killed run leaves none
    assert lock.held
    lock.close()


def test_an_error_lets_go_of_the_work_directory(make_config, tmp_path):
    with pytest.raises(UserError, match="records"):
        train(make_config("base", "data.batch_size=104"), tmp_path / "run")
    train(make_config("base", "train.steps=1"), tmp_path / "run")
    with pytest.raises(UserError, match="another config"):
        train(make_config("base", "train.steps=1", "seed=3"), tmp_path / "run")
    lock = WorkdirLock(tmp_path / "run")
    assert lock.held
    lock.close()


def test_a_lost_process_is_no_fault_of_the_folder(make_config, tmp_path, monkeypatch):
    """The launcher starts again after the one, not after the other."""
    checkpoints, config = Checkpoints(tmp_path, keep=Keep()), make_config("base")

    def fail(*args, **kwargs):
        raise ValueError("Exception while saving") from cause

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    cause: Exception = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    with pytest.raises(ValueError, match="while saving") as caught:
        checkpoints.save(1, state_of(1), examples=8, config=config)
    assert not isinstance(caught.value, UserError)
    cause = OSError("No space left on device")
    with pytest.raises(UserError, match="No space left on device"):
        checkpoints.save(1, state_of(1), examples=8, config=config)


# Without the capability that lets root write anywhere; others do not have it.
UNPRIVILEGED = """
import ctypes, sys
from imagen_jax.cli.main import main
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc = ctypes.CDLL(None, use_errno=True)
assert libc.capset(header, data) == 0, ctypes.get_errno()
sys.exit(main(sys.argv[1:]))
"""


def command(config_file, workdir, *overrides, code="-mimagen_jax"):
    start = [sys.executable, "-m", "imagen_jax"] if code == "-mimagen_jax" else [sys.executable, "-c", code]
    return [*start, "train", f"--config={config_file}:base", f"--workdir={workdir}", *overrides]


def test_a_read_only_checkpoint_folder_is_refused_at_the_start(
    config_file, make_config, tmp_path, subprocess_env
):
    train(make_config("base", "train.steps=2"), tmp_path)
    folder = tmp_path / "checkpoints"
    folder.chmod(0o555)
    try:
        done = subprocess.run(
            command(config_file, tmp_path, "--config.train.steps=2", code=UNPRIVILEGED),
            env=subprocess_env(8),
            capture_output=True,
            text=True,
            timeout=600,
        )
    finally:
        folder.chmod(0o755)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"imagen-jax train: error: {folder}: Permission denied; checkpoints must be written there"
    )
    assert [path.name for path in folder.iterdir()] == ["2"]


def test_a_disk_that_fills_up_during_a_save_stops_the_run(config_file, tmp_path, subprocess_env):
    """Stands for it: the largest file that the process may write, set when a checkpoint is complete."""
    workdir, steps = tmp_path / "run", "--config.train.steps=60"
    process = subprocess.Popen(
        command(
            config_file, workdir, steps, "--config.train.checkpoint_every=5", "--config.train.log_every=5"
        ),
        env=subprocess_env(1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 600
    while not (workdir / "checkpoints" / "5").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    found = re.findall("imagen-jax train: error: .*", errors)
    assert len(found) == 1 and "Traceback" not in errors, errors
    last = found[0]
    start = f"imagen-jax train: error: {workdir / 'checkpoints'}: a checkpoint could not be saved"
    assert last.startswith(start), errors
    assert "File too large" in last and "the newest complete one is from step" in last
    done = subprocess.run(
        command(config_file, workdir, steps, "--config.train.checkpoint_every=60"),
        env={**subprocess_env(1)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    newest = int(last.partition("is from step ")[2].partition(";")[0])
    assert f"step {newest} of 60" in done.stdout
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 60
    assert epath.Path(workdir / "checkpoints" / "60").exists()
