"""Pictures whose sides differ, through records and pipeline: nothing is stretched."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import pictures
from imagen_jax.data.pipeline import PipelineConfig, open_batches
from imagen_jax.sizes import Size
from tests.data.test_pipeline import png, write_folder

SHAPES = ((96, 96), (120, 80), (64, 150))  # height, width of the stored pictures


def disc(height, width):
    """A white disc of radius 24 in the middle, its edge antialiased, as uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width] + 0.5
    away = np.hypot(y - height / 2, x - width / 2)
    grey = np.clip(24.5 - away, 0, 1) * 255
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)


def moments(picture):
    """Centre and variances (rows, columns) of a picture's brightness."""
    weight = picture[..., 0].astype(float)
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]] + 0.5
    centre = (weight * y).sum() / weight.sum(), (weight * x).sum() / weight.sum()
    return centre, [
        (weight * np.square(each - middle)).sum() / weight.sum() for each, middle in zip((y, x), centre)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    images = [png(disc(*shape)) for shape in SHAPES]
    return write_folder(tmp_path_factory.mktemp("records"), images, (1, 1, 1))


@pytest.mark.parametrize("size", [Size(32, 48), Size(48, 32), Size(16, 40)], ids=str)
@pytest.mark.parametrize("scale", [None, 2])
def test_circles_keep_their_second_moments(folder, size, scale):
    config = PipelineConfig(
        path=str(folder),
        split="train",
        size=size,
        scale=scale,
        max_text_length=4,
        batch_size=3,
        seed=0,
        shuffle=False,
        num_threads=1,
    )
    with open_batches(config) as batches:
        batch = next(batches)
    seen = [("image", size)] + ([] if scale is None else [("low_res", size.over(scale))])
    for name, expected_size in seen:
        assert batch[name].shape == (3, *expected_size, 3)
        for picture, (height, width) in zip(batch[name], SHAPES):
            shrunk = min(height / expected_size.height, width / expected_size.width)
            if 2 * 25 / shrunk > min(expected_size):
                continue  # a part of the disc lies outside
            centre, (rows, columns) = moments(picture)
            # A disc's variance along an axis is a quarter of its squared radius.
            assert rows == pytest.approx(columns, rel=0.02)
            assert rows == pytest.approx((24.5 / shrunk) ** 2 / 4, rel=0.06)
            np.testing.assert_allclose(centre, np.array(expected_size) / 2, atol=0.3)


def test_crops_of_a_picture_with_two_sides_lie_inside_and_show_their_pairs(folder):
    config = PipelineConfig(
        path=str(folder),
        split="train",
        size=Size(32, 48),
        scale=2,
        crop=16,
        max_text_length=4,
        batch_size=3,
        seed=0,
        num_threads=1,
    )
    with open_batches(config) as batches:
        for _ in range(5):
            batch = next(batches)
            assert batch["image"].shape == (3, 16, 16, 3) and batch["low_res"].shape == (3, 8, 8, 3)
            shrunk = batch["image"].reshape(3, 8, 2, 8, 2, 3).mean(axis=(2, 4))
            assert np.abs(shrunk - batch["low_res"]).mean() < 4


@pytest.mark.parametrize("size", [Size(30, 40), Size(40, 30)])
def test_what_is_only_cut_is_cut_exactly(size):
    generator = np.random.default_rng(0)
    array = generator.integers(0, 256, (size.height + 10, size.width, 3), np.uint8)
    for picture in (array, Image.fromarray(array)):
        np.testing.assert_array_equal(pictures.resize(picture, size), array[5:-5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": Size(0, 8)}, "at least 1 pixel a side, got 8×0"),
        ({"scale": 3}, "scale 3 does not divide 48×32"),
        ({"crop": 40}, "of at most 32, got 40"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    given = {"size": Size(32, 48), "max_text_length": 4, "batch_size": 1, "seed": 0, **fields}
    with pytest.raises(ValueError, match=message):
        PipelineConfig(path="x", split="train", **given)
