"""Stages: their parameters under names, conditions, the null text and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.models.efficient_unet import EfficientUNetConfig
from imagen_jax.models.stage import StageNetwork, unit_pictures
from imagen_jax.models.text_form import Text, TextForm, replace_text, zero_text
from imagen_jax.models.unet import UNetConfig

SIZES = {
    "channels": (4, 8),
    "num_res_blocks": (1, 1),
    "self_attention": (False, False),
    "text_attention": (False, True),
    "text_width": 6,
    "head_channels": 4,
    "embedding_width": 8,
}
BASE = StageConfig(name="base8", resolution=8, network=UNetConfig(**SIZES))
SR = StageConfig(name="sr16", resolution=16, low_resolution=8, network=EfficientUNetConfig(**SIZES))


@pytest.mark.parametrize("config", [BASE, SR], ids=lambda config: config.name)
def test_every_parameter_has_a_name_of_its_own(config):
    network = StageNetwork(config)
    leaves = jax.tree.leaves(network.abstract_params)
    assert len(set(network.abstract_params)) == len(leaves) > 60
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert network.parameter_count() == sum(int(np.prod(leaf.shape)) for leaf in leaves)
    made = jax.eval_shape(network.init, jax.random.key(0))
    assert list(made) == list(network.abstract_params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), network.abstract_params
    )


def test_parameter_count_in_closed_form():
    """One level without attention: what the layers' formulas add up to."""
    c, e, t, w = 4, 8, 6, 3  # channels, embedding, text, image channels
    network = UNetConfig(
        **{
            **SIZES,
            "channels": (c,),
            "num_res_blocks": (1,),
            "self_attention": (False,),
            "text_attention": (False,),
        }
    )
    config = StageConfig(name="base8", resolution=8, network=network)

    def dense(inputs, outputs):
        return inputs * outputs + outputs

    def conv(inputs, outputs):
        return 9 * inputs * outputs + outputs

    def block(inputs):
        norms, convs = 2 * inputs + 2 * c, conv(inputs, c) + conv(c, c)
        return norms + convs + dense(e, 2 * c) + (0 if inputs == c else dense(inputs, c))

    text = 2 * t + dense(t, e) + 2 * e + 4 * dense(e, e) - e + 2 * e  # the pooling's keys have no bias
    blocks = 3 * block(c) + 2 * block(2 * c)  # one down, two in the middle, two up with skips
    total = dense(c, e) + dense(e, e) + text + conv(w, c) + blocks + 2 * c + conv(c, w)
    assert StageNetwork(config).parameter_count() == total


def test_starts_at_zero_and_takes_its_conditions():
    """Zero at the start; with other parameters, time and augmentation level reach the output."""
    network = StageNetwork(SR)
    generator = np.random.default_rng(0)
    params = {
        name: generator.standard_normal(leaf.shape).astype(np.float32) * 0.3
        for name, leaf in network.abstract_params.items()
    }
    x_t = jnp.asarray(generator.standard_normal((2, 16, 16, 3)), jnp.float32)
    low_res = jnp.asarray(generator.uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)
    text, mask = jnp.asarray(generator.standard_normal((2, 3, 6)), jnp.float32), jnp.ones((2, 3), bool)
    apply = jax.jit(network.apply, compiler_options={"xla_backend_optimization_level": 0})

    def run(params=params, log_snr=0.0, aug_log_snr=15.0, low_res=low_res):
        levels = jnp.full((2,), log_snr), jnp.full((2,), aug_log_snr)
        output = apply(params, x_t, levels[0], text, mask, low_res=low_res, aug_log_snr=levels[1])
        return np.asarray(output.prediction)

    first = run()
    # A dictionary has no order to rely on: after loading it is another one.
    np.testing.assert_array_equal(run(dict(reversed(params.items()))), first)
    for other in (run(log_snr=-6.0), run(aug_log_snr=-6.0), run(low_res=-low_res)):
        assert np.abs(other - first).max() > 1e-2
    at_start = {name: value * (not name.startswith("conv_out")) for name, value in params.items()}
    np.testing.assert_array_equal(run(at_start), 0.0)


