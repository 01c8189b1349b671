"""Placement of arrays, and that what is computed does not depend on it."""

import dataclasses
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from imagen_jax.config import build
from imagen_jax.errors import UserError
from imagen_jax.models.configs import StageConfig
from imagen_jax.models.network import Gather
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.text_form import zero_text
from imagen_jax.parallel.mesh import (
    MIN_SHARDED_SIZE,
    MeshConfig,
    batch_sharding,
    check_batch_size,
    make_mesh,
    parameter_spec,
    put_batch,
    slice_count,
    state_shardings,
)
from imagen_jax.training.config import DataConfig, LoopConfig, OptimizerConfig, TrainConfig
from imagen_jax.training.roles import DENOISER
from imagen_jax.training.run import Run
from imagen_jax.training.state import TrainState, from_stored_form, make_optimizer
from imagen_jax.training.train_step import batch_gradients, make_train_step

BATCH, LENGTH, TEXT_WIDTH = 8, 5, 64
NULL = zero_text(LENGTH, TEXT_WIDTH)
MESHES = {
    "data=8": MeshConfig(data=8),
    "fsdp=8": MeshConfig(data=1, fsdp=8),
    "tensor=8": MeshConfig(data=1, tensor=8),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
}
# 64 channels: every axis divides them, and each group of a GroupNorm has two (alone in its group, a
# channel's bias would have no gradient at all).
NETWORK = {"head_channels": 32, "embedding_width": 64, "text_width": TEXT_WIDTH}
STAGES = {
    "base": {
        "name": "base",
        "resolution": 8,
        "max_text_length": LENGTH,
        "prediction": "v",
        "network": NETWORK
        | {
            "kind": "unet",
            "channels": [64, 64],
            "num_res_blocks": [0, 1],
            "self_attention": [False, True],
            "text_attention": [False, True],
        },
    },
    "sr": {
        "name": "sr",
        "resolution": 16,
        "low_resolution": 8,
        "max_text_length": LENGTH,
        "prediction": "v",
        "network": NETWORK
        | {
            "kind": "efficient_unet",
            "channels": [64],
            "gather": "once",  # the base gathers block by block, the default
            "num_res_blocks": [2],
            "self_attention": [True],
            "text_attention": [True],
        },
    },
}


def run_config(kind):
    return TrainConfig(
        stage=build(StageConfig, STAGES[kind], kind),
        data=DataConfig(path="none", batch_size=BATCH),
        train=LoopConfig(steps=10, text_dropout=0.3, ema_decay=0.9),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
    )


def params_of(network, seed=0):
    """Weights none of which is zero: the layers that start at zero would hide the others' gradients."""
    generator = np.random.default_rng(seed)
    params = {}
    for name, shape in network.abstract_params.items():
        fan_in = max(1, int(np.prod(shape.shape[:-1])))
        noise = generator.standard_normal(shape.shape) / np.sqrt(fan_in if len(shape.shape) > 1 else 100)
        params[name] = (noise + (name.endswith("scale"))).astype(np.float32)
    return params


def batch_of(kind, seed=1):
    generator, stage = np.random.default_rng(seed), STAGES[kind]
    side = stage["resolution"]
    batch = {
        "image": generator.integers(0, 256, (BATCH, side, side, 3), np.uint8),
        "text": generator.standard_normal((BATCH, LENGTH, TEXT_WIDTH)).astype(np.float32),
        "text_mask": np.arange(LENGTH) < generator.integers(1, LENGTH + 1, (BATCH, 1)),
        "index": np.stack([np.arange(BATCH), np.zeros(BATCH)], 1).astype(np.uint32),
    }
    if "low_resolution" in stage:
        low = stage["low_resolution"]
        batch["low_res"] = generator.integers(0, 256, (BATCH, low, low, 3), np.uint8)
    return batch


def loss_and_gradients(kind, mesh, params):
    run = Run.of(run_config(kind), mesh)
    shardings = run.shardings.params[DENOISER]
    gradient = jax.jit(
        jax.value_and_grad(
            lambda params, batch: run.losses({DENOISER: params}, batch, NULL)[DENOISER].loss.mean()
        ),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(None, shardings),
    )
    placed = jax.device_put(params, shardings)
    loss, gradients = gradient(placed, put_batch(batch_of(kind), mesh))
    return float(loss), gradients


