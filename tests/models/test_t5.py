import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from imagen_jax.errors import UserError
from imagen_jax.models import t5
from imagen_jax.models.t5_weights import load_t5, t5_shapes, t5_sources
from imagen_jax.models.weights import WeightReader, flatten_names, load_tensors

CONFIG = t5.T5Config(vocab_size=50, width=24, head_dim=5, num_heads=3, feed_forward_width=40, num_layers=3)
HUB = {
    "model_type": "t5",
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 5,
    "num_heads": 3,
    "d_ff": 40,
    "num_layers": 3,
}


@functools.cache
def make(config=CONFIG, dtype=jnp.float32):
    """The graph, and a state whose norms and biases are not trivial."""
    graph, abstract = t5.abstract_t5(config, dtype=dtype)
    generator = np.random.default_rng(0)

    def draw(leaf):
        if len(leaf.shape) == 1:
            return 1 + 0.1 * generator.normal(size=leaf.shape).astype(np.float32)
        return generator.normal(size=leaf.shape).astype(np.float32) * leaf.shape[-1] ** -0.5

    return graph, jax.tree.map(draw, abstract)


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph, state, tokens, mask):
    return nnx.merge(graph, state)(tokens, mask)


def run(graph, state, tokens, mask):
    return np.asarray(_encode(graph, state, jnp.asarray(tokens), jnp.asarray(mask)))


def reference(config, weights, tokens):
    """T5 v1.1 in float64 NumPy, one loop per head and layer, for one unpadded row."""
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def bucket(relative):
        # Section 2.1: 8 exact distances per direction, then logarithmic up to 128.
        distance, offset = abs(relative), 16 if relative > 0 else 0
        if distance < 8:
            return offset + distance
        return offset + min(15, 8 + int(np.log(distance / 8) / np.log(16) * 8 + 1e-9))

    x = weights["token_embedding"][tokens]
    length = len(tokens)
    buckets = np.array([[bucket(k - q) for k in range(length)] for q in range(length)])
    for i in range(config.num_layers):
        w = {n.removeprefix("layers."): v[i] for n, v in weights.items() if n.startswith("layers.")}
        # Matrices are (out, in).
        w = {n: v.T if v.ndim == 2 and n != "relative_bias" else v for n, v in w.items()}
        normed = norm(x, w["attention_norm"])
        heads = []
        for h in range(config.num_heads):
            part = slice(h * config.head_dim, (h + 1) * config.head_dim)
            logits = (normed @ w["query"][:, part]) @ (normed @ w["key"][:, part]).T
            table = w["relative_bias"] if config.bias_per_layer else weights["relative_bias"]
            e = np.exp(logits + table[buckets, h])
            heads.append(e / e.sum(-1, keepdims=True) @ (normed @ w["value"][:, part]))
        x = x + np.concatenate(heads, -1) @ w["attention_out"]
        normed = norm(x, w["feed_forward_norm"])
        hidden = normed @ w["feed_forward_up"]
        if config.gated:
            g = normed @ w["feed_forward_gate"]
            hidden *= 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
        else:
            hidden = np.maximum(hidden, 0)
        x = x + hidden @ w["feed_forward_down"]
    return norm(x, weights["final_norm"])


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, bias_per_layer=True),
        dataclasses.replace(CONFIG, gated=False, activation=t5.Activation.RELU),
    ],
    ids=["v1.1", "umt5", "v1.0"],
)
def test_encoder_matches_a_plain_implementation(config):
    graph, state = make(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 45))
    got = run(graph, state, tokens.astype(np.int32), np.ones((1, 45), bool))
    np.testing.assert_allclose(got[0], reference(config, flatten_names(state)[0], tokens[0]), atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"bias_per_layer": True}, {"gated": False}])
def test_parameters_are_known_without_the_network(changes):
    config = dataclasses.replace(CONFIG, **changes)
    _, abstract = t5.abstract_t5(config, param_dtype=jnp.bfloat16)
    named = {name: (leaf.shape, leaf.dtype) for name, leaf in flatten_names(abstract)[0].items()}
    shapes = t5_shapes(config, jnp.bfloat16)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()} == named


def test_the_pure_function_is_the_module():
    graph, state = make()
    tokens, mask = np.arange(8)[None], np.arange(8)[None] < 6
    params = dict(reversed(flatten_names(state)[0].items()))  # their order has no say
    got = jax.jit(functools.partial(t5.encode, CONFIG))(params, tokens, mask)
    np.testing.assert_array_equal(got, run(graph, state, tokens, mask))


def test_padding_changes_no_real_token():
    graph, state = make()
    tokens = np.random.default_rng(1).integers(0, 50, (2, 32)).astype(np.int32)
    mask = np.arange(32)[None] < np.array([[20], [7]])
    padded = run(graph, state, tokens, mask)
    other = run(graph, state, np.where(mask, tokens, 49 - tokens), mask)
    np.testing.assert_array_equal(padded[mask], other[mask])
    alone = run(graph, state, tokens[1:, :7], np.ones((1, 7), bool))
    np.testing.assert_allclose(padded[1, :7], alone[0], atol=2e-6)
    assert np.isfinite(run(graph, state, tokens, np.zeros((2, 32), bool))).all()


