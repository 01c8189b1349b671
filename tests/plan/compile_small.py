"""Programs that libtpu really compiles, in a process of its own; prints what is predicted of them as JSON."""

import json
import sys

from imagen_jax.plan.environment import find_compiler

find_compiler()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from imagen_jax.errors import UserError  # noqa: E402
from imagen_jax.models.attention import attend  # noqa: E402
from imagen_jax.models.configs import SamplingConfig, StageConfig  # noqa: E402
from imagen_jax.models.execution import Execution  # noqa: E402
from imagen_jax.models.flash_attention import LANES, most_keys  # noqa: E402
from imagen_jax.models.layers import upsample_nearest, upsampled_convolution  # noqa: E402
from imagen_jax.models.network import Attention  # noqa: E402
from imagen_jax.models.normalisation import moments, position_sums  # noqa: E402
from imagen_jax.models.stage import StageNetwork  # noqa: E402
from imagen_jax.models.unet import UNetConfig  # noqa: E402
from imagen_jax.parallel.mesh import MeshConfig, gather_shard, make_mesh  # noqa: E402
from imagen_jax.plan.chips import parse_topology  # noqa: E402
from imagen_jax.plan.compile import _OPERATION_OPTION, slice_devices  # noqa: E402
from imagen_jax.plan.estimate import estimate  # noqa: E402
from imagen_jax.sampling import programs  # noqa: E402

SIDE = 4096


def predict(name, function, specs, shapes, count=1, sampling=False, options=None, mesh=None, slices=1):
    """The estimate of a function of bfloat16 arrays on some chips of a slice, or on those of a mesh.

    `sampling`: compiled as a stage is; `options`: of the compiler.
    """
    topology = parse_topology(name, slices)
    devices = slice_devices(topology)[:count] if mesh is None else mesh.devices.flat
    mesh = mesh or Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))
    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    lowered = jax.jit(function, compiler_options=options).lower(*args)
    compiled = programs.compile_program(lowered, mesh) if sampling else lowered.compile()
    found = estimate(compiled, topology, devices)
    return {
        "seconds": found.seconds,
        "kernel_s": found.kernel_s,
        "sources": [origin.source for origin, _ in found.operations],
        "collectives": [(each.kind.value, each.chips, each.received_bytes) for each in found.collectives],
        "unknown_loops": found.unknown_loops,
    }


def product(a, b):
    return a @ b


def repeated(length):
    return lambda a, b: jax.lax.scan(lambda c, _: (jnp.tanh(c @ b), None), a, length=length)[0]


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolved(x, kernel):
    for _ in range(2):
        x += convolve(jax.nn.silu(x), kernel)
    return x


def normalised(x, kernel):
    """A convolution and the statistics of what it makes."""
    made = convolve(x, kernel)
    return made, moments(made, jnp.zeros(made.shape[::3], jnp.float32))


def gradient_of(function):
    return lambda x, kernel, gradient: jax.vjp(function, x, kernel)[1](gradient)


def cut(mesh):
    """The gradient of a doubled picture's convolution whose kernel is split over the mesh."""

    def local(shard, x, gradient):
        shape = (*shard.shape[:2], shard.shape[2] * mesh.shape["fsdp"], shard.shape[3])
        return jax.vjp(lambda k: upsampled_convolution(x, gather_shard(k, shape, mesh)), shard)[1](gradient)[
            0
        ]

    split = P(None, None, "fsdp")
    specs = (split, P("fsdp"), P("fsdp"))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False), specs


def gathered(mesh):
    """The gradient of a product whose factor is split over "fsdp", summed over all data."""

    def local(shard, x):
        def loss(k):
            return jnp.sum((x @ gather_shard(k, (SIDE, SIDE), mesh)).astype(jnp.float32) ** 2)

        return jax.grad(loss)(shard)

    split = P("fsdp", None)
    specs = (split, P(("data", "fsdp")))
    function = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return function, specs, [(SIDE, SIDE), (32, SIDE)]


def plainly_summed(x):
    return x.astype(jnp.float32).sum((1, 2))


