"""Grids and PNG files, read back with Pillow alone."""

import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.sampling.pictures import METADATA_KEY, grid, read_metadata, save_png

METADATA = {"prompt": "一个红色的圆形 “x” ✓", "seed": 4294967295, "guidance": 1.35}


def pictures(count, side=4):
    return list(np.random.default_rng(0).integers(0, 255, (count, side, side, 3), dtype=np.uint8))


def test_png_says_how_it_was_made(tmp_path):
    (picture,) = pictures(1)
    save_png(tmp_path / "a.png", picture, METADATA)
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), picture)
        assert json.loads(image.text[METADATA_KEY]) == METADATA
    assert read_metadata(tmp_path / "a.png") == METADATA
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_png_without_metadata(tmp_path):
    save_png(tmp_path / "ours.png", pictures(1)[0])
    Image.new("RGB", (2, 2)).save(tmp_path / "theirs.png")
    assert read_metadata(tmp_path / "ours.png") is None
    assert read_metadata(tmp_path / "theirs.png") is None


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(5, None, (2, 3)), (4, None, (2, 2)), (5, 5, (1, 5)), (1, 3, (1, 3))]
)
def test_grid(count, columns, shape):
    gap, made = 2, grid(pictures(count), columns=columns)
    rows, cols = shape
    assert made.shape == (rows * 6 + gap, cols * 6 + gap, 3)
    expected = np.full_like(made, 255)
    for i, picture in enumerate(pictures(count)):
        row, col = divmod(i, cols)
        expected[row * 6 + 2 : row * 6 + 6, col * 6 + 2 : col * 6 + 6] = picture
    np.testing.assert_array_equal(made, expected)


def test_empty_grid():
    with pytest.raises(ValueError, match="none"):
        grid([])
