"""Both U-Nets against a NumPy implementation that knows no mask: it only ever sees the real tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagen_jax.models import layers
from imagen_jax.models.efficient_unet import DBlock, EfficientUNet, EfficientUNetConfig, UBlock
from imagen_jax.models.normalisation import add_bias, add_everywhere, position_sums
from imagen_jax.models.unet import UNet, UNetConfig
from imagen_jax.models.weights import flatten_names

FLOAT32 = jnp.dtype("float32")
LENGTH, TEXT_WIDTH = 5, 12
TINY = {"text_width": TEXT_WIDTH, "head_channels": 8, "embedding_width": 16}
CONFIGS = {
    "base": UNetConfig(
        channels=(8, 16),
        num_res_blocks=(1, 2),
        self_attention=(False, True),
        text_attention=(True, True),
        **TINY,
    ),
    "sr with patches": UNetConfig(
        channels=(4, 8),
        num_res_blocks=(1, 1),
        self_attention=(False, True),
        text_attention=(False, False),
        low_res_channels=3,
        patch_size=2,
        **TINY,
    ),
    "one level, no attention": UNetConfig(
        channels=(6,), num_res_blocks=(1,), self_attention=(False,), text_attention=(False,), **TINY
    ),
    "efficient sr": EfficientUNetConfig(
        channels=(8, 16),
        num_res_blocks=(1, 2),
        self_attention=(False, True),
        text_attention=(False, True),
        **TINY,
    ),
    "efficient sr with concatenated skips": EfficientUNetConfig(
        channels=(8, 16),
        num_res_blocks=(1, 3),
        self_attention=(False, True),
        text_attention=(False, True),
        concat_skips=(False, True),
        **TINY,
    ),
    "efficient base with patches": EfficientUNetConfig(
        channels=(8,),
        num_res_blocks=(1,),
        self_attention=(False,),
        text_attention=(True,),
        low_res_channels=0,
        patch_size=2,
        image_channels=1,
        **TINY,
    ),
}


def fast_jit(function):
    """Compiles in half the time; the networks are tiny."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def random_values(abstract, seed=0):
    """Parameters of which none is zero or one; the real ones start with branches that do nothing."""
    generator = np.random.default_rng(seed)
    values = {}
    for name, leaf in abstract.items():
        draw = generator.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith("kernel"):
            values[name] = draw * math.prod(leaf.shape[:-1]) ** -0.5
        else:
            values[name] = name.endswith("scale") + 0.2 * draw
    return values


def random_module(make, seed=0):
    """(function of (params, *arguments), params) of a module."""
    graph, state = nnx.split(nnx.eval_shape(make))
    abstract, tree = flatten_names(state)

    def call(params, *args, **kwargs):
        module = nnx.merge(graph, jax.tree.unflatten(tree, [params[name] for name in abstract]))
        return module(*args, **kwargs)

    return fast_jit(call), random_values(abstract, seed)


@functools.cache
def network(name, dtype="float32"):
    config = CONFIGS[name]
    config = type(config)(**{**vars(config), "dtype": dtype})
    make = EfficientUNet if isinstance(config, EfficientUNetConfig) else UNet
    return random_module(lambda: make(config, rngs=nnx.Rngs(0)))


