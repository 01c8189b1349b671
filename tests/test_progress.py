"""What is said of work that cannot say how far it is."""

import re
import sys
import time

import pytest

from imagen_jax.progress import elapsed


@pytest.mark.parametrize(
    ("seconds", "least", "enabled", "said"),
    [(0.3, 0.1, True, True), (0.0, 0.2, True, False), (0.0, 0.0, True, True), (0.3, 0.0, False, False)],
)
def test_it_says_how_long_it_took(capsys, seconds, least, enabled, said):
    with elapsed("compiling base64", enabled=enabled, least=least):
        time.sleep(seconds)
    out, error = capsys.readouterr()
    assert out == "" and error == ("compiling base64: 0 s\n" if said else "")


def test_a_terminal_sees_it_count(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with elapsed("compiling base64"):
        time.sleep(2.5)
    assert re.fullmatch(
        r"(\rcompiling base64: [12] s){2}\rcompiling base64: [23] s\n", capsys.readouterr().err
    )


def test_an_error_passes(capsys):
    with pytest.raises(KeyError), elapsed("compiling base64", least=0.0):
        raise KeyError
    assert capsys.readouterr().err.endswith("\n")
