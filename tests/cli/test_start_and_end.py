"""How the command starts in odd surroundings, and how Ctrl-C ends it."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from imagen_jax.cli import main as cli
from tests.cli.verbs import FakeVerb


@pytest.fixture
def interruptible():
    """pytest's own handler of Ctrl-C would be left alone."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_a_callback_swallows_comes_again(interruptible, monkeypatch, capsys):
    def collect(phase, info):
        if phase == "start":
            gc.callbacks.remove(collect)
            signal.raise_signal(signal.SIGINT)

    def work():
        gc.callbacks.append(collect)
        gc.collect()  # the exception is lost here
        time.sleep(20)
        return 0

    monkeypatch.setattr(cli, "_module", lambda verb: FakeVerb(work))
    start = time.monotonic()
    assert cli.main(["quickstart"]) == 130
    assert time.monotonic() - start < 10
    said = capsys.readouterr().err
    assert "interrupted" in said and "Traceback" not in said


def test_an_interrupt_during_imports_waits_for_their_end(interruptible, monkeypatch, capsys):
    done = []

    def module(verb):
        if not done:  # the parser asks first
            done.append("parser")
            return FakeVerb(lambda: 0)
        signal.raise_signal(signal.SIGINT)
        done.append("imported")
        return FakeVerb(lambda: pytest.fail("began to work"))

    monkeypatch.setattr(cli, "_module", module)
    assert cli.main(["quickstart"]) == 130
    assert done == ["parser", "imported"]


def test_what_a_library_makes_of_an_interrupt(interruptible, monkeypatch, capsys):
    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("initialising the extension failed") from error

    monkeypatch.setattr(cli, "_module", lambda verb: FakeVerb(work))
    assert cli.main(["quickstart"]) == 130
    assert capsys.readouterr().err.count("\n") == 2


def test_ignored_interrupts_stay_ignored(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(
            cli, "_module", lambda verb: FakeVerb(lambda: signal.raise_signal(signal.SIGINT) or 0)
        )
        assert cli.main(["quickstart"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


SAMPLE = [sys.executable, "-m", "imagen_jax.cli.main", "sample"]


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("JAX_PLATFORMS", "bogus", "JAX_PLATFORMS=bogus: JAX does not find such devices here"),
        ("JAX_PLATFORMS", "cuda", "JAX_PLATFORMS=cuda: JAX does not find such devices here"),
        ("JAX_ENABLE_X64", "maybe", "JAX refuses an environment variable: "),
    ],
)
def test_variables_of_jax(name, value, part, subprocess_env):
    code = (
        "import sys, imagen_jax.cli.main as cli\n"
        "from tests.cli.verbs import FakeVerb\n"
        "cli._module = lambda verb: FakeVerb(lambda: __import__('jax').devices())\n"
        "sys.exit(cli.main(['quickstart']))\n"
    )
    env = subprocess_env() | {name: value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert part in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize(("closed", "prompt"), [(0, "-"), (2, "x")])
def test_streams_that_are_closed(closed, prompt, subprocess_env, tmp_path):
    done = subprocess.run(
        [*SAMPLE, prompt, "--model=missing", "--out=out"],
        env=subprocess_env(),
        cwd=tmp_path,
        preexec_fn=lambda: os.close(closed),
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        **({"stderr": subprocess.PIPE} if closed != 2 else {}),
    )
    assert done.returncode == 1 and not done.stdout
    if closed != 2:
        assert done.stderr.startswith("imagen-jax sample: error: ") and done.stderr.count("\n") == 1
