"""The whole way at its smallest, as a user runs it, on a machine that has no TensorFlow."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from imagen_jax.quickstart import SCALES, held_out_captions
from imagen_jax.sampling.output import slug
from imagen_jax.sampling.pictures import read_metadata

# Hidden from the finder: a None in sys.modules breaks TFDS, which looks for it with find_spec.
HIDE_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.split(".")[0] == "tensorflow" else find(name, *rest)
)
"""
RUN = """
from imagen_jax.cli.main import main

code = main(sys.argv[1:])
assert "tensorflow" not in sys.modules
sys.exit(code)
"""
TRAINED = ("metrics.jsonl", "checkpoints", "checkpoints/20", "samples/00000020.png")
FRACTIONS = {"background", "colour", "size", "shape"}
PAIR_FRACTIONS = {"background", "colour", "shape", "relation"}


def run(env, *arguments):
    command = [sys.executable, "-c", HIDE_TENSORFLOW + RUN, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr
    return done.stdout


def snapshot(out):
    """When each thing that training writes was last changed; `checkpoints` is probed for being writable."""
    paths = [out / stage / name for stage in ("base", "sr") for name in TRAINED if name != "checkpoints"]
    paths += [path for stage in ("base", "sr") for path in (out / stage / "checkpoints").iterdir()]
    return {str(path): path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, subprocess_env):
    """Folder, output and environment of a smoke run."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    env = subprocess_env(2)
    return out, run(env, "quickstart", "--scale=smoke", f"--out={out}"), env


def test_smoke_run_leaves_everything(smoke):
    out, printed, _ = smoke
    scores = json.loads((out / "scores.json").read_text())
    sizes = SCALES["smoke"]
    pairs = scores["two_objects"]
    for found, names, count in (
        (scores, FRACTIONS, sizes.scored),
        (pairs, PAIR_FRACTIONS, sizes.scored_pairs),
    ):
        assert found["captions"] == count and 0 <= found["fulfilled"] <= count
        assert {name for name, value in found.items() if isinstance(value, float)} - {"minutes"} == names
        for name in names:
            assert 0 <= found[name] <= 1
            assert f"{name:<11}{100 * found[name]:6.1f} %" in printed
    assert scores["minutes"] > 0
    grid = np.asarray(Image.open(out / "grid.png"))
    shown = sizes.scored + sizes.scored_pairs
    assert grid.shape == (-(-shown // 8) * 66 + 2, 8 * 66 + 2, 3)
    assert grid.std() > 10  # pictures, not one colour
    for stage in ("base", "sr"):
        lines = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [10, 20]
        config = json.loads((out / stage / "config.json").read_text())
        assert config["train"]["steps"] == 20
        assert all(np.isfinite(line["loss"]) and line["images_per_s"] > 0 for line in lines)
        for name in TRAINED:
            assert (out / stage / name).exists()
    assert {path.name for path in (out / "model").iterdir()} == {
        "model_index.json",
        "base16",
        "sr64",
        "text_encoder",
    }


def test_running_again_does_not_train_again(smoke):
    out, first, env = smoke
    before, scores = snapshot(out), json.loads((out / "scores.json").read_text())
    again = run(env, "quickstart", "--scale=smoke", f"--out={out}")
    assert snapshot(out) == before
    assert again.count("step 20 of 20") == 2 and first.count("step 0 of 20") == 2
    repeated = json.loads((out / "scores.json").read_text())
    assert repeated.pop("minutes") < scores.pop("minutes")
    assert repeated == scores  # the same model makes the same pictures


def test_the_model_samples(smoke, tmp_path):
    out, _, env = smoke
    prompts = held_out_captions(2, 1)
    flags = ["--steps=2", "--guidance=1", "--num_images=2", "--seed=5"]
    run(env, "sample", *prompts, f"--model={out / 'model'}", f"--out={tmp_path}", *flags)
    names = [f"{i:05d}-{slug(prompt)}-{seed}.png" for i, prompt in enumerate(prompts) for seed in (5, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "grid.png", "index.html"]
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in names]
    assert {picture.shape for picture in pictures} == {(64, 64, 3)}
    assert len({picture.tobytes() for picture in pictures}) == 4
    described = [read_metadata(tmp_path / name) for name in names]
    assert [each["prompt"] for each in described] == [prompts[0]] * 2 + [prompts[1]] * 2
    assert [each["seed"] for each in described] == [5, 6, 5, 6]
