"""A whole cascade's plan: what it sums up, and which configs it is made of."""

import dataclasses

import pytest

from imagen_jax.errors import UserError
from imagen_jax.plan.cascade import CascadePlan, in_order, make_cascade_plan, model_configs
from imagen_jax.plan.chips import parse_topology
from imagen_jax.plan.compile import Program
from imagen_jax.plan.estimate import Estimate
from imagen_jax.plan.memory import Memory
from imagen_jax.plan.report import Plan
from imagen_jax.sampling.model_folder import ModelIndex, save_index, save_stage
from imagen_jax.sizes import Size


def estimate(seconds):
    return Estimate(
        seconds=seconds,
        compiler_s=seconds,
        kernel_s=0.0,
        unestimated_s=0.0,
        exposed_s=0.0,
        collectives=(),
        operations=(),
        unknown_loops=(),
    )


BASE = Plan(
    stage="base",
    program=Program.SAMPLE,
    topology=parse_topology("v5e:2x2"),
    mesh={"data": 4, "fsdp": 1, "tensor": 1},
    batch_size=32,
    params=1000,
    memory=Memory(params=1, optimizer=0, ema=0, batch=1, activations=5, program=0, available=10),
    forward_flops=10**12,
    calls_per_image=4,
    network_steps=2,
    estimate=estimate(0.5),
    compile_s=1.0,
    suggestions=(),
)
SECOND = dataclasses.replace(
    BASE,
    stage="sr",
    memory=dataclasses.replace(BASE.memory, params=3, activations=2),
    network_steps=4,
    estimate=estimate(1.5),
)


def test_seconds_and_device_seconds_of_a_picture():
    plan = CascadePlan(stages=(BASE, SECOND))
    assert plan.seconds == 2.0
    assert plan.device_seconds == 2.0 * 4 / 32  # chips, pictures
    assert plan.used == max(BASE.memory.used + 3, SECOND.memory.used + 1)
    text = plan.to_text()
    assert "2.000  s, 32 pictures" in text and "0.250  a picture" in text
    assert text.count("predicted network step") == 2
    assert "keeps one stage's weights" not in text
    assert plan.to_json()["predicted_batch_s"] == 2.0 and len(plan.to_json()["stages"]) == 2


def test_a_stage_that_does_not_fit_leaves_no_sum():
    plan = CascadePlan(stages=(BASE, dataclasses.replace(SECOND, estimate=None)))
    assert plan.seconds is None and plan.device_seconds is None
    assert "device-seconds" not in plan.to_text()


def test_sizes_are_those_of_the_cascade(make_config):
    configs = in_order([make_config("base"), make_config("sr")], Size(32, 64))
    base, sr = (config.stage for config in configs)
    assert configs[1].size == Size(32, 64)
    scale = sr.resolution // base.resolution
    assert configs[0].size == Size(32 // scale, 64 // scale)
    assert [config.size for config in in_order([make_config("base"), make_config("sr")])] == [
        base.size,
        sr.size,
    ]


def test_stages_in_a_wrong_order_are_refused(make_config):
    with pytest.raises(UserError, match="the first stage must be a base"):
        in_order([make_config("sr"), make_config("base")])


def test_batches_that_differ_are_refused(make_config):
    configs = [make_config("base", "data.batch_size=8"), make_config("sr", "data.batch_size=16")]
    with pytest.raises(UserError, match=r"--batch_size: needed.*8, 16"):
        make_cascade_plan(configs, parse_topology("v5e:2x2"))


def test_a_model_folder_s_stages(make_config, tmp_path):
    """Weights are not looked at: there are none."""
    stages = [make_config(name).stage for name in ("base", "sr")]
    for stage in stages:
        save_stage(tmp_path, stage, {})
    save_index(tmp_path, ModelIndex(stages=tuple(stage.name for stage in stages), text_encoder="somewhere"))
    configs = model_configs(str(tmp_path), ["--config.data.batch_size=3", "--config.mesh.data=1"])
    assert [config.stage for config in configs] == stages
    assert [config.stage.low_resolution is None for config in configs] == [True, False]
    assert all(config.data.batch_size == 3 and config.mesh.data == 1 for config in configs)
