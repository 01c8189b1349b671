"""Pictures with their captions below."""

import numpy as np
import pytest
from PIL import ImageFont

from imagen_jax.sampling import captioned
from imagen_jax.sampling.captioned import captioned_grid, enlarged

GAP, LABEL = 4, captioned._LINES * captioned._LINE + 2 * captioned._MARGIN


def pictures(count, height=32, width=32):
    return list(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8))


def test_small_pictures_are_enlarged_whole():
    given = pictures(3)
    made = captioned_grid(given, ["a", "b", "c"], columns=2)
    assert made.shape == (2 * (128 + LABEL + GAP) + GAP, 2 * (128 + GAP) + GAP, 3)
    places = [(0, 0), (0, 1), (1, 0)]
    for picture, (row, column) in zip(given, places, strict=True):
        top, left = GAP + row * (128 + LABEL + GAP), GAP + column * (128 + GAP)
        np.testing.assert_array_equal(
            made[top : top + 128 : 4, left : left + 128 : 4][:32, :32], picture, err_msg=str((row, column))
        )
        label = made[top + 128 : top + 128 + LABEL, left : left + 128]
        assert (label.min(axis=-1) < 128).any() and (label == 255).mean() > 0.8


@pytest.mark.parametrize(("height", "want"), [(16, 128), (48, 96), (100, 100), (128, 128), (256, 256)])
def test_how_far(height, want):
    [picture] = pictures(1, height, height)
    made = enlarged(picture, 128)
    assert made.shape == (want, want, 3)
    np.testing.assert_array_equal(made[:: want // height, :: want // height], picture)


def test_a_title_is_above():
    plain, titled = (captioned_grid(pictures(1), ["x"], title=title) for title in ("", "step 3"))
    assert len(titled) > len(plain)
    np.testing.assert_array_equal(titled[-len(plain) :], plain)
    assert (titled[: -len(plain)] < 128).any()


@pytest.mark.parametrize(
    "text",
    [
        "a small red circle on a blue background",
        "word",
        "averyveryverylongwordwithoutanyspaceinit and another",
        "a small striped orange triangle to the left of a large hollow purple square on a white background, and so on",
    ],
)
def test_lines_are_as_wide_as_the_picture(text):
    font = ImageFont.load_default(captioned._TEXT_SIZE)
    lines = list(captioned._wrapped(text, font, 122, 3))
    assert 1 <= len(lines) <= 3
    joined = "".join(lines).replace(" ", "")
    if joined.endswith("…"):
        assert text.replace(" ", "").startswith(joined[:-1]) and font.getlength(text) > 2 * 122
    else:
        assert joined == text.replace(" ", "")
    assert all(font.getlength(line.removesuffix("…")) <= 122 for line in lines)


def test_letters_without_a_font_become_the_number(monkeypatch):
    latin = ImageFont.load_default(captioned._TEXT_SIZE)
    monkeypatch.setattr(captioned, "_font", lambda is_latin: latin if is_latin else None)
    given = pictures(1)
    np.testing.assert_array_equal(
        captioned_grid(given, ["蓝色背景上有一个红色的圆形"]), captioned_grid(given, [""])
    )
    assert (captioned_grid(given, ["x"]) != captioned_grid(given, [""])).any()


def test_as_many_captions_as_pictures():
    with pytest.raises(ValueError, match="zip"):
        captioned_grid(pictures(2), ["a"])
