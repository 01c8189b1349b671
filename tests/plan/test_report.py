import dataclasses
import json
import re

import jax
import pytest

from imagen_jax.errors import UserError
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.plan import compile as compile_module
from imagen_jax.plan import report
from imagen_jax.plan.chips import Topology, parse_topology
from imagen_jax.plan.compile import Compiled, Program, compile_stage, training_batch
from imagen_jax.plan.estimate import CollectiveTotal, Estimate, Origin
from imagen_jax.plan.memory import Memory, account, bytes_per_device
from imagen_jax.plan.network import Collective
from imagen_jax.plan.report import Plan, to_json, to_text
from imagen_jax.plan.suggest import suggestions
from imagen_jax.training.batches import device_batch, training_batches
from imagen_jax.training.config import load_config
from imagen_jax.training.run import Run

ESTIMATE = Estimate(
    seconds=0.5,
    compiler_s=0.3,
    kernel_s=0.15,
    unestimated_s=0.0,
    exposed_s=0.05,
    collectives=(
        CollectiveTotal(kind=Collective.ALL_REDUCE, chips=4, count=2, received_bytes=3_000_000, seconds=0.07),
    ),
    operations=tuple(
        (Origin(f"imagen_jax/models/layers.py:{line}", "mul"), 0.5 / line) for line in range(2, 20)
    ),
    unknown_loops=(),
)
MEMORY = Memory(params=1, optimizer=2, ema=1, batch=1, activations=3, program=0, available=10)
PLAN = Plan(
    stage="base",
    program=Program.TRAIN,
    topology=parse_topology("v5e:2x2"),
    mesh={"data": 4, "fsdp": 1, "tensor": 1},
    batch_size=32,
    params=1_234_567,
    memory=MEMORY,
    forward_flops=10**12,
    calls_per_image=3,
    network_steps=1,
    estimate=ESTIMATE,
    compile_s=1.0,
    suggestions=(),
)


@pytest.mark.parametrize(("share", "warned"), [(0.19, False), (0.21, True)])
def test_kernels_are_warned_of_above_a_fifth_of_the_time(share, warned):
    estimate = dataclasses.replace(ESTIMATE, kernel_s=share * ESTIMATE.seconds)
    lines = dataclasses.replace(PLAN, estimate=estimate).warnings
    assert any("hand-written kernels" in line for line in lines) is warned


def test_a_program_that_train_does_not_run_says_so():
    assert (
        dataclasses.replace(PLAN, operation_kib=8192)
        .warnings[-1]
        .startswith("operations were kept to 8192 KiB")
    )


@pytest.fixture(autouse=True)
def _versions(monkeypatch):
    """The report names libtpu's version; these tests do without it."""
    monkeypatch.setattr(report.importlib.metadata, "version", lambda name: "1")


def test_mfu_is_three_forward_passes_over_the_peak():
    # 8 pictures a chip, 3 TFLOP each, in half a second, of 197 TFLOP/s.
    assert to_json(PLAN)["predicted_mfu"] == pytest.approx(8 * 3 / (0.5 * 197))


def test_sampling_counts_its_network_calls_and_guidance():
    plan = dataclasses.replace(PLAN, program=Program.SAMPLE, calls_per_image=2 * 20, network_steps=20)
    made = to_json(plan)
    assert made["predicted_step_s"] == pytest.approx(0.5 / 20)
    assert made["predicted_mfu"] == pytest.approx(8 * 40 / (0.5 * 197))
    assert made["predicted_images_per_s"] == pytest.approx(64)


def test_json_has_what_programs_read():
    made = json.loads(json.dumps(to_json(PLAN)))
    names = (
        "params fits hbm_used_bytes hbm_bytes model_flops_per_image predicted_step_s predicted_mfu compile_s"
    )
    assert set(names.split()) <= set(made)
    assert made["fits"] is True and made["hbm_used_bytes"] == 8
    assert len(made["predicted_run_s"]["operations"]) == 10
    assert made["predicted_run_s"]["operations"][0]["share"] == pytest.approx(0.5)


def test_text_calls_times_predictions_and_warns_of_kernels():
    text = to_text(PLAN)
    assert "1,234,567" in text and "it fits" in text and "all-reduce" in text
    assert re.search(r"predicted training step +500.00 +ms", text)
    assert "30% of the time is hand-written kernels" in text


def test_a_refused_program_has_memory_and_no_times():
    memory = dataclasses.replace(MEMORY, available=4)
    plan = dataclasses.replace(PLAN, memory=memory, estimate=None, suggestions=("--batch_size=4: fits",))
    made = to_json(plan)
    assert made["fits"] is False and made["hbm_left_bytes"] == -4
    assert made["predicted_step_s"] is None and made["predicted_mfu"] is None
    text = to_text(plan)
    assert "does NOT fit" in text and "--batch_size=4" in text and "predicted" not in text.split("\n", 2)[2]


