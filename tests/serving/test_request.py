"""What the form and links may say, without a model."""

from urllib.parse import parse_qsl

import pytest

from imagen_jax.diffusion.samplers import Sampler
from imagen_jax.errors import UserError
from imagen_jax.sampling.overrides import SamplingOverrides
from imagen_jax.serving.request import (
    MAX_QUERY,
    MAX_SEED,
    MAX_STEPS,
    PictureRequest,
    read_query,
    real_number,
    whole_number,
)

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


HOSTILE = {
    "prompt=x&steps=1e9": "'1e9' is not a whole number",
    "prompt=x&steps=1000000000": f"at most {MAX_STEPS} steps",
    "prompt=x&steps=" + "9" * 400: f"at most {MAX_STEPS} steps",
    "prompt=x&steps=" + "9" * 5000: "is not a whole number",
    "prompt=x&steps=2,": None,
    "prompt=x&steps=2,2,2": "one for each of the 2 stages",
    "prompt=x&steps[]=2": "unknown parameter 'steps[]'",
    "prompt=x&steps=[2]": "is not a whole number",
    "prompt=x&guidance=nan": "'nan' is not a number",
    "prompt=x&guidance=,-inf": "'-inf' is not a number",
    "prompt=x&guidance=1e999": "'1e999' is not a number",
    "prompt=x&seed=-1": "seeds must lie in 0",
    "prompt=x&seed=1e3": "seed '1e3' is not a whole number",
    "prompt=x&seed=nan": "seed 'nan' is not a whole number",
    "prompt=x&seed=" + "9" * 4300: "is not a whole number",
    "prompt=x&num_images=1000000000": "must be 1 to 64",
    "prompt=x&prompt=y": "the parameter 'prompt' twice",
    "prompt=x&seed=1&seed=2": "the parameter 'seed' twice",
    "prompt=caf%e9": "not UTF-8",
    "prompt=%ed%a0%bc": "not UTF-8",
    "prompt=x&model=/etc": "unknown parameter 'model'",
    "prompt=" + "x" * 4001: "4001 characters",
    "prompt=x&negative_prompt=" + "x" * 4001: "the negative prompt has 4001 characters",
    "prompt=" + "x" * 100_000: f"at most {MAX_QUERY} are read",
    "&".join("a=b" for _ in range(20_000)): "the parameter 'a' twice",
    "prompt": "the prompt is empty",
    "=": "unknown parameter ''",
    "prompt=x&sampler=ddpm,ddim,": "one for each of the 2 stages",
}


@pytest.mark.parametrize("query", HOSTILE, ids=lambda query: query[:30])
def test_a_hostile_link_is_a_message(query):
    if HOSTILE[query] is None:
        assert PictureRequest.from_query(read_query(query.encode()), 2).overrides[0].steps == 2
        return
    with pytest.raises(UserError) as raised:
        PictureRequest.from_query(read_query(query.encode()), 2)
    assert HOSTILE[query] in str(raised.value)


def test_bytes_of_a_link():
    assert (
        read_query("prompt=é&seed=".encode())
        == read_query(b"prompt=%C3%A9&seed=")
        == {"prompt": "é", "seed": ""}
    )
    with pytest.raises(UserError, match="not UTF-8"):
        read_query(b"prompt=\xe9")
    longest = PictureRequest(prompt="\U0001f600" * 4000, negative_prompt="一" * 4000, overrides=(OWN,))
    assert PictureRequest.from_query(read_query(longest.query().encode()), 1) == longest


def test_half_a_character():
    for fields in ({"prompt": "half \ud83c"}, {"prompt": "x", "negative_prompt": "\udce9"}):
        with pytest.raises(UserError, match="prompt holds half a character"):
            PictureRequest(**fields, overrides=(OWN,))
