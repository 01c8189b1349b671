"""What the launchers would run, without the machines that they are for."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from imagen_jax.cli.main import make_parser

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TRAIN = ["--config=imagen/base64.py:debug", "--workdir=gs://bucket/my run", "--config.train.steps=5"]


def dry_run(script, *arguments, code=0):
    start = [sys.executable] if script.suffix == ".py" else ["bash"]
    done = subprocess.run([*start, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()] if code == 0 else done.stderr


def check_train(words, **expected):
    """The words are a complete `imagen-jax train` command with TRAIN's flags, and others as given."""
    start = words.index("train")
    assert words[start - 1].endswith(("imagen_jax", "imagen-jax"))
    args, overrides = make_parser("train").parse_known_args(words[start:])
    assert args.config == "imagen/base64.py:debug" and args.workdir == "gs://bucket/my run"
    assert overrides == ["--config.train.steps=5"]
    for name, value in expected.items():
        assert getattr(args, name) == value


def test_local_prints_a_command_for_each_process():
    commands = dry_run(LAUNCH / "local.py", "--processes=3", "--devices=2", "--dry_run", "--", *TRAIN)
    assert len(commands) == 3
    for index, words in enumerate(commands):
        check_train(words, process_id=index, num_processes=3, cpu_devices=2, coordinator="127.0.0.1:8476")


def test_tpu_vm_starts_the_same_command_on_all_workers():
    flags = ["--name=pod", "--zone=us-central2-b", "--project=mine", "--restarts=7", "--dry_run"]
    archive, copy, install, start = dry_run(LAUNCH / "tpu_vm.sh", *flags, *TRAIN)
    assert archive[0] == "git" and archive[3] == "archive"
    for words in (copy, install, start):
        assert words[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]
        assert {"--worker=all", "--zone=us-central2-b", "--project=mine"} <= set(words)
    [command] = [word.removeprefix("--command=") for word in start if word.startswith("--command=")]
    assert subprocess.run(["bash", "-n"], input=command, text=True).returncode == 0
    loop = shlex.split(command.replace(";", " ; "))
    first = loop.index("python3")
    check_train(loop[first : loop.index(";", first)], distributed=True)
    assert "seq 0 7" in command
    [only] = dry_run(LAUNCH / "tpu_vm.sh", *flags, "--no_install", *TRAIN)
    assert only == start