@pytest.mark.parametrize("size", [None, (16, 32)])
@pytest.mark.parametrize("variant", ["base", "sr"])
def test_planned_batch_is_the_one_that_training_reads(variant, size, make_config):
    config = make_config(variant, f"data.size={size}")
    mesh = make_mesh(MeshConfig())
    with training_batches(config, None, 0) as batches:
        real = device_batch(next(batches), mesh)
    planned = training_batch(config, mesh)
    assert set(planned) == set(real)
    for name, shape in planned.items():
        assert (shape.shape, shape.dtype) == (real[name].shape, real[name].dtype), name
        assert shape.sharding.is_equivalent_to(real[name].sharding, len(shape.shape)), name


@pytest.fixture
def refused(make_config):
    """refused(activations, available, per_chip) → arguments of `suggestions` for a step on 8 chips."""

    def make(activations, available, per_chip=4):
        config = make_config("base", f"data.batch_size={8 * per_chip}")
        mesh = make_mesh(MeshConfig())
        run = Run.of(config, mesh)
        state = run.abstract
        batch = training_batch(config, mesh)
        total = bytes_per_device((state, batch)) + activations
        memory = account(state, batch, total=total, program=0, prefetched=False, available=available)
        assert not memory.fits
        compiled = Compiled(
            mesh=mesh,
            network=run.network,
            state=state,
            batch=batch,
            program=None,
            needed_bytes=total,
            seconds=1.0,
        )
        chip = dataclasses.replace(parse_topology("v5e:2x4").chip, hbm_bytes=available)
        return config, Topology(chip=chip, sizes=(2, 4)), compiled, Program.TRAIN, memory

    return make


def test_large_activations_ask_for_a_smaller_batch(refused):
    arguments = refused(activations=40_000_000, available=25_000_000)
    lines = suggestions(*arguments)
    (line,) = [line for line in lines if line.startswith("--batch_size=")]
    size = int(re.match(r"--batch_size=(\d+):", line).group(1))
    # Half the pictures have half the activations; three of four would still be too much.
    assert size == 2 * 8
    assert any("remat=products" in line for line in lines)
    assert not any("fsdp" in line for line in lines)  # the state is small


def test_a_large_state_asks_for_more_fsdp(refused):
    probe = refused(activations=4_000_000, available=1000)
    state = bytes_per_device(probe[2].state)
    arguments = refused(activations=4_000_000, available=int(0.7 * state) + 4_000_000)
    (line,) = [line for line in suggestions(*arguments) if "--config.mesh.fsdp=" in line]
    fsdp, data = map(int, re.match(r"--config.mesh.fsdp=(\d+) --config.mesh.data=(\d+)", line).groups())
    assert fsdp * data == len(jax.devices()) and fsdp > 1
    config, topology, *_ = arguments
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
    assert bytes_per_device(Run.of(config, mesh).abstract) < topology.chip.hbm_bytes


def test_chips_with_enough_memory_are_named(refused):
    lines = suggestions(*refused(activations=20 * 2**30, available=int(15.75 * 2**30), per_chip=1))
    assert [line[:14] for line in lines if "--topology" in line] == [
        "--topology=v4:",
        "--topology=v6e",
        "--topology=v5p",
    ]


@pytest.mark.parametrize("program", list(Program))
def test_stages_whose_null_text_is_a_caption_are_traced(program, monkeypatch):
    monkeypatch.setattr(compile_module, "_compile", lambda lowered, *_: (None, len(lowered.as_text())))
    config = load_config("deepfloyd/stage1.py:tiny", ["--config.data.batch_size=8"])
    assert config.stage.padded_text
    compiled = compile_stage(config, jax.devices(), program, progress=False)
    assert compiled.needed_bytes > 1000


def test_rows_are_split_over_the_copies(make_config):
    config = make_config("sr", "mesh.data=8", "mesh.fsdp=1", "data.batch_size=2")
    compiled = compile_stage(config, jax.devices(), Program.SAMPLE, rows=4)
    assert dict(compiled.mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 1, "rows": 4}
    pictures = jax.tree.leaves(compiled.program.output_shardings)[0]
    assert pictures.shard_shape((2, 16, 16, 3)) == (1, 4, 16, 3)


def test_rows_are_for_sampling_and_divide_the_copies(make_config):
    config = make_config("sr", "mesh.data=8", "mesh.fsdp=1")
    with pytest.raises(UserError, match=r"--rows=4.*--program=sample"):
        compile_stage(config, jax.devices(), Program.TRAIN, rows=4)
    with pytest.raises(UserError, match="over 3 devices"):
        compile_stage(config, jax.devices(), Program.SAMPLE, rows=3)