def added(a):
    def kernel(x, out):
        out[...] = x[...] + 1

    return pl.pallas_call(
        kernel,
        out_shape=a,
        grid=(8,),
        in_specs=[pl.BlockSpec((SIDE // 8, SIDE), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((SIDE // 8, SIDE), lambda i: (i, 0)),
        cost_estimate=pl.CostEstimate(flops=SIDE**2, transcendentals=0, bytes_accessed=4 * SIDE**2),
    )(a)


def sampled(kind):
    """Whether a kernel is in the program that draws pictures of a stage whose attention is of this kind."""
    network = UNetConfig(
        channels=(128,),
        num_res_blocks=(1,),
        self_attention=(True,),
        text_attention=(True,),
        text_width=16,
        embedding_width=128,
        dtype="bfloat16",
        attention=kind,
    )
    stage = StageConfig(name="base", resolution=16, network=network, max_text_length=8)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), slice_devices(parse_topology("v5e:2x2")))
    spec = programs.ProgramSpec(stage=stage, sampling=SamplingConfig(), batch=4, negative=True, mesh=mesh)
    return (
        "tpu_custom_call"
        in programs.compile_program(programs.trace(spec, StageNetwork(spec.stage)), mesh).as_text()
    )


def attention(name, dtype):
    """Whether the attention kernels, backward too, are compiled for a chip, with as many keys as they take."""
    devices = slice_devices(parse_topology(name))[:1]
    mesh = make_mesh(MeshConfig(), devices)
    place = NamedSharding(mesh, P())
    most = most_keys(jnp.dtype(dtype).itemsize)
    query = jax.ShapeDtypeStruct((1, 1024, LANES), dtype, sharding=place)
    keys = jax.ShapeDtypeStruct((1, most, LANES), dtype, sharding=place)
    mask = jax.ShapeDtypeStruct((1, most), jnp.bool_, sharding=place)

    def gradient(q, k, v, mask, d):
        with Execution(mesh=mesh).active():
            return jax.vjp(lambda *x: attend(*x, mask, heads=2, kind=Attention.AUTO), q, k, v)[1](d)

    return (
        jax.jit(gradient).lower(query, keys, keys, mask, query).compile().as_text().count("tpu_custom_call")
    )


def main():
    square = (SIDE, SIDE)
    slices = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
    results = {name: predict(name, product, [P(), P()], [square] * 2) for name in slices}
    for length in (7, 14):
        results[f"scan{length}"] = predict("v5e:2x2", repeated(length), [P(), P()], [square] * 2)
    results["attention"] = {name: attention(name, jnp.bfloat16) for name in slices}
    results["attention"]["float32"] = attention("v5e:2x2", jnp.float32)
    results["kernel"] = predict("v5e:2x2", added, [P()], [square])
    # Both factors are split along what is summed over: every chip has a part of each sum.
    results["split"] = predict("v5e:2x2", product, [P(None, "x"), P("x", None)], [square] * 2, count=4)
    pictures = ("v5e:2x2", convolved, [P(), P()], [(2, 64, 64, 256), (3, 3, 256, 256)])
    results["strips"] = predict(*pictures)
    results["whole"] = predict(*pictures, sampling=True)
    results["sampled"] = {kind.value: sampled(kind) for kind in Attention if kind is not Attention.CUDNN}
    programs._TPU_OPTIONS["xla_tpu_that_there_is_not"] = "false"
    results["unknown option"] = predict("v5e:2x2", product, [P(), P()], [square] * 2, sampling=True)
    level = ("v5e:2x2", normalised, [P(), P()], [(8, 128, 128, 128), (3, 3, 128, 128)])
    results["with sums"] = predict(*level)
    results["without sums"] = predict("v5e:2x2", lambda *args: normalised(*args)[0], *level[2:])
    results["small operations"] = predict(*level, options={_OPERATION_OPTION: "1024"})
    for name, function in (("summed", position_sums), ("plainly summed", plainly_summed)):
        results[name] = predict("v5e:2x2", function, [P()], [(8, 128, 128, 128)])
    doubling = [(8, 32, 32, 128), (3, 3, 128, 128), (8, 64, 64, 128)]
    for name, function in (
        ("doubled", upsampled_convolution),
        ("plainly doubled", lambda x, kernel: convolve(upsample_nearest(x), kernel)),
    ):
        results[name] = predict("v5e:2x2", gradient_of(function), [P()] * 3, doubling)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), slice_devices(parse_topology("v5e:2x2")))
    function, specs = cut(mesh)
    shapes = [doubling[1], (32, *doubling[0][1:]), (32, *doubling[2][1:])]
    results["cut"] = predict("v5e:2x2", function, specs, shapes, count=4, mesh=mesh)
    # Weights are split within a slice; only their gradients' sums cross over to the other.
    two = make_mesh(MeshConfig(data=4, fsdp=8), slice_devices(parse_topology("v5e:4x4", 2)))
    results["slices of the mesh"] = [
        sorted({device.slice_index for device in part.flat}) for part in two.devices
    ]
    results["slices"] = predict("v5e:4x4", *gathered(two), mesh=two, slices=2)
    try:
        make_mesh(MeshConfig(data=1, fsdp=32), two.devices.reshape(-1))
    except UserError as error:
        results["undivided"] = str(error)
    # No side of the slice is 32 chips long.
    devices = slice_devices(parse_topology("v6e:16x16"))
    results["mesh"] = make_mesh(MeshConfig(data=8, fsdp=32), devices).devices[0].size
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
