"""A run that is killed and started again is, bit for bit, the run that was not."""

import json
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.run import Run

STEPS = 30
SAVE_EVERY = 7
HELD = 2 * SAVE_EVERY
EPOCH = 12  # steps: 96 records, 8 a step
TIMEOUT = 900  # seconds for one start on a busy machine
COMMAND = "import sys; from imagen_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
# The same command, slowed down so that it can be killed at a chosen step: it waits a moment at each, and for
# ever at the last one allowed. The checkpoint of step `held`, complete on the disk, never takes its name.
SLOW = """
import asyncio, time
from imagen_jax.training.metrics import MetricsWriter
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath

advance, finalize = MetricsWriter.advance, AtomicRenameTemporaryPath.finalize

def slow_advance(self):
    advance(self)
    time.sleep(10_000 if self._bar.n > {last} else 0.1)

async def held_finalize(self):
    if self._final_path.name == "{held}":
        await asyncio.sleep(10_000)
    await finalize(self)

MetricsWriter.advance, AtomicRenameTemporaryPath.finalize = slow_advance, held_finalize
"""


def start(code, arguments, env):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(arguments, env):
    process = start(COMMAND, arguments, env)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors


def last_step(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def saving(workdir):
    """Steps of the checkpoints that are being written."""
    names = [path.name for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")]
    return [int(name.partition(".")[0]) for name in names]


def complete(workdir):
    """Steps of the checkpoints that have their name."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def kill_when(condition, arguments, env, *, last, held=None):
    """Starts the slow command and kills it when the condition holds, at most two steps after `last`."""
    process = start(SLOW.format(last=last, held=held) + COMMAND, arguments, env)
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, f"ended before it could be killed: {process.stderr.read()}"
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def final_state(workdir, config):
    """All arrays of the last checkpoint, by name."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    checkpoints = Checkpoints(workdir)
    assert checkpoints.latest_step() == STEPS
    state, examples = checkpoints.restore(STEPS, Run.of(config, mesh).abstract)
    checkpoints.close()
    assert examples == STEPS * config.data.batch_size
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def compare(whole, killed, config):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in again] == list(range(1, STEPS + 1))
    assert len({line["loss"] for line in lines}) == STEPS  # every step saw other data
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == [line[name] for line in again]
    states = final_state(whole, config), final_state(killed, config)
    assert any("ema" in name for name in states[0]) and any("params" in name for name in states[0])
    assert states[0].keys() == states[1].keys()
    for name, array in states[0].items():
        assert array.tobytes() == states[1][name].tobytes(), name


def arguments_for(config_file, workdir, *overrides):
    return [
        "train",
        f"--config={config_file}:sr",
        f"--workdir={workdir}",
        f"--config.train.steps={STEPS}",
        f"--config.train.checkpoint_every={SAVE_EVERY}",
        *overrides,
    ]


def off_the_interval(generator, first, last):
    return generator.choice([step for step in range(first, last + 1) if step % SAVE_EVERY])


# On 8 devices: `make test-kill`. tests/training/test_processes.py kills runs of 2 processes × 4 devices in any case.
@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.kill)])
def test_killed_runs_go_on_bit_for_bit(devices, tmp_path, config_file, make_config, subprocess_env):
    env = subprocess_env(devices)
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"] if devices == 8 else []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(arguments_for(config_file, whole, *mesh), env)
    arguments = arguments_for(config_file, killed, *mesh)
    generator = random.Random(devices)

    early = off_the_interval(generator, 2, SAVE_EVERY - 1)  # nothing is saved yet
    kill_when(lambda: last_step(killed) >= early, arguments, env, last=early)
    assert not complete(killed)

    # In the middle of the second save: the steps have gone on, the checkpoint has no name yet.
    kill_when(
        lambda: saving(killed) == [HELD] and last_step(killed) > HELD,
        arguments,
        env,
        last=HELD + 3,
        held=HELD,
    )
    assert saving(killed) == [HELD] and last_step(killed) % SAVE_EVERY
    assert complete(killed) == [SAVE_EVERY]

    late = off_the_interval(generator, 2 * EPOCH, STEPS - 2)  # the data has begun a third time
    kill_when(lambda: last_step(killed) >= late, arguments, env, last=late)
    assert complete(killed)[:2] == [SAVE_EVERY, HELD] and last_step(killed) < STEPS

    finish(arguments, env)
    assert not saving(killed)
    compare(whole, killed, make_config("sr", *(each[9:] for each in arguments[3:])))


def test_a_run_goes_on_on_other_devices(tmp_path, make_config):
    """Eight devices, then two: the losses stay those of the whole run up to rounding."""
    from imagen_jax.training.trainer import train

    losses = {}
    for name, meshes in {"whole": ["data=8"], "moved": ["data=8", "fsdp=8"]}.items():
        for steps, mesh in zip((2, 4) if len(meshes) == 2 else (4,), meshes):
            config = make_config("sr", "train.steps=4", f"mesh.{mesh}", "optimizer.decay=constant")
            if steps == 2:
                stop_after(2, config, tmp_path / name)
            else:
                train(config, tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    np.testing.assert_allclose(losses["moved"], losses["whole"], rtol=1e-5)


def stop_after(step, config, workdir):
    """Trains until an interruption by the keyboard after some step."""
    from imagen_jax.training.metrics import MetricsWriter
    from imagen_jax.training.trainer import train

    class InterruptedWriter(MetricsWriter):
        def log(self, at, values):
            if at > step:
                raise KeyboardInterrupt
            super().log(at, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imagen_jax.training.trainer.MetricsWriter", InterruptedWriter)
        with pytest.raises(KeyboardInterrupt):
            train(config, workdir)
