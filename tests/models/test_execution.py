"""Rematerialisation and gathering on a mesh change neither the output nor the gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.models.configs import StageConfig
from imagen_jax.models.efficient_unet import EfficientUNetConfig
from imagen_jax.models.layers import GroupNorm
from imagen_jax.models.network import Remat
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.unet import UNetConfig

SIZES = {
    "channels": (8, 16),
    "num_res_blocks": (1, 3),
    "self_attention": (False, True),
    "text_attention": (False, True),
    "text_width": 6,
    "head_channels": 8,
    "embedding_width": 8,
}
STAGES = {
    "base": StageConfig(name="base", resolution=8, network=UNetConfig(**SIZES)),
    "sr": StageConfig(
        name="sr",
        resolution=16,
        low_resolution=8,
        network=EfficientUNetConfig(**SIZES, concat_skips=(False, True)),
    ),
}


def loss_of(stage):
    """A function of the parameters, and parameters none of which is zero."""
    network, generator = StageNetwork(stage), np.random.default_rng(0)
    params = {
        name: jnp.asarray(0.2 * generator.standard_normal(leaf.shape) + name.endswith("scale"), jnp.float32)
        for name, leaf in network.abstract_params.items()
    }
    side = stage.resolution
    x_t = jnp.asarray(generator.standard_normal((2, side, side, 3)), jnp.float32)
    rest = (jnp.asarray([-1.0, 2.0]), jnp.asarray(generator.standard_normal((2, 3, 6)), jnp.float32))
    mask = jnp.asarray([[True, False, False], [True, True, True]])
    low = {}
    if stage.low_resolution:
        low = {"low_res": x_t[:, ::2, ::2], "aug_log_snr": jnp.asarray([3.0, 0.0])}
    return lambda params: jnp.square(network.apply(params, x_t, *rest, mask, **low).prediction).mean(), params


def primitives(jaxpr, name):
    """How many operations of a name a program has, those of loops counted once."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == name
        for value in equation.params.values():
            for each in value if isinstance(value, (list, tuple)) else (value,):
                inner = getattr(each, "jaxpr", each)
                found += primitives(inner, name) if hasattr(inner, "eqns") else 0
    return found


@pytest.mark.parametrize("kind", STAGES)
def test_nothing_changes_but_the_program(kind):
    """The same loss and gradients; more convolutions where blocks are computed again."""
    stage, counts, expected = STAGES[kind], {}, None
    for remat in Remat:
        network = dataclasses.replace(stage.network, remat=remat)
        loss, params = loss_of(dataclasses.replace(stage, network=network))
        gradient = jax.value_and_grad(loss)
        counts[remat] = primitives(jax.make_jaxpr(gradient)(params).jaxpr, "conv_general_dilated")
        made = jax.jit(gradient, compiler_options={"xla_backend_optimization_level": 0})(params)
        if expected is None:
            expected = made
            continue
        np.testing.assert_allclose(made[0], expected[0], rtol=1e-6)
        for name, value in expected[1].items():
            np.testing.assert_allclose(
                made[1][name], value, atol=2e-6 + 1e-4 * np.abs(value).max(), err_msg=f"{remat} {name}"
            )
    assert counts[Remat.PRODUCTS] == counts[Remat.NONE]
    assert counts[Remat.BLOCK] > counts[Remat.PRODUCTS]


@pytest.mark.parametrize("mean", [0.0, 1e3, -3e4])
def test_group_norm_keeps_its_precision_at_a_large_mean(mean):
    """Against float64: what is left is the rounding of the float32 input itself."""
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((2, 16, 16, 64)) + mean + np.arange(64) % 3).astype(np.float32)
    norm = GroupNorm(64, dtype=jnp.dtype("float32"))
    groups = x.astype(np.float64).reshape(2, 256, norm.groups, -1)
    centred = groups - groups.mean(axis=(1, 3), keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(axis=(1, 3), keepdims=True) + 1e-5)
    tolerance = 1e-5 + 4 * abs(mean) * 2**-24
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected.reshape(x.shape), atol=tolerance)
