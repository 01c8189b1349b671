import ml_dtypes
import numpy as np
import pytest

from imagen_jax.data.embeddings import cut_embedding
from imagen_jax.data.quantise import dequantise, quantise


def tokens(count, width=3):
    """An embedding whose rows are their own numbers."""
    return np.repeat(np.arange(count, dtype=np.float32)[:, None], width, axis=1)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_first_tokens_and_the_last_are_kept(dtype):
    whole = tokens(7).astype(dtype)
    for length, kept in [(1, [6]), (2, [0, 6]), (4, [0, 1, 2, 6]), (6, [0, 1, 2, 3, 4, 6])]:
        cut = cut_embedding(whole, length)
        assert cut.dtype == dtype and cut[:, 0].tolist() == kept
    for length in (7, 8, 500):
        assert cut_embedding(whole, length) is whole
    with pytest.raises(ValueError, match="at least 1, got 0"):
        cut_embedding(whole, 0)


def test_cutting_twice_is_cutting_once():
    whole = tokens(40)
    for first in range(1, 42):
        for second in range(1, first + 1):
            twice = cut_embedding(cut_embedding(whole, first), second)
            np.testing.assert_array_equal(twice, cut_embedding(whole, second))


def test_int8_values_and_scales_are_cut_alike():
    whole = np.random.default_rng(0).standard_normal((9, 70)).astype(np.float32)
    values, scale = quantise(whole)
    before = dequantise(*quantise(cut_embedding(whole, 4)))
    after = dequantise(cut_embedding(values, 4), cut_embedding(scale, 4))
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(cut_embedding(dequantise(values, scale), 4), after)
