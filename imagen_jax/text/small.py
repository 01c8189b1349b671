"""A small frozen text encoder made on the spot: a T5 v1.1 folder with fixed random weights.

It lets the whole chain run where nothing can be downloaded. It is no language model, but more than a
table of word vectors: its relative-position biases make one head look at the previous token, one at the
next, one at the two or three before, and one everywhere, so that the embedding of "circle" tells "red
circle" from "blue circle".
"""

import json
import unicodedata
from collections.abc import Iterable

import numpy as np
from etils import epath
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from imagen_jax.files import make_folder, write_text
from imagen_jax.models.weights import save_state
from imagen_jax.text.tokenizer import BYTE_PIECES

_WORD = "▁"  # before every word, as in T5's own tokenizers
_SPECIAL = ("<pad>", "</s>", "<unk>")  # their ids are T5's: 0, 1, 2
_HEAD_DIM = 32
_BUCKETS = 32
_MAX_DISTANCE = 128

# Buckets that each head favours, with the logit added there. A key n tokens before the query has bucket
# n, one after it has _BUCKETS / 2 + n (n < 8). The favoured ones outweigh 100 others together; a token at
# the edge, without that neighbour, looks at itself (bucket 0).
_LOOK = 10.0
_SELF = 5.0
_HEADS: tuple[dict[int, float], ...] = (
    {1: _LOOK, 0: _SELF},  # the previous token
    {_BUCKETS // 2 + 1: _LOOK, 0: _SELF},  # the next
    {2: _LOOK, 3: _LOOK, 0: _SELF},  # two and three before
    {},  # everything
)
# Size of what each head adds, relative to the token's own embedding: the token dominates, and the
# previous word, which an adjective is, comes next.
_HEAD_SCALES = (0.5, 0.3, 0.25, 0.2)
_FEED_FORWARD_SCALE = 0.2
_LATER_LAYERS = 0.5  # each layer adds this much of what the one before it added


def make_small_encoder(
    folder: epath.PathLike,
    *,
    vocabulary_texts: Iterable[str],
    width: int = 96,
    layers: int = 2,
    seed: int = 0,
    byte_fallback: bool = False,
) -> epath.Path:
    """Writes a Hugging Face folder that `TextEncoder.load` and transformers' T5EncoderModel open.

    The tokenizer is word level, with punctuation and each Chinese character on its own, in lower case. The same
    texts (in any order), sizes and seed give the same bytes.

    Args:
        folder: where to write config.json, model.safetensors, tokenizer.json and tokenizer_config.json.
        vocabulary_texts: texts whose words are the vocabulary.
        width: channels of an embedding.
        layers: number of layers.
        seed: of the weights.
        byte_fallback: spells a word that no text has, in the bytes of its UTF-8, so that a model that is trained on
            further captions can learn it; else such a word is <unk>.

    Returns:
        The folder.

    Raises:
        ValueError: width or layers below 1.
    """
    if width < 1 or layers < 1:
        raise ValueError(f"width and layers must be at least 1, got {width} and {layers}")
    target = make_folder(folder)
    tokenizer = _make_tokenizer(vocabulary_texts, byte_fallback)
    config = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": tokenizer.get_vocab_size(),
        "d_model": width,
        "d_kv": _HEAD_DIM,
        "d_ff": 2 * width,
        "num_layers": layers,
        "num_heads": len(_HEADS),
        "relative_attention_num_buckets": _BUCKETS,
        "relative_attention_max_distance": _MAX_DISTANCE,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    weights = _make_weights(tokenizer.get_vocab_size(), width, layers, seed)
    # transformers opens a safetensors file only if it says "pt".
    save_state(weights, target / "model.safetensors", metadata={"format": "pt"})
    write_text(target / "tokenizer_config.json", json.dumps(tokenizer_config, indent=2) + "\n")
    write_text(target / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    # Last: a folder with a configuration is complete.
    write_text(target / "config.json", json.dumps(config, indent=2) + "\n")
    return target


def _make_tokenizer(texts: Iterable[str], byte_fallback: bool) -> Tokenizer:
    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.BertNormalizer(
                clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=True
            ),
        ]
    )
    splitter = pre_tokenizers.BertPreTokenizer()
    words = {
        word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    } - set(_SPECIAL)
    # By code point of the composed form: the order, and so the ids, do not depend on the texts' order.
    ordered = sorted(words, key=lambda word: unicodedata.normalize("NFC", word))
    if byte_fallback:
        tokenizer = Tokenizer(_spelling_model(ordered))
        marker = pre_tokenizers.Metaspace(replacement=_WORD, prepend_scheme="always", split=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitter, marker])
    else:
        vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *ordered])}
        tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = splitter
    tokenizer.normalizer = normalizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer


