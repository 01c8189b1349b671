import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from imagen_jax.models.configs import StageConfig
from imagen_jax.models.efficient_unet import EfficientUNetConfig
from imagen_jax.models.network import Remat
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.unet import UNetConfig
from imagen_jax.plan.flops import forward_flops, jaxpr_flops
from imagen_jax.sizes import Size

# Wide channels and large pictures: what XLA counts besides (element-wise work) and leaves out (padding) is small.
SHAPE = {
    "channels": (128, 256),
    "num_res_blocks": (2, 2),
    "self_attention": (False, True),
    "text_attention": (False, True),
    "text_width": 64,
    "dtype": "bfloat16",
}
BASE = StageConfig(name="base", resolution=128, max_text_length=32, network=UNetConfig(**SHAPE))
SR = StageConfig(
    name="sr", resolution=256, low_resolution=64, max_text_length=32, network=EfficientUNetConfig(**SHAPE)
)


def xla_flops(stage, side):
    """FLOPs of the forward pass on one picture, as XLA counts those of the program before it optimises it."""
    network = StageNetwork(stage)
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    args = [
        jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
        one,
        jax.ShapeDtypeStruct((1, 32, 64), jnp.float32),
        jax.ShapeDtypeStruct((1, 32), jnp.bool_),
    ]
    low = {}
    if stage.low_resolution:
        low_side = side * stage.low_resolution // stage.resolution
        low = {
            "low_res": jax.ShapeDtypeStruct((1, low_side, low_side, 3), jnp.float32),
            "aug_log_snr": one,
        }
    lowered = jax.jit(network.apply).lower(network.abstract_params, *args, **low)
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize("stage", [BASE, SR], ids=["unet", "efficient_unet"])
def test_count_agrees_with_xla(stage):
    assert forward_flops(StageNetwork(stage)) == pytest.approx(xla_flops(stage, stage.resolution), rel=0.02)


def test_a_crop_has_the_flops_of_its_size():
    assert forward_flops(StageNetwork(SR), size=Size(128, 128)) == pytest.approx(xla_flops(SR, 128), rel=0.03)


@pytest.mark.parametrize("stage", [BASE, SR], ids=["unet", "efficient_unet"])
def test_rematerialised_blocks_count_the_same(stage):
    network = dataclasses.replace(stage.network, remat=Remat.PRODUCTS)
    other = dataclasses.replace(stage, network=network)
    assert forward_flops(StageNetwork(other)) == forward_flops(StageNetwork(stage))


def count(function, *shapes):
    return jaxpr_flops(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)).jaxpr)


def test_products_and_convolutions_in_closed_form():
    assert (
        count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (5, 7, 11), (5, 11, 13)) == 2 * 5 * 7 * 11 * 13
    )
    layout = ("NHWC", "HWIO", "NHWC")

    def convolve(x, kernel, groups=1, stride=1):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    assert count(convolve, (2, 8, 8, 6), (3, 3, 6, 10)) == 2 * 2 * 64 * 9 * 6 * 10
    assert (
        count(lambda x, k: convolve(x, k, stride=2), (2, 8, 8, 6), (3, 3, 6, 10)) == 2 * 2 * 16 * 9 * 6 * 10
    )
    assert count(lambda x, k: convolve(x, k, groups=3), (2, 8, 8, 6), (3, 3, 2, 9)) == 2 * 2 * 64 * 9 * 2 * 9


def test_loops_branches_and_rules_of_differentiation():
    product = 2 * 4**3

    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0]

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x @ x, x)

    @jax.custom_vjp
    def own(x):
        return x @ x

    own.defvjp(lambda x: (own(x), x), lambda x, g: (g @ x,))
    assert count(loop, (4, 4)) == 7 * product
    assert count(branch, (4, 4)) == 2 * product
    assert count(jax.checkpoint(jax.jit(own)), (4, 4)) == product


def test_a_loop_of_unknown_length_is_an_error():
    def search(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="unknown length"):
        count(search, (4, 4))


def test_a_kernel_counts_by_its_own_estimate_or_by_its_body():
    def double(x, out):
        out[...] = x[...] @ x[...]

    def kernel(x, estimate=None):
        spec = pl.BlockSpec((8, 8), lambda i: (i, 0))
        return pl.pallas_call(
            double, out_shape=x, grid=(3,), in_specs=[spec], out_specs=spec, cost_estimate=estimate
        )(x)

    estimate = pl.CostEstimate(flops=12345, transcendentals=0, bytes_accessed=0)
    assert count(lambda x: kernel(x, estimate), (24, 8)) == 12345
    assert count(kernel, (24, 8)) == 3 * 2 * 8**3