@pytest.mark.parametrize(
    ("codes", "runs", "result"), [([75, 137, 0], 3, 0), ([75, 1], 2, 1), ([134] * 9, 4, 134)]
)
def test_tpu_vm_starts_again_on_the_host_as_long_as_it_helps(codes, runs, result, tmp_path):
    """The loop that is sent to the hosts, with a `python3` that ends as it is told."""
    [start] = dry_run(
        LAUNCH / "tpu_vm.sh", "--name=pod", "--zone=z", "--restarts=3", "--no_install", "--dry_run", *TRAIN
    )
    [command] = [word.removeprefix("--command=") for word in start if word.startswith("--command=")]
    (tmp_path / "imagen_jax").mkdir()
    (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
    fake = tmp_path / "python3"
    fake.write_text(
        f"#!/bin/bash\necho run >> {tmp_path}/runs\ncode=$(head -1 {tmp_path}/codes)\n"
        f"sed -i 1d {tmp_path}/codes\nexit $code\n"
    )
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == result
    assert (tmp_path / "runs").read_text().count("run") == runs


GKE = [
    *("--workload=base", "--cluster=c", "--zone=us-central2-b", "--project=mine", "--num_slices=2"),
    *("--tpu_type=v5litepod-256", "--image=registry/imagen-jax", "--restarts=7", "--dry_run"),
]


def test_gke_hands_the_command_to_xpk():
    [words] = dry_run(LAUNCH / "gke.sh", *GKE, *TRAIN)
    assert words[:3] == ["xpk", "workload", "create"]
    [command] = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    check_train(shlex.split(command), distributed=True)
    assert {"--max-restarts=7", "--restart-on-exit-codes=75"} <= set(words)


@pytest.mark.xpk
def test_xpk_understands_the_command():
    """The real tool's own parser; `make test-launch` puts it in an environment of its own."""
    python = os.environ["XPK_PYTHON"]
    [words] = dry_run(LAUNCH / "gke.sh", *GKE, *TRAIN)
    code = (
        "import argparse, json, sys\n"
        "from xpk.parser.core import set_parser\n"
        "parser = argparse.ArgumentParser()\nset_parser(parser)\n"
        "args = parser.parse_args(sys.argv[1:])\n"
        "print(json.dumps([args.workload, args.cluster, args.tpu_type, args.num_slices, args.max_restarts,"
        " args.docker_image, args.restart_on_exit_codes, args.zone, args.project, args.command]))"
    )
    done = subprocess.run([python, "-c", code, *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *values, command = json.loads(done.stdout.splitlines()[-1])
    assert [str(value) for value in values] == [
        *("base", "c", "v5litepod-256", "2", "7", "registry/imagen-jax", "75", "us-central2-b", "mine")
    ]
    check_train(shlex.split(command), distributed=True)
    unknown = subprocess.run([python, "-c", code, *words[1:], "--nonsense=1"], capture_output=True)
    assert unknown.returncode == 2


def test_slurm_starts_a_step():
    [words] = dry_run(LAUNCH / "slurm.sbatch", "--dry_run", *TRAIN)
    assert words[0] == "srun" and "--kill-on-bad-exit=1" in words
    check_train(words, distributed=True)
    directives = [line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if "#SBATCH" in line]
    assert "#SBATCH --signal=B:TERM@300" in directives and "#SBATCH --requeue" in directives


@pytest.mark.parametrize(
    ("code", "term", "result", "requeued"),
    [
        (0, False, 0, False),
        (1, False, 1, False),
        (75, False, 75, True),
        (137, False, 137, True),
        (75, True, 75, True),
        (0, True, 0, False),  # the signal came when the last step was made
    ],
)
def test_slurm_queues_again_what_may_go_on(code, term, result, requeued, tmp_path):
    """With an `srun` that ends as it is told, of itself or on SIGTERM, and an `scontrol` that takes notes."""
    wait = f"trap 'sleep 0.3; exit {code}' TERM\ntouch {tmp_path}/ready\nwhile true; do sleep 0.05; done\n"
    (tmp_path / "srun").write_text("#!/bin/bash\n" + (wait if term else f"exit {code}\n"))
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\necho $@ >> {tmp_path}/noted\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    process = subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), *TRAIN], env=env)
    if term:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == result
    noted = (tmp_path / "noted").read_text() if (tmp_path / "noted").exists() else ""
    assert noted == ("requeue 42\n" if requeued else "")


def test_local_ends_processes_that_do_not_notice_a_dead_one(tmp_path):
    """Those of a stand-in for `imagen_jax`: the second dies, the first never ends by itself."""
    package = tmp_path / "imagen_jax"
    package.mkdir()
    (package / "__main__.py").write_text(
        "import os, signal, sys, time\n"
        "if '--process_id=1' in sys.argv:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(1000)\n"
    )
    script = tmp_path / "local.py"
    text = (LAUNCH / "local.py").read_text()
    assert "SURVIVORS_SECONDS = 14.0" in text
    script.write_text(text.replace("SURVIVORS_SECONDS = 14.0", "SURVIVORS_SECONDS = 0.5"))
    done = subprocess.run(
        [sys.executable, str(script), "--processes=2", "--restarts=1", "--", "--x"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 75
    assert done.stderr.count("process 0 ended with -9, process 1 ended with -9") == 2
    assert done.stdout.count("[launch] pids") == 2


@pytest.mark.parametrize("name", ["tpu_vm.sh", "gke.sh", "slurm.sbatch"])
def test_missing_flags_show_the_usage(name):
    assert "usage:" in dry_run(LAUNCH / name, code=2)


def test_shellcheck_finds_nothing():
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", *(ROOT / ".ci").iterdir()]
    program = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    done = subprocess.run([program, *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