def _spelling_model(words: Iterable[str]) -> models.Unigram:
    """Whole words where it has them, else their beginning that is one, or its mark, and bytes."""
    pieces = [
        *_SPECIAL,
        *BYTE_PIECES,
        _WORD,
        *(_WORD + word for word in words),
    ]
    # A longer word is likelier than a shorter one and bytes.
    scores = {piece: float(len(piece)) for piece in pieces if piece.startswith(_WORD)}
    vocabulary = [(piece, scores.get(piece, 0.0)) for piece in pieces]
    return models.Unigram(vocabulary, unk_id=_SPECIAL.index("<unk>"), byte_fallback=True)


def _make_weights(vocab_size: int, width: int, layers: int, seed: int) -> dict[str, np.ndarray]:
    """Weights under the hub's names, (out, in), float32."""
    generator = np.random.default_rng(seed)
    heads = len(_HEADS)
    inner, hidden = heads * _HEAD_DIM, 2 * width

    def normal(std: float, *shape: int) -> np.ndarray:
        return (std * generator.standard_normal(shape)).astype(np.float32)

    bias = np.zeros((_BUCKETS, heads), np.float32)
    for head, favoured in enumerate(_HEADS):
        for bucket, logit in favoured.items():
            bias[bucket, head] = logit
    tensors = {
        "shared.weight": normal(1.0, vocab_size, width),
        "encoder.final_layer_norm.weight": np.ones(width, np.float32),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": bias,
    }
    for i in range(layers):
        scale = _LATER_LAYERS**i
        attention = f"encoder.block.{i}.layer.0."
        feed_forward = f"encoder.block.{i}.layer.1."
        # Logits from content of about 1: they vary the broad head and never outweigh a position.
        query_std = (width * _HEAD_DIM**0.5) ** -0.5
        tensors[attention + "SelfAttention.q.weight"] = normal(query_std, inner, width)
        tensors[attention + "SelfAttention.k.weight"] = normal(query_std, inner, width)
        tensors[attention + "SelfAttention.v.weight"] = normal(width**-0.5, inner, width)
        out = normal(scale * _HEAD_DIM**-0.5, width, inner)
        out *= np.repeat(np.asarray(_HEAD_SCALES, np.float32), _HEAD_DIM)
        tensors[attention + "SelfAttention.o.weight"] = out
        tensors[attention + "layer_norm.weight"] = np.ones(width, np.float32)
        tensors[feed_forward + "DenseReluDense.wi_0.weight"] = normal(width**-0.5, hidden, width)
        tensors[feed_forward + "DenseReluDense.wi_1.weight"] = normal(width**-0.5, hidden, width)
        # gelu(a) b of two unit normals has a standard deviation of about 0.65.
        down = scale * _FEED_FORWARD_SCALE / 0.65 * hidden**-0.5
        tensors[feed_forward + "DenseReluDense.wo.weight"] = normal(down, width, hidden)
        tensors[feed_forward + "layer_norm.weight"] = np.ones(width, np.float32)
    return tensors
