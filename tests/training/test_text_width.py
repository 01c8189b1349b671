"""A config that leaves the text's width out has that of its embeddings."""

import json

import pytest

from imagen_jax.errors import UserError
from imagen_jax.text.small import make_small_encoder
from imagen_jax.training.config import load_config

PICTURES = "pictures/base32.py"


def width(*overrides):
    return load_config(PICTURES, [f"--config.{each}" for each in overrides]).stage.network.text_width


def test_it_is_the_records(records_folder):
    assert width(f"data.path={records_folder}") == 16


def test_it_is_that_of_embeddings_beside_the_pictures(records_folder, tmp_path):
    assert width(f"data.path={tmp_path}", f"data.embeddings={records_folder}") == 16


def test_it_is_the_online_encoders(records_folder, tmp_path):
    encoder = make_small_encoder(tmp_path / "encoder", vocabulary_texts=["red"], width=24, layers=1)
    assert width(f"data.path={records_folder}", f"data.text_encoder={encoder}") == 24


def test_what_is_set_stays(records_folder):
    assert width(f"data.path={records_folder}", "stage.network.text_width=32") == 32


@pytest.mark.parametrize(
    ("overrides", "flag"),
    [
        (["data.path=/no/such/folder"], "--config.data.path"),
        (["data.embeddings=/no/such/folder"], "--config.data.embeddings"),
        (["data.text_encoder=/no/such/folder"], "--config.data.text_encoder"),
    ],
)
def test_where_nothing_tells_it_the_flags_are_named(overrides, flag):
    with pytest.raises(UserError, match="/no/such/folder") as caught:
        width(*overrides)
    assert "--config.stage.network.text_width is not set" in str(caught.value) and flag in str(caught.value)


@pytest.mark.parametrize("group", ["stage", "stage.network", "data"])
def test_a_config_of_another_form_is_refused_as_ever(tmp_path, group):
    config = tmp_path / "config.py"
    values: dict = {"stage": {"network": {}}, "data": {}, "train": {"steps": 1}}
    place = values
    *path, last = group.split(".")
    for name in path:
        place = place[name]
    place[last] = 3
    config.write_text(
        f"import json\ndef get_config(_):\n    return json.loads({json.dumps(json.dumps(values))})\n"
    )
    with pytest.raises(UserError, match=r"^config\."):
        load_config(str(config))
