"""What `imagen-jax serve` refuses before it serves anything."""

import importlib.util
import socket

import pytest

from imagen_jax.cli.main import main


@pytest.fixture
def fails(capsys):
    def run(*flags):
        assert main(["serve", *map(str, flags)]) == 1
        message = capsys.readouterr().err
        assert message.startswith("imagen-jax serve: error: ") and message.count("\n") == 1
        return message

    return run


def test_without_nicegui_it_says_what_to_install(fails, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'imagen_jax[serve]'" in fails(f"--model={tmp_path}")


@pytest.mark.browser  # needs NiceGUI
def test_the_flag_at_fault_is_named(fails, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: in use by another program" in fails(f"--model={tmp_path}", f"--port={port}")
    assert "--port 70000: must be" in fails(f"--model={tmp_path}", "--port=70000")
    assert "--host 192.0.2.1: cannot listen there" in fails(
        f"--model={tmp_path}", "--host=192.0.2.1", "--port=0"
    )
    assert f"--model {tmp_path / 'none'}: there is no such folder" in fails(
        f"--model={tmp_path / 'none'}", "--port=0"
    )
