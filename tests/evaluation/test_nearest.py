import numpy as np

from imagen_jax.evaluation.nearest import nearest, thumbnails


def test_thumbnails_average_squares() -> None:
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    picture[0, ::2] = 200  # stripes thinner than a thumbnail's pixel
    np.testing.assert_allclose(thumbnails(picture), 100.0, atol=0.51)


def test_noisy_pictures_find_themselves_and_strangers_do_not() -> None:
    random = np.random.default_rng(0)
    references = random.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    noise = random.integers(-40, 41, references.shape)
    noisy = np.clip(references.astype(int) + noise, 0, 255).astype(np.uint8)
    assert (nearest(noisy, references) == np.arange(64)).all()
    strangers = random.integers(0, 256, references.shape, dtype=np.uint8)
    assert (nearest(strangers, references) == np.arange(64)).mean() < 0.2


def test_resolutions_may_differ() -> None:
    random = np.random.default_rng(1)
    references = random.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    larger = references.repeat(4, axis=1).repeat(4, axis=2)
    assert nearest(larger[::-1], references).tolist() == [4, 3, 2, 1, 0]
