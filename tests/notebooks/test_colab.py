"""The notebooks in Colab's versions, from the installation on: `make test-colab`.

COLAB_FREEZE is the `pip-freeze.txt` of the repository googlecolab/backend-info, COLAB_PYTHON a Python of its version.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

ROOT = Path(__file__).parents[2]
FREEZE = os.environ.get("COLAB_FREEZE")
# What Colab's kernel has imported before a notebook begins, of what an installation may change.
IMPORTED = ("numpy", "PIL", "google.protobuf")
OURS = ("PYTHONPATH", "XLA_FLAGS")  # of these tests, not of Colab

pytestmark = [
    pytest.mark.colab,
    pytest.mark.skipif(not FREEZE, reason="COLAB_FREEZE names no list of versions"),
]


def pip(python, *arguments):
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)


def dependencies():
    """The names of what the package needs."""
    required = importlib.metadata.requires("imagen_jax") or ()
    return {re.match(r"[\w.-]+", each)[0].lower() for each in required if "extra ==" not in each}


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A Python with Colab's versions of what the package needs, those of JAX's packages and the kernel included."""
    folder = tmp_path_factory.mktemp("colab")
    lines = [line for line in Path(FREEZE).read_text().splitlines() if re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    published = {line.split("==")[0].lower(): line for line in lines}
    (folder / "constraints.txt").write_text("\n".join(lines) + "\n")
    subprocess.run(
        [os.environ.get("COLAB_PYTHON", sys.executable), "-m", "venv", folder / "venv"], check=True
    )
    python = folder / "venv" / "bin" / "python"
    names = sorted({*dependencies(), "ipykernel", "ipython"} & published.keys())
    pip(python, "--constraint", folder / "constraints.txt", *names)
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", ROOT]
    subprocess.run(build, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def client(colab, tmp_path_factory):
    """client(name, PACKAGE) → for running a notebook in such an environment, all in one folder."""
    folder = tmp_path_factory.mktemp("content")
    kernel = folder / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    command = [str(colab), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "colab", "language": "python"})
    )
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "imported.py").write_text("".join(f"import {name}\n" for name in IMPORTED))
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | {
        "IMAGEN_JAX_NOTEBOOK_SCALE": "smoke",
        "IMAGEN_JAX_CACHE": str(folder / "cache"),
        "IPYTHONDIR": str(folder / "ipython"),
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "agg",
    }

    def make(name, package):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
        cell.source = cell.source.replace('PACKAGE = ""', f"PACKAGE = {str(package)!r}", 1)
        resources = {"metadata": {"path": str(folder)}}
        made = NotebookClient(notebook, timeout=1800, kernel_name="colab", resources=resources)
        return notebook, lambda: made.execute(env=environment)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))  # where the kernel is found
        yield make


def first_picture(notebook):
    return next(
        i
        for i, cell in enumerate(notebook.cells)
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))
    )


def test_an_installation_that_fails_ends_the_notebook_at_its_first_cell(client, tmp_path):
    broken = tmp_path / "imagen_jax-0.1.0-py3-none-any.whl"
    broken.write_bytes(b"no wheel")
    notebook, execute = client("sample", broken)
    with pytest.raises(Exception, match="pip could not install it"):
        execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count is not None for cell in code] == [True] + [False] * (len(code) - 1)


def test_the_installation_restarts_the_session_once(client, wheel):
    _, execute = client("sample", wheel)
    with pytest.raises(DeadKernelError):
        execute()
    notebook, execute = client("sample", wheel)
    execute()
    assert first_picture(notebook)


@pytest.mark.parametrize("name", ["compare", "train"])
def test_the_other_notebooks_run_to_their_end(client, wheel, name):
    notebook, execute = client(name, wheel)
    execute()
    assert first_picture(notebook)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
