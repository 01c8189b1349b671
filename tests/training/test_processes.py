"""Several processes train what one trains, through kills, stops, hangs and other numbers of devices.

Started by the local launcher.
"""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.run import Run

ROOT = Path(__file__).parents[2]
STEPS = 60
SAVE_EVERY = 7
# Eight devices on two cores spend their time in collectives, one for each parameter: a network with few.
NETWORK = ("stage.network.self_attention=[False]", "stage.network.text_attention=[False]")
TIMEOUT = 900  # seconds for one start on a busy machine
# Run by every process before its command: notes the record keys of each batch that is put on the devices.
PATCH = """
import json, os
import imagen_jax.training.trainer as trainer

put = trainer.device_batch

def noting_put(batch, *rest):
    line = {"index": [int(i) for i in batch["index"]], "key": [str(key) for key in batch["key"]]}
    with open(os.path.join(os.environ["NOTES"], f"{os.getpid()}.jsonl"), "a") as file:
        file.write(json.dumps(line) + "\\n")
    hook(min(line["index"]))
    return put(batch, *rest)

def hook(example):
    pass

trainer.device_batch = noting_put
"""


@dataclasses.dataclass
class Line:
    when: float
    text: str


class Job:
    """One call of the launcher (or of the plain command), with what it printed."""

    def __init__(self, command, env):
        self.process = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(Line(time.monotonic(), line.rstrip("\n")))

    @property
    def text(self):
        return "\n".join(line.text for line in list(self.lines) if "it/s" not in line.text)

    def starts(self):
        """The process ids of each start, as the launcher prints them."""
        found = re.findall(r"^\[launch\] pids (.*)$", self.text, re.MULTILINE)
        return [[int(pid) for pid in pids.split()] for pids in found]

    def went_on(self):
        """The step from which each start went on."""
        return [int(step) for step in re.findall(r"step (\d+) of \d+$", self.text, re.MULTILINE)]

    def until(self, condition):
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text[-3000:]}"
            assert time.monotonic() < end, f"the condition never came true:\n{self.text[-3000:]}"
            time.sleep(0.005)

    def finish(self):
        """The exit code."""
        self.process.wait(timeout=TIMEOUT)
        self._reader.join(timeout=60)
        return self.process.returncode


@pytest.fixture(scope="module")
def start_job(subprocess_env, config_file):
    """start_job(workdir, "field=value", …, processes=N, devices=N, hook=CODE) → Job."""
    running = []

    def start(workdir, *overrides, processes=2, devices=4, hook="", restarts=0, flags=()):
        patch = workdir.parent / f"{workdir.name}.patch"
        notes = workdir.parent / f"{workdir.name}.notes"
        patch.mkdir(exist_ok=True)
        notes.mkdir(exist_ok=True)
        (patch / "sitecustomize.py").write_text(PATCH + hook)
        env = subprocess_env(devices) | {
            "NOTES": str(notes),
            # Bars would be most of what is printed.
            "TQDM_MININTERVAL": "5",
        }
        env["PYTHONPATH"] = os.pathsep.join([str(patch), env["PYTHONPATH"]])
        arguments = [
            f"--config={config_file}:sr",
            f"--workdir={workdir}",
            *(
                f"--config.{each}"
                for each in (f"train.steps={STEPS}", f"train.checkpoint_every={SAVE_EVERY}")
            ),
            *(f"--config.{each}" for each in (*NETWORK, *overrides)),
            *flags,
        ]
        if processes == 1:
            command = [sys.executable, "-m", "imagen_jax", "train", *arguments, f"--cpu_devices={devices}"]
        else:
            launcher = [sys.executable, str(ROOT / "launch/local.py"), f"--processes={processes}"]
            command = [*launcher, f"--devices={devices}", f"--restarts={restarts}", "--", *arguments]
        job = Job(command, env)
        running.append(job)
        return job

    yield start
    for job in running:
        for pids in job.starts():
            for pid in pids:
                _kill(pid)
        if job.process.poll() is None:
            job.process.kill()


def _kill(pid):
    """Ends a process that a failed test has left; one of another program has not this parent's work directory."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return
    if b"imagen_jax" in command:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, start_job):
    """Work directory of a run of two processes of four devices that nothing has disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    job = start_job(workdir)
    assert job.finish() == 0, job.text[-3000:]
    return workdir


