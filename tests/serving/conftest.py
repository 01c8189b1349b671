"""A tiny cascade with random weights: fresh ones would draw the same picture of every prompt."""

import pytest

TEXT_WIDTH = 16
PROMPTS = ("a red circle", "a blue square", "two green triangles")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, random_params):
    """A model folder of two guided stages of 2 steps each, "base" (8×8) and "sr" (16×16)."""
    from imagen_jax.config import build
    from imagen_jax.data.encoder_identity import EncoderIdentity
    from imagen_jax.models.configs import StageConfig
    from imagen_jax.sampling.identity import encoder_files
    from imagen_jax.sampling.model_folder import ModelIndex, save_index, save_stage
    from imagen_jax.text.small import make_small_encoder

    folder = tmp_path_factory.mktemp("models") / "model"
    for name, kind, resolution, low_resolution in (
        ("base", "unet", 8, None),
        ("sr", "efficient_unet", 16, 8),
    ):
        network = {
            "kind": kind,
            "channels": [8],
            "num_res_blocks": [1],
            "self_attention": [False],
            "text_attention": [True],
            "head_channels": 8,
            "embedding_width": 16,
            "text_width": TEXT_WIDTH,
        }
        values = {
            "name": name,
            "resolution": resolution,
            "low_resolution": low_resolution,
            "max_text_length": 6,
            "network": network,
            "prediction": "v",
            "sampling": {"sampler": {"steps": 2}},
        }
        stage = build(StageConfig, values, name)
        save_stage(folder, stage, random_params(stage))
    make_small_encoder(folder / "text_encoder", vocabulary_texts=PROMPTS, width=TEXT_WIDTH, layers=1)
    # Known by its files alone: nothing has to be encoded for it.
    known = EncoderIdentity(width=TEXT_WIDTH, tokenizer="", sketches=())
    files = encoder_files(folder / "text_encoder")
    index = ModelIndex(stages=("base", "sr"), text_encoder="text_encoder", encoder=known, encoder_files=files)
    save_index(folder, index)
    return folder
