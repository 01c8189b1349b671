"""The model in the box: it is small, complete, and draws what is asked for."""

from pathlib import Path

import numpy as np
import pytest

import imagen_jax.demo
from imagen_jax.data.shapes_world import Jitter, Kind, world_scene
from imagen_jax.evaluation import oracle
from imagen_jax.sampling.cascade import Imagen

FOLDER = Path(imagen_jax.demo.__file__).parent


@pytest.fixture(scope="module")
def model():
    return Imagen.load("demo")


def test_it_is_small_and_says_what_it_is():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {"LICENSE", "README.md", "model_index.json"} <= {path.name for path in files}


def test_every_word_of_its_world_is_known(model):
    captions = [world_scene(index).caption_zh for index in range(50)]
    captions += [world_scene(index).caption for index in range(50)]
    assert not any(model.prompt_encoder.tokenizer.unknown_words(caption) for caption in captions)


@pytest.mark.parametrize("language", ["caption", "caption_zh"])
def test_colours_are_drawn_as_asked(model, language):
    """Captions whose pairs of colour and shape no training picture had; the whole is in benchmarks/demo_scores.py."""
    scenes = [world_scene(i, split="test", kind=Kind.LONE, jitter=Jitter.WIDE) for i in range(16)]
    captions = [getattr(scene, language) for scene in scenes]
    pictures = [np.asarray(picture) for picture in model.generate(captions, seed=0)]
    score = oracle.score(pictures, captions)
    assert score["background"] >= 0.9 and score["colour"] >= 0.7