def inputs(config, side=8, length=LENGTH, seed=0):
    """Arguments of a network, as (positional, keyword); captions of 5, 2 and 3 tokens."""
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    mask = np.arange(length) < np.array([5, 2, 3])[:, None]
    arguments = (
        normal(3, side, side, config.image_channels),
        np.array([10.0, 500.0, 990.0], np.float32),
        normal(3, length, TEXT_WIDTH),
        mask,
    )
    if not config.low_res_channels:
        return arguments, {}
    low_res = normal(3, side // 2, side // 2, config.low_res_channels)
    return arguments, {"low_res": low_res, "aug_time": np.array([0.0, 100.0, 900.0], np.float32)}


# The NumPy implementation, in float64. `p` is a function from a parameter's name to its value.


def silu(x):
    return x / (1 + np.exp(-x))


def linear(p, name, x):
    return x @ p(f"{name}.kernel") + p(f"{name}.bias")


def conv(p, name, x, stride=1):
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = p(f"{name}.kernel")
    return p(f"{name}.bias") + sum(
        padded[:, dy : dy + height : stride, dx : dx + width : stride] @ kernel[dy, dx]
        for dy in range(3)
        for dx in range(3)
    )


def group_norm(p, name, x):
    n, h, w, c = x.shape
    groups = 32 if c % 32 == 0 and c >= 256 else math.gcd(32, max(1, c // 8))
    grouped = x.reshape(n, h * w, groups, -1)
    mean, var = grouped.mean(axis=(1, 3), keepdims=True), grouped.var(axis=(1, 3), keepdims=True)
    normed = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    return normed * p(f"{name}.scale") + p(f"{name}.bias")


def layer_norm(p, name, x):
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normed * p(f"{name}.scale") + p(f"{name}.bias")


def attention(query, key, value, heads):
    """Of one example; (length, heads × head) each."""
    query, key, value = (x.reshape(len(x), heads, -1) for x in (query, key, value))
    logits = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, value).reshape(len(query), -1)


def time_embedding(p, name, value, width):
    frequency = 1e4 ** (-np.arange(width // 2) / (width // 2))
    angles = value[:, None] * frequency
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    return linear(p, f"{name}.dense2", silu(linear(p, f"{name}.dense1", waves)))


def text_conditioning(p, name, real, heads):
    """Of one caption's real tokens (length, text width): the sequence and the pooled vector."""
    tokens = linear(p, f"{name}.project", layer_norm(p, f"{name}.norm", real))
    normed = layer_norm(p, f"{name}.pool_norm", tokens)
    query = linear(p, f"{name}.query", normed.mean(axis=0, keepdims=True))
    key, value = normed @ p(f"{name}.key.kernel"), linear(p, f"{name}.value", normed)
    pooled = attention(query, key, value, heads)
    return tokens, linear(p, f"{name}.out", layer_norm(p, f"{name}.out_norm", pooled))[0]


def res_block(p, name, x, embedding, resample=None):
    def resized(y):
        if resample == "up":
            return y.repeat(2, axis=1).repeat(2, axis=2)
        if resample == "down":
            return (y[:, ::2, ::2] + y[:, 1::2, ::2] + y[:, ::2, 1::2] + y[:, 1::2, 1::2]) / 4
        return y

    h = conv(p, f"{name}.conv1", resized(silu(group_norm(p, f"{name}.norm1", x))))
    h = group_norm(p, f"{name}.norm2", h)
    if embedding is not None:
        scale, shift = np.split(linear(p, f"{name}.embed", silu(embedding))[:, None, None], 2, axis=-1)
        h = h * (1 + scale) + shift
    h = conv(p, f"{name}.conv2", silu(h))
    x = resized(x)
    return h + (x if x.shape == h.shape else linear(p, f"{name}.shortcut", x))


def text_attention(p, name, x, sequences, *, use_self, use_text, head):
    """`sequences`: the real tokens of each example."""
    n, height, width, channels = x.shape
    h = group_norm(p, f"{name}.norm", x).reshape(n, height * width, channels)
    results = []
    for each, tokens in zip(h, sequences):
        pairs = []
        if use_text:
            pairs.append(linear(p, f"{name}.text_key_value", layer_norm(p, f"{name}.text_norm", tokens)))
        if use_self:
            pairs.append(linear(p, f"{name}.key_value", each))
        key, value = np.split(np.concatenate(pairs), 2, axis=-1)
        results.append(attention(linear(p, f"{name}.query", each), key, value, channels // head))
    return x + linear(p, f"{name}.out", np.stack(results)).reshape(x.shape)


def bicubic(size, low):
    """(size, low) weights of Keys's kernel (a = −1/2) with half-pixel centres, summing to one a row."""
    distance = np.abs(((np.arange(size) + 0.5) * low / size - 0.5)[:, None] - np.arange(low))
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def reference(config, params, x, time, text, mask, low_res=None, aug_time=None):
    def p(name):
        return np.asarray(params[name], np.float64)

    def attend(name, x, level):
        use_self, use_text = config.self_attention[level], config.text_attention[level]
        if not (use_self or use_text):
            return x
        options = {"use_self": use_self, "use_text": use_text, "head": config.head_channels}
        return text_attention(p, f"{name}.attention", x, sequences, **options)

    heads = config.width // config.head_channels
    pairs = [text_conditioning(p, "conditioning.text", t[m], heads) for t, m in zip(text, mask)]
    sequences = [tokens for tokens, _ in pairs]
    embedding = np.stack([pooled for _, pooled in pairs])
    embedding = embedding + time_embedding(p, "conditioning.time", time, config.channels[0])
    if low_res is not None:
        embedding = embedding + time_embedding(p, "conditioning.aug_level", aug_time, config.channels[0])
        weights = bicubic(x.shape[1], low_res.shape[1])
        x = np.concatenate([x, np.einsum("yi,xj,nijc->nyxc", weights, weights, low_res)], axis=-1)
    size = config.patch_size
    h = np.concatenate([x[:, i::size, j::size] for i in range(size) for j in range(size)], axis=-1)
    h = conv(p, "conv_in", h)
    body = efficient_body if isinstance(config, EfficientUNetConfig) else adm_body
    h = body(config, p, h, embedding, attend)
    h = h.reshape(*h.shape[:3], size, size, -1)
    return h.transpose(0, 1, 3, 2, 4, 5).reshape(*x.shape[:3], -1)


def adm_body(config, p, h, embedding, attend):
    levels, skips = len(config.channels), [h]
    for level in range(levels):
        for i in range(config.num_res_blocks[level]):
            h = attend(f"down.{level}.{i}", res_block(p, f"down.{level}.{i}.res", h, embedding), level)
            skips.append(h)
        if level + 1 < levels:
            h = res_block(p, f"downsamples.{level}", h, embedding, "down")
            skips.append(h)
    h = attend("mid1", res_block(p, "mid1.res", h, embedding), levels - 1)
    h = res_block(p, "mid2.res", h, embedding)
    for step in range(levels):
        level = levels - 1 - step
        for i in range(config.num_res_blocks[level] + 1):
            h = np.concatenate([h, skips.pop()], axis=-1)
            h = attend(f"up.{step}.{i}", res_block(p, f"up.{step}.{i}.res", h, embedding), level)
        if level:
            h = res_block(p, f"upsamples.{step}", h, embedding, "up")
    assert not skips
    return conv(p, "conv_out", silu(group_norm(p, "norm_out", h)))


def efficient_body(config, p, h, embedding, attend):
    def stack(name, h, level, twins=None):
        h = h + linear(p, f"{name}.combine.project", silu(embedding))[:, None, None]
        outputs = []
        for i in range(config.num_res_blocks[level]):
            if twins is None:
                h = res_block(p, f"{name}.blocks.{i}", h, embedding)
            else:
                h = np.concatenate([h, twins.pop()], axis=-1)
                h = res_block(p, f"{name}.blocks.{i}.res", h, embedding)
            outputs.append(h)
        return attend(name, h, level), outputs

    first, skips, levels = h, [], len(config.channels)
    for level in range(levels):
        h, outputs = stack(f"down.{level}.stack", conv(p, f"down.{level}.conv", h, stride=2), level)
        skips.append((h, outputs))
    for step in range(levels):
        level, (skip, outputs) = levels - 1 - step, skips.pop()
        if config.concat_skips and config.concat_skips[level]:
            h, _ = stack(f"up.{step}.stack", h, level, outputs)
        else:
            h, _ = stack(f"up.{step}.stack", (h + skip) / np.sqrt(2), level)
        h = conv(p, f"up.{step}.conv", h.repeat(2, axis=1).repeat(2, axis=2))
    return conv(p, "conv_out", (h + first) / np.sqrt(2))


def relative_error(made, expected):
    return np.sqrt(np.mean((np.asarray(made, np.float64) - expected) ** 2) / np.mean(expected**2))


@pytest.mark.parametrize("name", CONFIGS)
def test_network_is_the_numpy_one(name):
    config = CONFIGS[name]
    (apply, params), (args, kwargs) = network(name), inputs(config)
    made = apply(params, *args, **kwargs)
    assert made.shape == args[0].shape and made.dtype == jnp.float32
    assert relative_error(made, reference(config, params, *args, **kwargs)) < 1e-4


@pytest.mark.parametrize("name", ["base", "efficient sr"])
def test_padding_has_no_say_and_text_has(name):
    (apply, params), (args, kwargs) = network(name), inputs(CONFIGS[name])
    x_t, time, text, mask = args
    first = np.asarray(apply(params, *args, **kwargs))
    noisy = np.where(mask[..., None], text, 100.0 * np.random.default_rng(1).standard_normal(text.shape))
    padded = apply(params, x_t, time, noisy.astype(np.float32), mask, **kwargs)
    np.testing.assert_allclose(padded, first, atol=1e-5)
    # One real token more or another one changes the caption's own picture, and no other.
    for new_text, new_mask in (
        (np.where(np.arange(3)[:, None, None] == 1, -text, text), mask),
        (text, np.where(np.arange(3)[:, None] == 1, True, mask)),
    ):
        change = np.abs(np.asarray(apply(params, x_t, time, new_text, new_mask, **kwargs)) - first)
        change = change.max(axis=(1, 2, 3))
        assert change[1] > 1e-2
        np.testing.assert_allclose(change[[0, 2]], 0.0, atol=1e-5)


def test_longer_padding_is_the_same():
    name = "efficient sr"
    (apply, params), (args, kwargs) = network(name), inputs(CONFIGS[name])
    longer = (np.pad(args[2], ((0, 0), (0, 4), (0, 0))), np.pad(args[3], ((0, 0), (0, 4))))
    made = apply(params, *args[:2], *longer, **kwargs)
    np.testing.assert_allclose(made, apply(params, *args, **kwargs), atol=1e-5)


def test_bfloat16_is_close_and_gives_float32():
    name = "efficient sr"
    args, kwargs = inputs(CONFIGS[name])
    apply, params = network(name, "bfloat16")
    made = apply(params, *args, **kwargs)
    assert made.dtype == jnp.float32
    expected = np.asarray(network(name)[0](params, *args, **kwargs))
    # Eight bits a number, some twenty roundings deep: a few per cent, and not none.
    assert 1e-4 < relative_error(made, expected) < 0.05


@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("embedding_width", [None, 6])
def test_res_block(resample, embedding_width):
    outputs = 12 if resample is None else 8
    apply, params = random_module(
        lambda: layers.ResNetBlock(
            8,
            outputs,
            embedding_width=embedding_width,
            resample=resample,
            dtype=FLOAT32,
            rngs=nnx.Rngs(0),
        )
    )
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 8)).astype(np.float32)
    embedding = None
    if embedding_width is not None:
        embedding = np.linspace(-2, 2, 12, dtype=np.float32).reshape(2, 6)
    expected = res_block(lambda name: params[name[1:]], "", x, embedding, resample)
    np.testing.assert_allclose(apply(params, x, embedding), expected, atol=1e-4)


def test_group_norm_shares_within_groups():
    apply, params = random_module(lambda: layers.GroupNorm(96, dtype=FLOAT32))
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 96)) * np.arange(1, 97) + 50
    expected = group_norm(lambda name: params[name[1:]], "", x)  # 4 groups of 24 channels
    np.testing.assert_allclose(apply(params, x.astype(np.float32)), expected, atol=1e-4)


@pytest.mark.parametrize("spread", [1.0, 1 / 30])  # of the channels' values, whose means are about 1
def test_group_norm_in_bfloat16(spread):
    """Of values that bfloat16 has, as exact as its result can be: sums are taken in float32."""
    apply, params = random_module(lambda: layers.GroupNorm(96, dtype=jnp.dtype("bfloat16")))
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 96)) * spread + 1
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    expected = group_norm(lambda name: params[name[1:]], "", x)
    made = apply(params, jnp.asarray(x, jnp.bfloat16))
    assert made.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(made, np.float64), expected, rtol=2**-8, atol=2e-3)


