"""What sample grids are drawn for: the split's captions or prompts, true pictures or a model's."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax.errors import UserError
from imagen_jax.models.text_form import Text
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.model_folder import ModelIndex, save_index, save_stage
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.precompute import PrecomputeConfig, precompute
from imagen_jax.text.small import make_small_encoder
from imagen_jax.training.batches import sample_batch
from imagen_jax.training.run_encoder import data_encoder
from imagen_jax.training.sample_inputs import check_sample_inputs, sample_inputs
from imagen_jax.training.trainer import train

PROMPTS = ["a small red circle on a blue background", "a large green star on a white background"]
PROMPT_FIELD = f"train.sample_prompts={PROMPTS!r}"


def inputs_of(config):
    return sample_inputs(config, None, data_encoder(config.data, None))


@pytest.fixture(scope="module")
def base_model(make_config, random_params, text_encoder, tmp_path_factory):
    """A model folder that draws 8×8."""
    folder, stage = tmp_path_factory.mktemp("model"), make_config("base").stage
    save_stage(folder, stage, random_params(stage))
    save_index(folder, ModelIndex(stages=(stage.name,), text_encoder=str(text_encoder)))
    return folder


@pytest.mark.parametrize("variant", ["base", "sr"])
def test_the_first_records(make_config, variant):
    config = make_config(variant, "train.sample_count=3", "train.sample_split=test")
    made, batch = inputs_of(config), sample_batch(config)
    assert made.captions == batch["caption"] and len(made.captions) == 3
    np.testing.assert_array_equal(made.text.embeddings, batch["text"].astype(np.float32))
    np.testing.assert_array_equal(made.text.mask, batch["text_mask"])
    if variant == "sr":
        np.testing.assert_array_equal(made.low_res, batch["low_res"])
        assert "true pictures of split 'test'" in made.origin
    else:
        assert made.low_res is None and made.origin == ""


def test_prompts_are_encoded_as_records_are(make_config, text_encoder):
    config = make_config("base", PROMPT_FIELD)
    made = inputs_of(config)
    assert made.captions == PROMPTS
    expected: Text = TextEncoder.load(text_encoder).encode_form(PROMPTS, config.stage.text_form)
    np.testing.assert_array_equal(made.text.embeddings, expected.embeddings)
    np.testing.assert_array_equal(made.text.mask, expected.mask)


def test_a_base_draws_what_is_enlarged(make_config, base_model):
    config = make_config("sr", PROMPT_FIELD, f"train.sample_base={base_model}")
    made = inputs_of(config)
    model = Imagen.load(base_model)
    for seed, (prompt, low) in enumerate(zip(PROMPTS, made.low_res, strict=True)):
        [picture] = model.pictures([prompt], seed=seed)
        # Drawn side by side and one at a time: a rounding error may tip one of the 256 values.
        assert np.abs(picture.pixels.astype(int) - low).max() <= 1
    assert str(base_model) in made.origin


def test_a_whole_run_draws_them(make_config, base_model, tmp_path):
    fields = ["train.steps=1", "train.sample_every=1", PROMPT_FIELD, f"train.sample_base={base_model}"]
    train(make_config("sr", *fields), tmp_path)
    with Image.open(tmp_path / "samples" / "00000001.png") as picture:
        assert picture.width > 2 * 2 * 128  # two pictures, beside each what was enlarged


def test_what_cannot_be_drawn_is_named_before_the_run(make_config, base_model, tmp_path):
    sampled = "train.sample_every=1"
    for variant, fields, parts in (
        ("sr", [PROMPT_FIELD], ["config.train.sample_prompts", "--config.train.sample_base=MODEL"]),
        ("base", [f"train.sample_base={base_model}"], ["config.train.sample_base", "is a base stage"]),
        ("sr", ["train.sample_base=/no/such/folder"], ["/no/such/folder"]),
        (
            "sr",
            [f"train.sample_base={base_model}", "stage.resolution=32", "stage.low_resolution=16"],
            ["stages make 8 pixels", "enlarges 16"],
        ),
    ):
        config = make_config(variant, sampled, *fields)
        with pytest.raises(UserError) as caught:
            check_sample_inputs(config)
        assert all(part in str(caught.value) for part in parts), str(caught.value)
    with pytest.raises(UserError, match=r"sample_prompts.*sample_base"):
        train(make_config("sr", sampled, PROMPT_FIELD), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_need_the_encoder_of_the_records(make_config, tmp_path):
    encoder = make_small_encoder(tmp_path / "encoder", vocabulary_texts=PROMPTS, width=16, layers=1)
    records = tmp_path / "records"
    source = "shapes:count=8,resolution=16"
    precompute(PrecomputeConfig(source=source, text_encoder=str(encoder), out=str(records), num_shards=1))
    config = make_config("base", f"data.path={records}", PROMPT_FIELD)
    assert inputs_of(config).captions == PROMPTS
    for file in encoder.iterdir():
        file.unlink()
    make_small_encoder(encoder, vocabulary_texts=PROMPTS, width=16, layers=1, seed=1)
    with pytest.raises(UserError, match="not the one that made the run's text"):
        inputs_of(config)
    for file in encoder.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="need the records' text encoder"):
        inputs_of(config)
