"""The rehearsal of benchmarks/gpu.sh: all parts but the longest with small networks, on whatever devices there are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def test_rehearsal(tmp_path):
    """Every part leaves its results, and both sides of a comparison compute the same."""
    parts = ["base64", "deepfloyd", "t5", "flags"]
    done = subprocess.run(
        [SCRIPT, "--tiny", f"--results={tmp_path}", *parts],
        env={**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert list(results) == parts and all("part_s" in values for values in results.values())
    assert results["base64"]["ms"] > 0 and results["t5"]["tokens_per_s"] > 0 and "none" in results["flags"]
    # bfloat16 on both sides, after as many layers
    assert results["deepfloyd"]["step difference"] < 0.1 and results["t5"]["difference"] < 0.05
    assert results["deepfloyd"]["gradient times_as_fast"] > 0
    assert all(f"## {part}" in file.with_suffix(".md").read_text() for part in parts)


def test_a_wrong_flag_or_part_is_said(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    wrong = subprocess.run([SCRIPT, "--fast"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2 and "unknown flag --fast" in wrong.stderr
    wrong = subprocess.run(
        [SCRIPT, f"--results={tmp_path}", "nothing"], env=environment, capture_output=True, text=True
    )
    assert wrong.returncode == 1 and "invalid choice: 'nothing'" in wrong.stderr
