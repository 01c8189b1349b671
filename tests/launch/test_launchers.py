"""What the launchers would run, without the machines that they are for."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
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
    pack, copy, install, start = dry_run(LAUNCH / "tpu_vm.sh", *flags, *TRAIN)
    assert pack[:2] == ["pack_checkout", str(ROOT)] and pack[2] == copy[5]
    for words in (copy, install, start):
        assert words[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]
        assert {"--worker=all", "--zone=us-central2-b", "--project=mine"} <= set(words)
    [command] = [word.removeprefix("--command=") for word in start if word.startswith("--command=")]
    assert subprocess.run(["bash", "-n"], input=command, text=True).returncode == 0
    loop = shlex.split(command.replace(";", " ; "))
    first = loop.index(".venv/bin/python")
    check_train(loop[first : loop.index(";", first)], distributed=True)
    assert "seq 0 7" in command
    [only] = dry_run(LAUNCH / "tpu_vm.sh", *flags, "--no_install", *TRAIN)
    assert only == start


@pytest.mark.parametrize(
    ("codes", "runs", "result"), [([75, 137, 0], 3, 0), ([75, 1], 2, 1), ([134] * 9, 4, 134)]
)
def test_tpu_vm_starts_again_on_the_host_as_long_as_it_helps(codes, runs, result, tmp_path):
    """The loop that is sent to the hosts, with a Python that ends as it is told."""
    [start] = dry_run(
        LAUNCH / "tpu_vm.sh", "--name=pod", "--zone=z", "--restarts=3", "--no_install", "--dry_run", *TRAIN
    )
    [command] = [word.removeprefix("--command=") for word in start if word.startswith("--command=")]
    (tmp_path / "imagen_jax" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
    fake = tmp_path / "imagen_jax" / ".venv" / "bin" / "python"
    fake.write_text(
        f"#!/bin/bash\necho run >> {tmp_path}/runs\ncode=$(head -1 {tmp_path}/codes)\n"
        f"sed -i 1d {tmp_path}/codes\nexit $code\n"
    )
    fake.chmod(0o755)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == result
    assert (tmp_path / "runs").read_text().count("run") == runs


def test_tpu_vm_does_not_start_again_what_was_stopped(tmp_path):
    """A file that --stop leaves; and the connection's end does not end it."""
    [start] = dry_run(LAUNCH / "tpu_vm.sh", "--name=pod", "--zone=z", "--no_install", "--dry_run", *TRAIN)
    [command] = [word.removeprefix("--command=") for word in start if word.startswith("--command=")]
    python = tmp_path / "imagen_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/bash\nkill -HUP $$\necho run >> ../runs\ntouch ../imagen_jax.stop\nexit 75\n")
    python.chmod(0o755)
    (tmp_path / "imagen_jax.stop").touch()  # of an earlier job
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 75
    assert (tmp_path / "runs").read_text() == "run\n"