def lines_of(workdir):
    """The whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def keys_of(workdir, batch_size=8):
    """Step → the record keys, by index, of all processes together; the same for every time a step was made."""
    found = {}
    for path in (workdir.parent / f"{workdir.name}.notes").iterdir():
        for text in path.read_text().splitlines():
            if not text.endswith("}"):
                continue  # cut off by a kill
            line = json.loads(text)
            for index, key in zip(line["index"], line["key"]):
                assert found.setdefault(index, key) == key
    steps = {}
    for index, key in sorted(found.items()):
        steps.setdefault(index // batch_size + 1, []).append((index, key))
    return steps


def losses_of(workdir):
    lines = lines_of(workdir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return np.array([line["loss"] for line in lines])


def saved(workdir):
    """Steps of the complete checkpoints."""
    folder = workdir / "checkpoints"
    return (
        sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []
    )


def is_saving(workdir):
    return bool(list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")))


def final_arrays(workdir, config):
    checkpoints = Checkpoints(workdir)
    assert checkpoints.latest_step() == STEPS
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state, examples = checkpoints.restore(STEPS, Run.of(config, mesh).abstract)
    checkpoints.close()
    assert examples == STEPS * config.data.batch_size
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def test_two_processes_train_what_one_trains(whole_run, start_job, tmp_path):
    one = tmp_path / "one"
    job = start_job(one, processes=1, devices=8)
    assert job.finish() == 0, job.text[-3000:]
    keys = keys_of(one)
    assert keys == keys_of(whole_run)
    assert sorted(keys) == list(range(1, STEPS + 1)) and all(len(each) == 8 for each in keys.values())
    expected, losses = losses_of(one), losses_of(whole_run)
    np.testing.assert_allclose(losses[:10], expected[:10], rtol=1e-6)
    np.testing.assert_allclose(losses[-1], expected[-1], rtol=1e-4)
    assert saved(whole_run) == [49, 56, 60]


class Killer:
    """Kills processes of a job at moments that a seed chooses, and says what it killed and when.

    Each kill waits for a step, for a save in progress or for a moment during the start, so that every part of a
    run is hit; it hits one process or all.
    """

    def __init__(self, job, workdir, seed):
        self.job, self.workdir, self.generator = job, workdir, random.Random(seed)
        self.slowest = 0.0  # seconds from a kill to the end of the survivors

    def kill(self, number, target):
        """Kills in start `number`, from 1."""
        kind = self.generator.choice(["step", "step", "save", "start"])
        victims = self.generator.choice([[0], [1], [0, 1]])
        delay = self.generator.uniform(0.0, 4.0)
        self._wait(kind, number, target, delay)
        pids = self.job.starts()[number - 1]
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        lines = lines_of(self.workdir)
        print(
            f"start {number}, {kind} ({delay:.1f} s, target {target}): killed {victims} at step "
            f"{lines[-1]['step'] if lines else 0}, complete checkpoints {saved(self.workdir)}, "
            f"saving: {is_saving(self.workdir)}",
            flush=True,
        )
        self.job.until(lambda: len(self.job.starts()) > number)
        [line] = [line for line in self.job.lines if line.text.startswith("[launch] process")][number - 1 :]
        seconds = line.when - killed
        print(f"  {line.text} after {seconds:.1f} s", flush=True)
        assert all(f"process {victim} ended with -9" in line.text for victim in victims)
        assert seconds < 15.0
        self.slowest = max(self.slowest, seconds)
        if kind == "start":
            return  # before they know each other it is the launcher that ends the others
        # A survivor ended by itself: by its watchdog, or by JAX's own abort where process 0 has gone.
        codes = [int(code) for code in re.findall(r"ended with (-?\d+)", line.text)]
        own = (75, -6) if 0 in victims else (75,)
        assert all(code in (-9, *own) for code in codes) and codes.count(-9) == len(victims)

    def _wait(self, kind, number, target, delay):
        self.job.until(lambda: len(self.job.starts()) == number)
        if kind == "start":
            time.sleep(delay)
            return
        self.job.until(lambda: len(self.job.went_on()) >= 1 and self._began(number))
        if kind == "save":
            before = saved(self.workdir)
            self.job.until(lambda: is_saving(self.workdir) or saved(self.workdir) != before)
        else:
            self.job.until(lambda: self._step() >= target)

    def _began(self, number):
        """Whether this start has made a step: the file has been cut back to where it goes on."""
        lines = [line.text for line in list(self.job.lines)]
        starts = [i for i, text in enumerate(lines) if text.startswith("[launch] pids")]
        own = "\n".join(lines[starts[number - 1] :])
        found = re.findall(r"step (\d+) of \d+$", own, re.MULTILINE)
        return bool(found) and self._step() > int(found[-1])

    def _step(self):
        lines = lines_of(self.workdir)
        return lines[-1]["step"] if lines else 0


def kill_and_compare(kills, seed, whole_run, start_job, workdir, config):
    generator = random.Random(seed)
    targets = sorted(generator.choices(range(2, STEPS - 3), k=kills))
    job = start_job(workdir, restarts=kills)
    killer = Killer(job, workdir, seed)
    for number, target in enumerate(targets, 1):
        killer.kill(number, target)
    assert job.finish() == 0, job.text[-3000:]
    assert len(job.starts()) == kills + 1
    print(f"{kills} kills; survivors ended after at most {killer.slowest:.1f} s")
    assert_same_run(workdir, whole_run, config)


def assert_same_run(workdir, whole_run, config):
    """Records, losses and the final state, bit for bit."""
    assert keys_of(workdir) == keys_of(whole_run)
    assert np.array_equal(losses_of(workdir), losses_of(whole_run))
    expected, arrays = final_arrays(whole_run, config), final_arrays(workdir, config)
    assert expected.keys() == arrays.keys() and len(expected) > 20
    for name, array in expected.items():
        assert array.tobytes() == arrays[name].tobytes(), name


def test_killed_processes_go_on_bit_for_bit(whole_run, start_job, tmp_path, make_config):
    kill_and_compare(3, 1, whole_run, start_job, tmp_path / "killed", make_config("sr", *NETWORK))


def test_a_job_that_was_told_to_stop_is_started_again(whole_run, start_job, tmp_path, make_config):
    """By SIGTERM to one of its processes, and to all: a run that is not finished does not end with 0."""
    workdir = tmp_path / "stopped"
    job = start_job(workdir, restarts=2)
    for number, (victims, step) in enumerate((([1], 12), ([0, 1], 35)), 1):
        job.until(lambda number=number: len(job.went_on()) == number)
        job.until(lambda step=step: bool(lines_of(workdir)) and lines_of(workdir)[-1]["step"] >= step)
        pids = job.starts()[-1]
        for victim in victims:
            os.kill(pids[victim], signal.SIGTERM)
        job.until(lambda number=number: len(job.starts()) > number)
    assert job.finish() == 0, job.text[-3000:]
    assert job.text.count("process 0 ended with 75, process 1 ended with 75") == 2
    assert len(job.starts()) == 3 and 0 == job.went_on()[0] < job.went_on()[1] < job.went_on()[2]
    assert_same_run(workdir, whole_run, make_config("sr", *NETWORK))


def test_two_processes_encode_captions_as_one_does(start_job, tmp_path, text_encoder):
    """Captions encoded beside the training: each process encodes its own."""
    losses = []
    for processes, devices in ((2, 4), (1, 8)):
        workdir = tmp_path / str(processes)
        overrides = ("train.steps=6", f"data.text_encoder={text_encoder}")
        job = start_job(workdir, *overrides, processes=processes, devices=devices)
        assert job.finish() == 0, job.text[-3000:]
        losses.append([line["loss"] for line in lines_of(workdir)])
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.kill
def test_forty_kills(whole_run, start_job, tmp_path, make_config):
    kill_and_compare(40, 7, whole_run, start_job, tmp_path / "killed", make_config("sr", *NETWORK))


def test_a_run_moves_to_fewer_devices_and_processes(whole_run, start_job, tmp_path):
    """8 devices in 2 processes, then 4 and 1 in one; SIGTERM between them loses no step."""
    workdir, reached = tmp_path / "moved", 0
    for processes, devices, until in ((2, 4, 17), (1, 4, 38), (1, 1, STEPS)):
        job = start_job(workdir, processes=processes, devices=devices)
        if until < STEPS:
            job.until(lambda until=until: bool(lines_of(workdir)) and lines_of(workdir)[-1]["step"] >= until)
            if processes > 1:
                os.kill(job.starts()[0][1], signal.SIGTERM)  # any process: all stop at the same step
            else:
                job.process.send_signal(signal.SIGTERM)
        assert job.finish() == (75 if until < STEPS else 0), job.text[-3000:]
        assert job.went_on() == [reached]
        assert len(job.starts()) == (1 if processes > 1 else 0)
        reached = lines_of(workdir)[-1]["step"]
        assert saved(workdir)[-1] == reached and until <= reached < until + 10
        assert ("stopped and saved" in job.text) == (until < STEPS)
    assert keys_of(workdir) == keys_of(whole_run)
    np.testing.assert_allclose(losses_of(workdir), losses_of(whole_run), rtol=1e-4)


HANG = """
import time, jax