def test_fresh_parameters_start_with_an_output_of_zero():
    one_level = {
        "channels": (4,),
        "num_res_blocks": (1,),
        "self_attention": (True,),
        "text_attention": (True,),
    }
    config = dataclasses.replace(BASE, network=UNetConfig(**{**SIZES, **one_level}))
    params = jax.jit(StageNetwork(config).init, compiler_options={"xla_backend_optimization_level": 0})(
        jax.random.key(3)
    )
    for name, value in params.items():
        if name.endswith(("bias", "conv2.kernel", "attention.out.kernel", "conv_out.kernel")):
            assert not np.any(value), name
        elif name.endswith("scale"):
            assert np.all(value == 1), name
        else:  # unit gain: variance 1 / fan-in
            fan_in = np.prod(value.shape[:-1])
            assert 0.5 < np.sqrt(np.mean(np.square(value)) * fan_in) < 1.5, name


def test_texts_that_are_dropped_become_the_null_text():
    embeddings = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 2)), jnp.float32)
    mask = jnp.asarray([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    text, chosen = Text(embeddings, mask), jnp.array([True, False, True])
    replaced = replace_text(text, chosen, zero_text(4, 2))
    np.testing.assert_array_equal(replaced.embeddings[jnp.array([0, 2])], 0.0)
    np.testing.assert_array_equal(replaced.embeddings[1], embeddings[1])
    # One token of zeros, whatever it replaces.
    np.testing.assert_array_equal(replaced.mask, [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    kept = replace_text(text, jnp.zeros(3, bool), zero_text(4, 2))
    np.testing.assert_array_equal(kept.embeddings, embeddings)
    np.testing.assert_array_equal(kept.mask, mask)
    other = Text(np.full((4, 2), 7.0, np.float32), np.ones(4, bool))
    replaced = replace_text(text, chosen, other)
    np.testing.assert_array_equal(replaced.embeddings[2], other.embeddings)
    assert np.asarray(replaced.mask)[[0, 2]].all()


def test_the_form_of_texts():
    plain, padded = TextForm(length=4), TextForm(length=4, padded=True)
    assert plain.normalise(" A Red Circle ") == " A Red Circle " and plain.null_caption is None
    assert padded.normalise(" A Red Circle ") == "a red circle" and padded.null_caption == ""
    np.testing.assert_array_equal(plain.mask(np.array([1, 6])), [[1, 0, 0, 0], [1, 1, 1, 1]])
    assert padded.mask(np.array([1, 6])).all()  # padding is text
    assert BASE.text_form == TextForm(length=BASE.max_text_length)


def test_unit_pictures():
    made = unit_pictures(jnp.asarray([[0, 255, 51]], jnp.uint8))
    np.testing.assert_allclose(made, [[-1.0, 1.0, -0.6]], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (BASE, {"name": ""}, "''"),
        (BASE, {"name": "a/b"}, "'a/b'"),
        (BASE, {"resolution": 9}, "resolution 9 is not a multiple of the 2"),
        (BASE, {"low_resolution": 4}, "low_resolution 4 and network.low_res_channels 0"),
        (BASE, {"max_text_length": 0}, "max_text_length .* 0"),
        (SR, {"low_resolution": 5}, "resolution 16 is not a multiple of low_resolution 5"),
        (SR, {"low_resolution": None}, "low_resolution None and network.low_res_channels 3"),
        (SR, {"resolution": 18, "low_resolution": 9}, "resolution 18 is not a multiple of the 4"),
        (SR, {"crop": 6}, "crop 6 is not a multiple of the 4"),
    ],
)
def test_bad_stages(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_bad_sampling():
    with pytest.raises(ValueError, match=r"1\.25"):
        SamplingConfig(aug_level=1.25)
