"""A tiny cascade with random weights: fresh ones would draw the same picture of every prompt."""

import math

import numpy as np
import pytest


def random_params(stage):
    from imagen_jax.models.stage import StageNetwork

    generator = np.random.default_rng(0)
    params = {}
    for name, leaf in StageNetwork(stage).abstract_params.items():
        draw = generator.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith("kernel"):
            params[name] = draw * math.prod(leaf.shape[:-1]) ** -0.5
        else:
            params[name] = name.endswith("scale") + np.float32(0.2) * draw
    return params


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, make_config, text_encoder):
    """A model folder of two stages, "base" and "sr", of 2 steps each and guided."""
    from imagen_jax.sampling.model_folder import ModelIndex, save_index, save_stage

    folder = tmp_path_factory.mktemp("models") / "model"
    for variant in ("base", "sr"):
        stage = make_config(variant).stage
        save_stage(folder, stage, random_params(stage))
    save_index(folder, ModelIndex(stages=("base", "sr"), text_encoder=str(text_encoder)))
    return folder