def test_sums_over_positions_in_bfloat16():
    """The gradients of what is added everywhere: sums whose terms are bfloat16 and which are float32."""
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 8)) + 1
    x = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(x, np.float64).sum((1, 2))
    np.testing.assert_allclose(position_sums(x), exact, rtol=1e-5)
    _, pull = jax.vjp(add_bias, jnp.zeros_like(x), jnp.zeros(8))
    gradient, bias = pull(x)
    np.testing.assert_array_equal(gradient, x)
    np.testing.assert_allclose(bias, exact.sum(0), rtol=1e-5)
    _, pull = jax.vjp(add_everywhere, jnp.zeros_like(x), jnp.zeros((2, 8), jnp.bfloat16))
    gradient, values = pull(x)
    np.testing.assert_array_equal(gradient, x)
    np.testing.assert_allclose(np.asarray(values, np.float64), exact, rtol=2**-8)


def convolutions(jaxpr):
    """(side before, side after) of each convolution, in order."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            found.append((equation.invars[0].aval.shape[1], equation.outvars[0].aval.shape[1]))
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                found += convolutions(value.jaxpr)
    return found


def test_dblock_halves_first_and_ublock_doubles_before_its_last_convolution():
    config, side = CONFIGS["efficient sr"], 8
    rest = (jnp.zeros((1, 16)), jnp.zeros((1, LENGTH, 16)), jnp.ones((1, LENGTH), bool))
    down, params = random_module(lambda: DBlock(config, 8, 1, rngs=nnx.Rngs(0)))
    found = convolutions(jax.make_jaxpr(down.__wrapped__)(params, jnp.zeros((1, side, side, 8)), *rest).jaxpr)
    assert found == [(side, side // 2)] + 4 * [(side // 2, side // 2)]
    up, params = random_module(lambda: UBlock(config, 8, 1, rngs=nnx.Rngs(0)))
    skip = jnp.zeros((1, side, side, 16))
    found = convolutions(jax.make_jaxpr(up.__wrapped__)(params, skip, skip, [], *rest).jaxpr)
    assert found == 4 * [(side, side)] + [(2 * side, 2 * side)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_res_blocks": (1,)}, r"num_res_blocks needs .* 2 levels, got \(1,\)"),
        ({"self_attention": (True, True, False)}, r"self_attention needs .* got \(True, True, False\)"),
        ({"dtype": "float16"}, "'float16'"),
        ({"channels": ()}, r"got \(\)"),
        ({"channels": (7, 8)}, r"got \(7, 8\)"),
        ({"patch_size": 0}, "patch_size .* 0"),
        ({"text_width": -1}, "text_width .* -1"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**vars(CONFIGS["base"]), **changes})


def test_concatenated_skips_are_given_for_every_level_or_none():
    with pytest.raises(ValueError, match=r"concat_skips needs .* 2 levels or none, got \(True,\)"):
        EfficientUNetConfig(**{**vars(CONFIGS["efficient sr"]), "concat_skips": (True,)})


def test_bad_heads_and_inputs():
    with pytest.raises(ValueError, match="head_channels 16 does not divide 8"):
        UNet(UNetConfig(**{**vars(CONFIGS["base"]), "head_channels": 16}), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sideways"):
        layers.ResNetBlock(8, 8, embedding_width=None, resample="sideways", dtype=FLOAT32, rngs=nnx.Rngs(0))
    args, kwargs = inputs(CONFIGS["efficient sr"])
    apply, params = network("efficient sr")
    with pytest.raises(ValueError, match="aug_time"):
        apply(params, *args, low_res=kwargs["low_res"])