def test_bfloat16_stays_close_to_float32():
    tokens = np.random.default_rng(2).integers(0, 50, (4, 16)).astype(np.int32)
    mask = np.ones((4, 16), bool)
    graph, state = make()
    exact = run(graph, state, tokens, mask)
    low_graph, _ = make(dtype=jnp.bfloat16)
    low = run(low_graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state), tokens, mask)
    assert low.dtype == np.float32
    error = np.linalg.norm(low - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    # Really bfloat16, and only its rounding: 2^-9 per operand, over three layers.
    assert 1e-4 < np.median(error) < 0.015 and error.max() < 0.05


def test_a_large_residual_survives_bfloat16():
    # An update of 1 beside a residual of 1e4 is below bfloat16's resolution (64 there).
    graph, state = make(dataclasses.replace(CONFIG, num_layers=1), jnp.bfloat16)
    tokens, mask = np.zeros((1, 4), np.int32), np.ones((1, 4), bool)
    named, treedef = flatten_names(state)
    named["token_embedding"] = jnp.full_like(named["token_embedding"], 1e4)
    before = run(graph, jax.tree.unflatten(treedef, named.values()), tokens, mask)
    named["layers.attention_out"] = jnp.zeros_like(named["layers.attention_out"])
    named["layers.feed_forward_down"] = jnp.zeros_like(named["layers.feed_forward_down"])
    without = run(graph, jax.tree.unflatten(treedef, named.values()), tokens, mask)
    assert 1e-6 < np.abs(before - without).max() < 1e-2


@pytest.mark.parametrize("tied_name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_hub_names_load_into_the_right_places(tmp_path, tied_name):
    state = make()[1]
    named = flatten_names(state)[0]
    tensors = {tied_name: named["token_embedding"], "decoder.final_layer_norm.weight": np.ones(24)}
    for i in range(3):
        attention, dense = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        for theirs, ours in {"q": "query", "k": "key", "v": "value", "o": "attention_out"}.items():
            tensors[f"{attention}SelfAttention.{theirs}.weight"] = named[f"layers.{ours}"][i]
        for theirs, ours in {"wi_0": "gate", "wi_1": "up", "wo": "down"}.items():
            tensors[f"{dense}DenseReluDense.{theirs}.weight"] = named[f"layers.feed_forward_{ours}"][i]
        tensors[f"{attention}layer_norm.weight"] = named["layers.attention_norm"][i]
        tensors[f"{dense}layer_norm.weight"] = named["layers.feed_forward_norm"][i]
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors[bias] = named["relative_bias"]
    tensors["encoder.final_layer_norm.weight"] = named["final_norm"]
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "model.safetensors")
    with WeightReader(tmp_path) as reader:
        loaded = load_tensors(t5_shapes(CONFIG), reader, t5_sources(CONFIG, reader.names))
    assert loaded.keys() == named.keys()
    for name, value in loaded.items():
        np.testing.assert_array_equal(value, named[name], err_msg=name)
    deeper = dataclasses.replace(CONFIG, num_layers=4)
    with (
        WeightReader(tmp_path) as reader,
        pytest.raises(UserError, match=r"no tensor encoder\.block\.3"),
    ):
        load_tensors(t5_shapes(deeper), reader, t5_sources(deeper, reader.names))


def test_config_of_each_family():
    assert t5.T5Config.from_dict(HUB | {"feed_forward_proj": "gated-gelu"}) == CONFIG
    old = t5.T5Config.from_dict(HUB)
    assert not old.gated and old.activation is t5.Activation.RELU
    umt5 = t5.T5Config.from_dict(HUB | {"model_type": "umt5"})
    assert umt5 == dataclasses.replace(CONFIG, bias_per_layer=True)
    assert (
        t5.T5Config.from_dict(HUB | {"model_type": "mt5", "relative_attention_num_buckets": 16}).num_buckets
        == 16
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip"}, "'clip' is not a T5 encoder"),
        ({"d_model": None}, "d_model is None"),
        ({"feed_forward_proj": "gated-tanh"}, "'gated-tanh' is not supported"),
        ({"feed_forward_proj": 1}, "feed_forward_proj"),
        ({"num_heads": True}, "num_heads is True"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"relative_attention_num_buckets": "32"}, "num_buckets"),
        ({"relative_attention_num_buckets": 6}, "num_buckets must be a multiple of 4"),
        ({"layer_norm_epsilon": float("nan")}, "norm_epsilon"),
        (
            {"quantization_config": {"load_in_8bit": True}},
            "config.json has quantization_config: .* quantised",
        ),
        ({"compression_config": {}}, "config.json has compression_config"),
    ],
)
def test_other_configs_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        t5.T5Config.from_dict(HUB | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"encoder.final_layer_norm.weight": np.ones(24, np.int8)},
            r"final_layer_norm\.weight is int8.*quantised",
        ),
        (
            {"encoder.block.0.layer.0.SelfAttention.q.SCB": np.ones(15, np.float32)},
            r"q\.SCB \(F32\) belongs to",
        ),
        (
            {"encoder.block.0.layer.0.SelfAttention.q.bias": np.ones(15, np.float32)},
            "unexpected tensor .*q.bias",
        ),
    ],
)
def test_weights_that_are_more_or_other_than_a_t5s_are_refused(change, message, tmp_path):
    generator, sources = np.random.default_rng(0), t5_sources(CONFIG, frozenset({"shared.weight"}))
    tensors = {}
    for name, leaf in t5_shapes(CONFIG).items():
        for theirs in sources[name].names:
            shape = leaf.shape[1:] if sources[name].stacked else leaf.shape
            tensors[theirs] = generator.standard_normal(shape).astype(np.float32)
    (tmp_path / "config.json").write_text(json.dumps(HUB | {"feed_forward_proj": "gated-gelu"}))
    ignored = {"decoder.final_layer_norm.weight": np.ones(24, np.float32)}
    save_file(tensors | ignored, tmp_path / "model.safetensors")
    load_t5(tmp_path)
    save_file(tensors | change, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_t5(tmp_path)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path.name}: no config\.json"):
        load_t5(tmp_path)
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        dataclasses.replace(CONFIG, num_heads=0)
