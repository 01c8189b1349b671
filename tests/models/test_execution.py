"""Rematerialisation, scans and gathering on a mesh change neither the output nor the gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagen_jax.models.configs import EfficientUNetConfig, Remat, StageConfig, UNetConfig
from imagen_jax.models.execution import Execution
from imagen_jax.models.layers import GroupNorm
from imagen_jax.models.stage import StageNetwork

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
    return lambda params: jnp.square(network.apply(params, x_t, *rest, mask, **low)).mean(), params


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
    """The same loss and gradients; fewer convolutions under a scan, more where blocks are computed again."""
    stage, counts, expected = STAGES[kind], {}, None
    for remat, scan in [(Remat.NONE, 0), (Remat.NONE, 2), (Remat.PRODUCTS, 2), (Remat.BLOCK, 2)]:
        network = dataclasses.replace(stage.network, remat=remat, scan=scan)
        loss, params = loss_of(dataclasses.replace(stage, network=network))
        gradient = jax.value_and_grad(loss)
        counts[remat, scan] = primitives(jax.make_jaxpr(gradient)(params).jaxpr, "conv_general_dilated")
        made = jax.jit(gradient, compiler_options={"xla_backend_optimization_level": 0})(params)
        if expected is None:
            expected = made
            continue
        np.testing.assert_allclose(made[0], expected[0], rtol=1e-6)
        for name, value in expected[1].items():
            np.testing.assert_allclose(
                made[1][name], value, atol=2e-6 + 1e-4 * np.abs(value).max(), err_msg=f"{remat} {scan} {name}"
            )
    assert counts[Remat.NONE, 2] < counts[Remat.NONE, 0]
    assert counts[Remat.PRODUCTS, 2] == counts[Remat.NONE, 2]
    assert counts[Remat.BLOCK, 2] > counts[Remat.PRODUCTS, 2]


def test_parameters_do_not_know_of_the_scan():
    stage = STAGES["sr"]
    scanned = dataclasses.replace(stage, network=dataclasses.replace(stage.network, scan=2))
    assert StageNetwork(stage).abstract_params == StageNetwork(scanned).abstract_params


class Scale(nnx.Module):
    def __init__(self, shape):
        self.weight = nnx.Param(jnp.full(shape, 2.0))

    def __call__(self, x, other=None):
        return x * self.weight[...].sum() + (0.0 if other is None else other)


def test_chain_scans_over_runs_of_equal_modules_only():
    modules = [Scale((1,)), Scale((1,)), Scale((2,)), Scale((1,)), Scale((1,))]
    twins = [jnp.full((3,), float(index)) for index in reversed(range(5))]

    def run(scan):
        return lambda x: Execution(scan=scan).chain(modules, x, twins=twins, keep=True)

    x = jnp.asarray([1.0, -1.0, 0.5])
    last, outputs = run(2)(x)
    value, expected = x, []
    for index, factor in enumerate([2.0, 2.0, 4.0, 2.0, 2.0]):
        value = value * factor + index
        expected.append(value)
    np.testing.assert_array_equal(outputs, expected)
    np.testing.assert_array_equal(last, expected[-1])
    assert primitives(jax.make_jaxpr(run(2))(x).jaxpr, "scan") == 2
    assert primitives(jax.make_jaxpr(run(3))(x).jaxpr, "scan") == 0
    assert primitives(jax.make_jaxpr(run(0))(x).jaxpr, "scan") == 0


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
