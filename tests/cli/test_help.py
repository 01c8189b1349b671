import subprocess
import sys

import pytest

import imagen_jax
from imagen_jax.cli.main import VERBS, main


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    before, example = text.split("example:")
    assert f"imagen-jax {verb} " in example
    assert "--" in before


def test_help_lists_the_verbs(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n    {verb}" in text for verb in VERBS)


def test_nothing_at_all_shows_the_commands(capsys):
    assert main([]) == 2
    said = capsys.readouterr().err
    assert "usage: imagen-jax" in said and all(f"\n    {verb}" in said for verb in VERBS)


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"imagen_jax {imagen_jax.__version__}\n"


@pytest.mark.parametrize("arguments", [["draw"], ["train"]])
def test_a_command_line_that_is_none_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: imagen-jax" in capsys.readouterr().err


def test_help_does_not_wait_for_jax(subprocess_env):
    code = f"""
import sys
from imagen_jax.cli.main import main
for verb in {list(VERBS)}:
    try:
        main([verb, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
assert not {{"jax", "flax", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