def test_tpu_vm_makes_the_tpu_that_is_asked_for():
    flags = ["--name=pod", "--zone=z", "--accelerator_type=v6e-16", "--spot", "--no_install", "--dry_run"]
    create, start = dry_run(LAUNCH / "tpu_vm.sh", *flags, *TRAIN)
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    expected = {"--node-id=pod", "--zone=z", "--accelerator-type=v6e-16", "--spot"}
    assert expected <= set(create) and "--runtime-version=v2-alpha-tpuv6e" in create
    assert start[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
    error = dry_run(LAUNCH / "tpu_vm.sh", "--name=pod", "--zone=z", "--spot", *TRAIN, code=2)
    assert "--spot" in error and "--accelerator_type" in error


# What a false gcloud does: a queued resource's state is in a file; `ssh` takes the TPU away as often as told. As often
# as told it cannot be asked.
GCLOUD = """#!/bin/bash
cd {folder}
echo "$4 $5" >> calls
case "$3 $4" in
  "queued-resources describe")
    if [[ -s silences ]]; then sed -i 1d silences; echo "ERROR: There was a problem refreshing tokens" >&2; exit 1; fi
    if [[ ! -s state ]]; then echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2; exit 1; fi
    cat state; sed -i s/PROVISIONING/ACTIVE/ state ;;
  "queued-resources create")
    if [[ -s state ]]; then echo ALREADY_EXISTS >&2; exit 1; fi
    echo {made} > state ;;
  "queued-resources delete") : > state ;;
  "tpu-vm ssh")
    if [[ -s preemptions ]]; then sed -i 1d preemptions; echo SUSPENDED > state; exit 255; fi
    exit {code} ;;
esac
"""


@pytest.fixture
def on_tpu(tmp_path):
    """on_tpu(flag, …) → the ended launcher and the calls of the false gcloud."""

    def run(*flags, preemptions=0, silences=0, code=0, made="PROVISIONING"):
        gcloud = tmp_path / "gcloud"
        gcloud.write_text(GCLOUD.format(folder=tmp_path, code=code, made=made))
        gcloud.chmod(0o755)
        (tmp_path / "preemptions").write_text("one\n" * preemptions)
        (tmp_path / "silences").write_text("one\n" * silences)
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TPU_POLL_SECONDS": "0"}
        command = ["bash", str(LAUNCH / "tpu_vm.sh"), "--name=pod", "--zone=z", *flags]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        return done, (tmp_path / "calls").read_text().splitlines()

    return run


MADE = ["--accelerator_type=v5litepod-16", "--spot", "--no_install"]


@pytest.mark.parametrize(("preemptions", "code"), [(0, 0), (2, 0), (1, 1)])
def test_tpu_vm_makes_a_preempted_tpu_again(preemptions, code, on_tpu):
    done, calls = on_tpu(*MADE, *TRAIN, preemptions=preemptions, code=code)
    assert done.returncode == code, done.stderr
    assert calls.count("create pod") == calls.count("ssh pod") == 1 + preemptions
    assert calls.count("delete pod") == preemptions
    assert done.stderr.count("has been preempted") == preemptions
    assert "is paid for, until: gcloud compute tpus queued-resources delete pod --zone=z" in done.stderr


def test_tpu_vm_deletes_what_it_made_if_it_is_told_to(on_tpu):
    done, calls = on_tpu(*MADE, "--delete", *TRAIN, code=1)
    assert done.returncode == 1 and calls[-1] == "delete pod"


def test_tpu_vm_waits_while_google_cannot_be_asked(on_tpu):
    """Neither is a TPU made twice, nor taken for preempted."""
    done, calls = on_tpu(*MADE, *TRAIN, silences=3)
    assert done.returncode == 0 and calls.count("create pod") == 1
    assert done.stderr.count("problem refreshing tokens") == 3


def test_tpu_vm_ends_where_google_makes_none(on_tpu):
    done, calls = on_tpu(*MADE, *TRAIN, made="FAILED")
    assert done.returncode == 1 and calls.count("create pod") == 1
    assert "Google could not make it" in done.stderr


def test_tpu_vm_stops_a_job_and_installs_alone(on_tpu):
    done, calls = on_tpu("--stop")
    assert done.returncode == 0 and calls == ["ssh pod"]
    done, calls = on_tpu("--install_only")
    assert done.returncode == 0 and [call.split()[0] for call in calls] == ["ssh", "scp", "ssh"]


def test_tpu_vm_refuses_flags_that_are_spelt_as_gclouds():
    error = dry_run(
        LAUNCH / "tpu_vm.sh", "--name=pod", "--zone=z", "--accelerator-type=v6e-8", *TRAIN, code=2
    )
    assert "--accelerator-type: flags here have underscores" in error
    dry_run(
        LAUNCH / "tpu_vm.sh", "--name=pod", "--zone=z", "--dry_run", *TRAIN, "--config.data.path=gs://a-b/c-d"
    )


def test_tpu_vm_ships_the_checkout_as_it_is(tmp_path):
    """Edited, new and deleted files, but none that git ignores."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "tpu_vm.sh", tmp_path / "launch")
    files = {".gitignore": "ignored", "edited.py": "old", "deleted.py": "", "a name.py": ""}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=m"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "edited.py").write_text("new")
    (tmp_path / "deleted.py").unlink()
    (tmp_path / "new.py").touch()
    (tmp_path / "ignored").touch()
    elsewhere = tmp_path / ".git" / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "gcloud").write_text("#!/bin/bash\n")
    (elsewhere / "gcloud").chmod(0o755)
    env = {**os.environ, "PATH": f"{elsewhere}:{os.environ['PATH']}", "TMPDIR": str(elsewhere)}
    script = str(tmp_path / "launch" / "tpu_vm.sh")
    subprocess.run(["bash", script, "--name=pod", "--zone=z", *TRAIN], env=env, check=True)
    with tarfile.open(elsewhere / "imagen_jax.tar.gz") as tar:
        names = set(tar.getnames())
        assert tar.extractfile("edited.py").read() == b"new"
    assert names == {".gitignore", "edited.py", "a name.py", "new.py", "launch/tpu_vm.sh"}


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
        (1, True, 1, True),  # srun's answer to the signal while it waits for its nodes
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


SCRIPTS = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", *(ROOT / ".ci").iterdir()]


@pytest.mark.parametrize(
    ("linter", "files"),
    [("shellcheck", SCRIPTS), ("hadolint", [LAUNCH / "Dockerfile"])],
    ids=["shell", "docker"],
)
def test_linters_find_nothing(linter, files):
    program = shutil.which(
        linter, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    done = subprocess.run([program, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_printed_commands_name_their_records_and_no_zone():
    lines = [
        line
        for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
        for line in file.read_text().splitlines()
        if "launch/" in line and "--workdir=" in line
    ]
    assert len(lines) >= 4
    for line in lines:
        assert "--config.data.path=" in line
        assert "--zone=" not in line or "--zone=ZONE" in line
