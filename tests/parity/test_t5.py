"""The T5 family against transformers, on random tiny weights in files that transformers wrote."""

import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

from imagen_jax.models import t5  # noqa: E402
from imagen_jax.models.t5_weights import load_t5  # noqa: E402

_SIZES = {
    "vocab_size": 120,
    "d_model": 64,
    "d_kv": 8,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": 1,
    "num_heads": 6,
}

# Family: (transformers' config class, encoder class, feed-forward).
FAMILIES = {
    "t5-v1.0": ("T5Config", "T5EncoderModel", "relu"),
    "t5-v1.1": ("T5Config", "T5EncoderModel", "gated-gelu"),
    "mt5": ("MT5Config", "MT5EncoderModel", "gated-gelu"),
    "umt5": ("UMT5Config", "UMT5EncoderModel", "gated-gelu"),
    "byt5": ("T5Config", "T5EncoderModel", "gated-gelu"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A transformers encoder, and ours as a jitted function of (tokens, mask)."""
    import transformers

    config_class, model_class, feed_forward = FAMILIES[request.param]
    sizes = _SIZES | {"feed_forward_proj": feed_forward}
    if request.param == "byt5":
        sizes |= {"vocab_size": 384, "tokenizer_class": "ByT5Tokenizer"}
    torch.manual_seed(0)
    theirs = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "layer_norm" in name:  # ones would hide a scale that is not applied
                parameter.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in name:  # wide enough that a wrong bucket shows
                parameter.normal_()
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder, max_shard_size="40KB" if request.param == "umt5" else "1GB")
    config, params = load_t5(folder)
    return theirs, functools.partial(jax.jit(functools.partial(t5.encode, config)), params), config


@pytest.mark.parametrize("length", [1, 7, 77, 256])
def test_encoder_matches_transformers(pair, length):
    theirs, ours, config = pair
    generator = np.random.default_rng(length)
    tokens = generator.integers(0, config.vocab_size, (3, length))
    full = np.ones((3, length), bool)
    padded = np.arange(length)[None, :] < np.array([[length], [max(1, length // 2)], [1]])
    for mask in (full, padded):
        with torch.no_grad():
            expected = theirs(
                input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask.astype(np.int64))
            ).last_hidden_state.numpy()
        got = np.asarray(ours(tokens.astype(np.int32), mask))
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(got[mask], expected[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 64), (64, 256)])
def test_buckets_match_transformers(buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    positions = torch.arange(600)
    expected = T5Attention._relative_position_bucket(
        positions[None, :] - positions[:, None], num_buckets=buckets, max_distance=distance
    )
    np.testing.assert_array_equal(t5.relative_position_buckets(600, buckets, distance), expected.numpy())


def test_small_encoder_opens_in_transformers(tmp_path):
    from transformers import AutoTokenizer, T5EncoderModel

    from imagen_jax.text.encoder import TextEncoder
    from imagen_jax.text.small import make_small_encoder

    make_small_encoder(tmp_path, vocabulary_texts=["a red circle left of a blue square", "一个红色的圆"])
    caption = "a blue circle, 红"
    inputs = AutoTokenizer.from_pretrained(tmp_path)(caption, return_tensors="pt")
    with torch.no_grad():
        expected = T5EncoderModel.from_pretrained(tmp_path).eval()(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
    (got,) = TextEncoder.load(tmp_path).encode([caption])
    np.testing.assert_allclose(got, expected.last_hidden_state[0].numpy(), atol=1e-5, rtol=0)
