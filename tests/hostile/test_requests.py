"""What the page's link may hold: a message that names the parameter, whatever it is."""

import pytest

from imagen_jax.errors import UserError
from imagen_jax.serving.request import PictureRequest, real_number, whole_number
from tests.hostile.mutations import HALF, HUGE

NUMBERS = (
    "x",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e5",
    "-1",
    "1.5",
    " ",
    "0x10",
    "9" * 5000,
    str(10**30),
    "１.5",
)
# Parameter → values that it cannot have.
QUERIES = {
    "prompt": ("", " ", "\t\n", "x" * 4001, HALF),
    "negative_prompt": ("x" * 4001, HALF),
    "seed": (*NUMBERS, str(2**32)),
    "num_images": (*NUMBERS, "0", "65", str(HUGE)),
    "steps": (*NUMBERS, "0", str(HUGE), "1,2,3", ",,"),
    "guidance": ("x", "nan", "inf", "-inf", "1e400", "1e300", "1,2,3", "nan,nan"),
    "sampler": ("x", "DDIM", "d\0dim", "ddim,ddim,ddim", "ddim;ddim"),
    "step": ("3",),
    "": ("3",),
    "__class__": ("x",),
    HALF: ("x",),
}


@pytest.mark.parametrize("name", QUERIES)
def test_a_link(name, good):
    from imagen_jax.sampling.model_folder import ModelFolder

    stages, taken = ModelFolder(good / "model").stages, []
    for value in QUERIES[name]:
        try:
            PictureRequest.from_query({"prompt": "x", name: value}, len(stages)).sampling(stages)
        except UserError as error:
            message = str(error)
            assert message and "\n" not in message
            message.encode("utf-8")  # it goes into the page
        else:
            taken.append(value[:40])
    assert not taken


@pytest.mark.parametrize(
    "value", [None, [], {}, "", HALF, float("nan"), float("inf"), 10**400, "9" * 5000, b"1", True]
)
@pytest.mark.parametrize("read", [whole_number, real_number])
def test_a_field_of_the_form(read, value):
    if value is True:
        pytest.skip("a number field of a browser sends no booleans")
    with pytest.raises(UserError, match=r"^Seed "):
        read(value, "Seed")
