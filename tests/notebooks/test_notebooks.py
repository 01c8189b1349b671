"""The notebooks as they are, with small numbers, in a kernel of their own."""

import base64
import importlib.util
import io
import json
import re
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("sample", "compare", "train")
GAP = 4  # pixels between pictures shown side by side


@pytest.fixture(scope="module")
def run(tmp_path_factory, subprocess_env):
    """run(name) → the executed notebook and the folder that it ran in, which all share: a model is trained once."""
    folder, done = tmp_path_factory.mktemp("notebooks"), {}

    def execute(name):
        if name not in done:
            notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
            environment = {
                **subprocess_env(),
                "IMAGEN_JAX_NOTEBOOK_SCALE": "smoke",
                "IMAGEN_JAX_CACHE": str(folder / "cache"),
                "PIP_NO_INDEX": "1",  # nothing may be installed
            }
            client = NotebookClient(
                notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
            )
            client.execute(env=environment)
            done[name] = notebook
        return done[name], folder

    return execute


def grids(notebook):
    """The pictures that are shown, int (height, width, 3) each."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                content = base64.b64decode(output["data"]["image/png"])
                found.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int))
    return found


def parts(image, columns):
    """The pictures of a grid with so many columns, row by row."""
    side = (image.shape[1] - GAP) // columns - GAP
    rows = (image.shape[0] - GAP) // (side + GAP)
    starts = [GAP + i * (side + GAP) for i in range(max(rows, columns))]
    return [image[y : y + side, x : x + side] for y in starts[:rows] for x in starts[:columns]]


def distance(a, b):
    """Mean absolute difference in grey levels of 255."""
    return float(np.abs(a - b).mean())


def printed(notebook):
    texts = (o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
    return "".join(texts)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_clean_and_opens_in_colab(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert code.source.startswith('PACKAGE = ""\nDRIVE = False\n')
    assert "OWNER" not in (FOLDER / f"{name}.ipynb").read_text()


def test_no_notebook_is_left_out():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(NAMES)


@pytest.fixture
def install(monkeypatch):
    """install(PACKAGE, ...) → what the first cell leaves, the package being absent and pip ending with a code."""
    source = nbformat.read(FOLDER / "sample.ipynb", as_version=4).cells[2].source
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    real = subprocess.run

    def execute(package, pip=0):
        commands = []

        def run(command, **options):
            if "pip" not in command:
                return real(command, **options)
            commands.append(command)
            return subprocess.CompletedProcess(command, pip)

        monkeypatch.setattr(subprocess, "run", run)
        names = {}
        exec(source.replace('PACKAGE = ""', f"PACKAGE = {package!r}", 1), names)
        return commands, names

    return execute


def test_every_notebook_installs_alike():
    setups = {
        tuple(cell.source for cell in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells[1:5])
        for name in NAMES
    }
    assert len(setups) == 1


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("", "write here a git address"),
        ("imagen_jax", "neither a git address"),
        ("nowhere/imagen_jax-0.1.0-py3-none-any.whl", "no such file"),
        ("git+imagen_jax", "not of the form git+https://"),
        ("git+file:///nowhere/imagen_jax", "does not appear to be a git repository"),
    ],
)
def test_what_cannot_be_installed_stops_the_notebook_before_pip(install, package, reason):
    with pytest.raises(SystemExit, match=re.escape(reason)) as error:
        install(package)
    assert "\n" not in str(error.value)


def test_an_installation_that_fails_stops_the_notebook(install, tmp_path):
    wheel = tmp_path / "imagen_jax-0.1.0-py3-none-any.whl"
    wheel.touch()
    with pytest.raises(SystemExit, match="pip could not install it"):
        install(str(wheel), pip=1)
    (command,), names = install(str(wheel))
    assert command[-1] == str(wheel) and command[-2].startswith("jax")
    assert names["CHANGED"] == []


def test_a_git_address_may_name_a_branch(install, tmp_path):
    subprocess.run(["git", "init", "--quiet", tmp_path / "imagen_jax"], check=True)
    for ending in ("", "@main", "@feature/new"):
        (command,), _ = install(f"git+file://{tmp_path}/imagen_jax{ending}")
        assert command[-1].endswith(f"imagen_jax{ending}")


def test_sample_draws_what_is_asked_for(run):
    notebook, folder = run("sample")
    prompts, variations, negative = grids(notebook)
    prompts, variations = parts(prompts, 3), parts(variations, 3)
    without, away = parts(negative, 3)[:3], parts(negative, 3)[3:]
    # The same prompt and seed again, in another batch: what lies between them is rounding.
    assert distance(prompts[0], variations[0]) < 0.1
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert distance(prompts[a], prompts[b]) > 1
        assert distance(variations[a], variations[b]) > 1
    for before, after in zip(without, away, strict=True):
        assert distance(before, after) > 0.5
    files = sorted((folder / "drawn").iterdir())
    assert [path.name for path in files] == ["0.png", "1.png", "2.png"]
    for file, shown in zip(files, prompts):
        pixels = np.asarray(Image.open(file)).astype(int)
        np.testing.assert_array_equal(pixels, shown[:: len(shown) // 64, :: len(shown) // 64])
    record = next(o for o in notebook.cells[-1].outputs if o.output_type == "execute_result")
    assert "a large red circle on a blue background" in record.data["text/plain"]


def test_compare_shows_that_guidance_and_steps_matter(run):
    notebook, _ = run("compare")
    by_guidance, by_steps = (parts(image, 2) for image in grids(notebook))
    assert len(by_guidance) == len(by_steps) == 4  # two captions, two values
    for row in (by_guidance[:2], by_guidance[2:], by_steps[:2], by_steps[2:]):
        assert distance(*row) > 0.5
    assert distance(by_guidance[0], by_guidance[2]) > 1  # the captions
    np.testing.assert_array_equal(by_guidance[1], by_steps[1])  # drawn once, shown twice
    rows = re.findall(r"^ +([\d.]+) +(\d+) +((?:\d+ % +){4})([\d.]+)$", printed(notebook), re.MULTILINE)
    assert [(float(weight), int(steps)) for weight, steps, *_ in rows] == [(1, 1), (1, 3), (8, 1), (8, 3)]


def test_train_learns_from_a_folder_of_pictures(run):
    notebook, folder = run("train")
    runs = folder / "runs" / "pictures"
    lines = [json.loads(line) for line in (runs / "base" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]
    assert f"base  step {lines[-1]['step']:6d}  loss {losses[-1]:.4f}" in printed(notebook)
    (image,) = grids(notebook)
    pictures = parts(image, 4)
    assert all(distance(pictures[0], other) > 1 for other in pictures[1:])
    assert (runs / "model" / "model_index.json").exists()
