"""What the form and links may say, without a model."""

from urllib.parse import parse_qsl

import pytest

from imagen_jax.diffusion.samplers import Sampler
from imagen_jax.errors import UserError
from imagen_jax.sampling.overrides import SamplingOverrides
from imagen_jax.serving.request import MAX_SEED, PictureRequest, real_number, whole_number

OWN = SamplingOverrides()
FULL = PictureRequest(
    prompt="a red circle & 50% 一个红色的圆形",
    negative_prompt="blue, #1",
    seed=MAX_SEED - 3,
    num_images=4,
    overrides=(SamplingOverrides(steps=64, sampler=Sampler.DPMPP), SamplingOverrides(guidance_weight=2.5)),
)


@pytest.mark.parametrize(
    "request_",
    [FULL, PictureRequest(prompt="x", overrides=(OWN, OWN)), PictureRequest(prompt="x", overrides=(OWN,))],
)
def test_a_link_says_all_of_the_request(request_):
    read = PictureRequest.from_query(dict(parse_qsl(request_.query())), len(request_.overrides))
    assert read == request_


def test_a_link_is_spelt_as_the_flags_are():
    values = dict(parse_qsl(FULL.query()))
    assert (values["steps"], values["guidance"], values["sampler"]) == ("64,", ",2.5", "dpmpp,")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the prompt is empty"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x" * 4001}, "the prompt has 4001 characters"),
        ({"prompt": "x", "seed": "1.5"}, "seed '1.5' is not a whole number"),
        ({"prompt": "x", "seed": "-1"}, "seeds must lie in 0"),
        ({"prompt": "x", "seed": str(MAX_SEED), "num_images": "2"}, "seeds must lie in 0"),
        ({"prompt": "x", "num_images": "0"}, "must be 1 to 64, got 0"),
        ({"prompt": "x", "steps": "1,2,3"}, "--steps 1,2,3"),
        ({"prompt": "x", "sampler": "euler"}, "'euler'"),
        ({"prompt": "x", "step": "3"}, "unknown parameter 'step' (did you mean 'steps'?)"),
    ],
)
def test_a_wrong_link_is_named(values, message):
    with pytest.raises(UserError) as caught:
        PictureRequest.from_query(values, 2)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [1.5, None, "1.5", "x", float("nan"), float("inf")])
def test_what_is_no_whole_number(value):
    with pytest.raises(UserError, match=r"^Seed "):
        whole_number(value, "Seed")


def test_numbers_of_the_form():
    assert whole_number(3.0, "Seed") == 3 and type(whole_number(3.0, "Seed")) is int
    assert real_number(2, "guidance") == 2.0
    with pytest.raises(UserError, match="guidance nan is not a number"):
        real_number(float("nan"), "guidance")