def hook(example):
    if example >= 8 * 5 and jax.process_index() == 1:
        time.sleep(10_000)
"""


def test_a_process_that_hangs_is_named(start_job, tmp_path):
    job = start_job(tmp_path / "run", "train.watchdog_seconds=20", "train.sample_every=2", hook=HANG)
    assert job.finish() == 75, job.text[-3000:]
    pid = job.starts()[0][1]
    lines = job.text.splitlines()
    for process in (0, 1):
        [line] = [line for line in lines if line.startswith(f"[{process}] imagen-jax train: error: ")]
        assert f"process 1 (host {os.uname().nodename}, pid {pid}) stopped stepping: waiting for data" in line
        assert ("it is in hook (" in line) == (process == 1)
    assert not [line for line in lines if "Traceback" in line]
    # The grids drawn so far, by all processes together.
    assert (tmp_path / "run" / "samples" / "00000002.png").exists()


def test_a_process_without_a_sign_of_life_is_named(start_job, tmp_path):
    workdir = tmp_path / "run"
    job = start_job(workdir)
    job.until(lambda: len(lines_of(workdir)) >= 3)
    pid = job.starts()[0][1]
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    survivor = job.starts()[0][0]
    job.until(lambda: not Path(f"/proc/{survivor}").exists() or "State:\tZ" in status_of(survivor))
    assert time.monotonic() - stopped < 15
    os.kill(pid, signal.SIGKILL)
    assert job.finish() == 75
    assert f"process 1 (host {os.uname().nodename}, pid {pid}) has given no sign of life" in job.text


def status_of(pid):
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "State:\tZ"
