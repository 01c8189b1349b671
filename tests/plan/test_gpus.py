"""What is reckoned for GPUs, against counts by hand and against XLA's own memory of a compiled step."""

import jax
import jax.numpy as jnp
import pytest

from imagen_jax.errors import UserError
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.plan.compile import Program, null_text, training_batch
from imagen_jax.plan.gpus import GPUS, make_gpu_plan, parse_device, peak_bytes
from imagen_jax.training.run import Run
from imagen_jax.training.train_step import make_train_step

X = jax.ShapeDtypeStruct((256,), jnp.float32)  # 1 KiB


@pytest.mark.parametrize(
    ("function", "kib"),
    [
        (lambda x: x * 2.0, 1),
        (lambda x: jnp.sin(jnp.cos(jnp.exp(x))), 2),  # one is read, one is written
        (lambda x: (jnp.sin(x), jnp.cos(x), jnp.exp(x)), 3),
        (lambda x: jnp.concatenate([jnp.sin(x), x, x, x]), 1 + 4),
        (lambda x: jax.jit(lambda y: jnp.sin(jnp.cos(jnp.exp(y))))(x), 2),
    ],
)
def test_the_most_at_a_time(function, kib):
    assert peak_bytes(jax.make_jaxpr(function)(X).jaxpr) == pytest.approx(1024 * kib, abs=16)


@pytest.mark.parametrize("name", ["base", "sr"])
def test_a_step_needs_no_more_than_is_said(make_config, name):
    """XLA, on a CPU, fuses part of what the formula counts as written, and no more than two thirds of it."""
    config = make_config(name, "data.batch_size=16")
    run = Run.of(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    compiled = (
        make_train_step(run)
        .lower(run.abstract, training_batch(config, run.mesh), null_text(config, run.mesh))
        .compile()
    )
    plan = make_gpu_plan(config, GPUS["t4"], Program.TRAIN)
    assert 0.33 < compiled.memory_analysis().temp_size_in_bytes / plan.memory.activations < 1.1
    assert plan.memory.params == 4 * plan.params and plan.memory.fits


def test_time_is_the_work_at_a_share_of_the_peak(make_config):
    plan = make_gpu_plan(make_config("base", "data.batch_size=16"), GPUS["a100"], Program.TRAIN)
    fast, slow = (seconds - plan.update_s for seconds in plan.seconds)
    assert slow == pytest.approx(2 * fast) and fast == pytest.approx(plan.flops / (0.5 * 156e12))  # TF32
    half = make_gpu_plan(
        make_config("base", "data.batch_size=16", "stage.network.dtype=bfloat16"), GPUS["a100"], Program.TRAIN
    )
    assert half.peak_flops == 312e12 and half.flops == plan.flops


def test_sampling_counts_all_its_calls(make_config):
    config = make_config("base", "data.batch_size=4", "stage.sampling.sampler.steps=7")
    plan = make_gpu_plan(config, GPUS["l4"], Program.SAMPLE)
    trained = make_gpu_plan(config, GPUS["l4"], Program.TRAIN)
    assert plan.flops == pytest.approx(trained.flops / 3 * 7 * 2)  # guided
    assert plan.memory.optimizer == plan.memory.ema == 0
    assert "sampling 4 pictures" in plan.to_text() and plan.to_json()["device"] == "l4"


def test_what_does_not_fit_says_so(make_config):
    plan = make_gpu_plan(make_config("base", "data.batch_size=65536"), GPUS["t4"], Program.TRAIN)
    assert not plan.memory.fits and "may NOT fit" in plan.to_text() and "--batch_size" in plan.to_text()


def test_an_unknown_gpu_is_named():
    with pytest.raises(UserError, match="--device=gtx: no such GPU; known are h100, h200"):
        parse_device("gtx")