@pytest.fixture(scope="module")
def one_device():
    """Loss and gradients of each stage on a single device."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    results = {}
    for kind in STAGES:
        params = params_of(StageNetwork(run_config(kind).stage))
        loss, gradients = loss_and_gradients(kind, mesh, params)
        results[kind] = params, loss, {name: np.asarray(each) for name, each in gradients.items()}
    return results


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("kind", STAGES)
def test_gradients_do_not_depend_on_the_mesh(kind, name, one_device):
    params, loss, expected = one_device[kind]
    mesh = make_mesh(MESHES[name])
    mesh_loss, gradients = loss_and_gradients(kind, mesh, params)
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-6)
    split = [each for each in gradients.values() if each.addressable_shards[0].data.size < each.size]
    assert bool(split) == (name != "data=8")
    if split:  # nearly all of the weights
        whole = sum(each.size for each in gradients.values())
        assert sum(each.size for each in split) > 0.9 * whole
        parts = split[0].size // split[0].addressable_shards[0].data.size
        assert parts == (4 if name == "2x2x2" else 8)
    ratios = {}
    for key, gradient in expected.items():
        difference, largest = np.abs(np.asarray(gradients[key]) - gradient).max(), np.abs(gradient).max()
        assert largest > 0, key
        ratios[key] = difference / largest
    worst = sorted(ratios, key=ratios.__getitem__)[-5:]
    assert ratios[worst[-1]] <= 1e-5, {key: ratios[key] for key in worst}


@pytest.mark.parametrize(("data", "fsdp", "parts"), [(1, 8, 1), (2, 4, 1), (8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("kind", STAGES)
def test_gradients_of_weights_gathered_once_do_not_depend_on_the_mesh(kind, data, fsdp, parts, one_device):
    """Each device works on its own examples; what they exchange is written out."""
    params, loss, expected = one_device[kind]
    config = run_config(kind)
    stage = dataclasses.replace(
        config.stage, network=dataclasses.replace(config.stage.network, gather=Gather.ONCE)
    )
    train = dataclasses.replace(config.train, accumulate=parts)
    config = dataclasses.replace(config, stage=stage, train=train)
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])
    run = Run.of(config, mesh)
    placed = jax.device_put(params, run.shardings.params[DENOISER])
    call = jax.jit(
        lambda params, batch: batch_gradients(run, {DENOISER: params}, batch, NULL, jnp.asarray(0))
    )
    lowered = call.lower(placed, put_batch(batch_of(kind), mesh))
    assert ("reduce_scatter" in lowered.as_text()) == (fsdp > 1)
    gradients, losses, index = lowered.compile()(placed, put_batch(batch_of(kind), mesh))
    gradients = gradients[DENOISER]
    np.testing.assert_allclose(float(losses[DENOISER].loss.mean()), loss, rtol=1e-6)
    assert sorted(np.asarray(index)[:, 0].tolist()) == list(range(BATCH))
    for key, gradient in expected.items():
        assert gradients[key].sharding.is_equivalent_to(placed[key].sharding, gradient.ndim), key
        np.testing.assert_allclose(
            np.asarray(gradients[key]), gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=key
        )


def one_step(config, mesh, params):
    run = Run.of(config, mesh)
    # Moments that are not zero: the first step of Adam alone is only the gradient's sign.
    opt_state = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, 0.01) if leaf.ndim else leaf, run.optimizers[DENOISER].init(params)
    )
    ema = {name: 0.5 * value for name, value in params.items()}
    state = from_stored_form(TrainState(jnp.asarray(0, jnp.int32), params, ema, opt_state), run.abstract)
    step = make_train_step(run)
    return step(jax.device_put(state, run.shardings), put_batch(batch_of("sr"), mesh), NULL)


def test_a_training_step_does_not_depend_on_the_mesh(one_device):
    config, (params, loss, gradients) = run_config("sr"), one_device["sr"]
    state, metrics = one_step(config, make_mesh(MESHES["2x2x2"]), params)
    assert int(state.step) == 1
    np.testing.assert_allclose(float(metrics["loss"]), loss, rtol=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(each, dtype=np.float64)) for each in gradients.values()))
    np.testing.assert_allclose(float(metrics["grad_norm"]), norm, rtol=1e-5)
    single, _ = one_step(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), params)
    other = by_name(single)
    for key, leaf in by_name(state).items():
        largest = np.abs(other[key]).max()
        np.testing.assert_allclose(leaf, other[key], rtol=0, atol=1e-5 * largest, err_msg=key)
    # Adam by hand, from the gradients of one device (arXiv 1412.6980, algorithm 1, first step).
    name = "down.0.conv.kernel"
    clipped = gradients[name] * min(1.0, 1.0 / norm)
    first = (0.9 * 0.01 + 0.1 * clipped) / (1 - 0.9)
    second = (0.999 * 0.01 + 0.001 * clipped**2) / (1 - 0.999)
    expected = params[name] - 1e-3 * first / (np.sqrt(second) + 1e-8)
    np.testing.assert_allclose(np.asarray(state.params[DENOISER][name]), expected, atol=1e-6)
    average = 0.5 * params[name] + (1 - (1 + 0) / (10 + 0)) * (expected - 0.5 * params[name])
    np.testing.assert_allclose(np.asarray(state.ema[DENOISER][name]), average, atol=1e-6)
    parts = {str(shard.index) for shard in state.params[DENOISER][name].addressable_shards}
    assert len(parts) == 4


def by_name(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def test_make_mesh_takes_what_is_left():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(), jax.devices()[:3]).shape) == {"data": 3, "fsdp": 1, "tensor": 1}
    limited = MeshConfig(data=1, fsdp=-1, fsdp_limit=4)
    assert dict(make_mesh(limited).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(make_mesh(limited, jax.devices()[:6]).shape) == {"data": 2, "fsdp": 3, "tensor": 1}
    assert dict(make_mesh(limited, jax.devices()[:2]).shape) == {"data": 1, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize(
    "config", [MeshConfig(data=3), MeshConfig(data=-1, fsdp=3), MeshConfig(data=4, tensor=4)]
)
def test_make_mesh_names_a_mesh_that_does_not_fit(config):
    with pytest.raises(UserError, match=r"config\.mesh: .* does not make the 8 devices"):
        make_mesh(config)


def test_only_tpus_lie_in_slices():
    hosts = [0, 0, 1, 1]
    for platform, count in (("tpu", 2), ("gpu", 1), ("cpu", 1)):
        devices = [types.SimpleNamespace(platform=platform, slice_index=host) for host in hosts]
        assert slice_count(devices) == count
    assert slice_count([types.SimpleNamespace(platform="tpu")] * 4) == 1
    assert slice_count(jax.devices()) == 1


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, -1, 1), (1, 1, -2)])
def test_mesh_config_refuses_impossible_sizes(sizes):
    with pytest.raises(ValueError, match="at most one of them -1"):
        MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes)))


BIG = MIN_SHARDED_SIZE


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((), P()),
        ((BIG,), P(None)),  # vectors stay whole
        ((8, 8), P(None, None)),  # too small
        ((64, BIG // 64 - 2), P(None, None)),
        ((64, BIG // 64), P("fsdp", "tensor")),
        ((3, 3, 64, 64), P(None, None, "fsdp", "tensor")),
        ((3, 3, 3, BIG), P(None, None, None, "tensor")),  # fsdp divides neither 3 nor what tensor took
        ((3, 3, BIG, 3), P(None, None, "tensor", None)),
        ((3, 5, 27, 101), P(None, None, None, None)),
    ],
)
def test_parameter_spec(shape, spec):
    assert parameter_spec(shape, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))) == spec


def test_parameter_spec_moves_an_axis_that_does_not_divide():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    assert parameter_spec((3, 3, 12, 64), mesh) == P(None, None, None, "fsdp")
    assert parameter_spec((64, 64), make_mesh(MeshConfig(data=8))) == P(None, None)


def test_moments_and_averages_lie_as_their_parameter():
    network = StageNetwork(run_config("base").stage)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    shapes = jax.eval_shape(optimizer.init, network.abstract_params)
    mesh = make_mesh(MESHES["2x2x2"])
    for parameter, sharding in state_shardings(network.abstract_params, mesh).items():
        moments = [
            each
            for path, each in jax.tree.leaves_with_path(state_shardings(shapes, mesh))
            if getattr(path[-1], "key", None) == parameter
        ]
        assert moments == [sharding, sharding]


def test_put_batch_splits_the_examples_over_data_and_fsdp():
    mesh = make_mesh(MESHES["2x2x2"])
    batch = put_batch({"x": np.arange(16, dtype=np.float32).reshape(8, 2)}, mesh)
    np.testing.assert_array_equal(np.asarray(batch["x"]), np.arange(16).reshape(8, 2))
    held = [tuple(np.asarray(shard.data)[:, 0].tolist()) for shard in batch["x"].addressable_shards]
    assert sorted(held) == sorted(2 * [(0, 2), (4, 6), (8, 10), (12, 14)])


def test_batch_size_must_be_shared_equally():
    mesh = make_mesh(dataclasses.replace(MESHES["2x2x2"], data=4, tensor=1))
    check_batch_size(16, mesh, "config.data.batch_size")
    with pytest.raises(UserError, match=r"config\.data\.batch_size=12 is not a multiple of the 8 devices"):
        check_batch_size(12, mesh, "config.data.batch_size")


def test_devices_are_left_as_they_are_once_jax_has_been_used():
    program = """
import jax, os
from imagen_jax.errors import UserError
from imagen_jax.parallel.mesh import use_cpu_devices
jax.numpy.ones(2) + 1
before = jax.device_count()
use_cpu_devices()
assert jax.device_count() == before
try:
    use_cpu_devices(3)
except UserError as error:
    assert str(error).startswith("--cpu_devices 3: "), error
else:
    raise AssertionError("3 devices are taken to be there")
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
