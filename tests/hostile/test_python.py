"""What a Python caller hands over that is no model, prompt, seed or size: a ValueError of one line."""

import dataclasses

import pytest

from tests.hostile.mutations import HALF, HUGE

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def imagen(good):
    from imagen_jax import Imagen

    return Imagen.load(good / "model", cache="off")


def message(error):
    text = str(error)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"prompts": "a red circle"}, "prompts"),
        ({"prompts": []}, "prompt"),
        ({"prompts": ()}, "prompt"),
        ({"prompts": [HALF]}, ""),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"seed": 10**30}, "seed"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": -1}, "num_images"),
        ({"num_images": HUGE}, "num_images"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": -1}, "batch_size"),
        ({"until": 7}, "until"),
        ({"until": -8}, "until"),
        ({"until": 10**30}, "until"),
        ({"sampling": "those of a stage that there is not"}, "nothing"),
        ({"negative_prompt": HALF}, ""),
    ],
)
def test_generate(options, part, imagen, monkeypatch):
    if options.get("sampling"):
        options = {"sampling": {"nothing": imagen.stages[0].sampling}}
    monkeypatch.setattr(type(imagen), "_draw", lambda *rest: iter(()))
    with pytest.raises(ValueError) as caught:
        imagen.generate(**{"prompts": ["x"], **options})
    assert part in message(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guidance_weight", NAN),
        ("guidance_weight", INF),
        ("guidance_weight", 1e300),
        ("guidance_weight", -1e300),
        ("aug_level", NAN),
        ("aug_level", -0.1),
        ("aug_level", 1.1),
        ("sampler.steps", 0),
        ("sampler.steps", -1),
        ("sampler.steps", HUGE),
        ("sampler.eta", NAN),
        ("sampler.eta", 2.0),
        ("sampler.churn", NAN),
        ("sampler.churn", INF),
        ("threshold.percentile", NAN),
        ("threshold.percentile", 101.0),
        ("threshold.max_scale", NAN),
        ("guidance.rescale", NAN),
        ("guidance.rescale", 2.0),
        ("guidance.log_snr_min", NAN),
        ("guidance.oscillate_after", -1),
    ],
)
def test_sampling_settings(field, value, imagen):
    config = imagen.stages[0].sampling
    group, _, name = field.rpartition(".")
    with pytest.raises(ValueError) as caught:
        if group:
            inner = dataclasses.replace(getattr(config, group), **{name: value})
            dataclasses.replace(config, **{group: inner})
        else:
            dataclasses.replace(config, **{name: value})
    assert message(caught.value)


@pytest.mark.parametrize(
    "model", ["", ".", "missing", "a\0b", "/dev/zero", "x" * 300, HALF, "like.png", "gopher://x/y"]
)
def test_load(model, place):
    from imagen_jax import Imagen

    with pytest.raises((ValueError, OSError)) as caught:
        Imagen.load(model, cache="off")
    assert message(caught.value)


@pytest.mark.parametrize("cache", ["like.png", "a\0b", "/dev/null/x", "x" * 300])
def test_load_with_a_cache_that_is_none(cache, place):
    from imagen_jax import Imagen

    with pytest.raises((ValueError, OSError)) as caught:
        Imagen.load("model", cache=cache)
    assert message(caught.value)
