"""Against the TPU compiler itself, in other processes: it may be loaded once in each, before JAX."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from imagen_jax.plan.chips import CHIPS, parse_topology

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install imagen_jax[plan]"
)
SIDE = 4096


@pytest.fixture(scope="module")
def small(subprocess_env):
    """What is predicted of the programs of compile_small.py."""
    script = Path(__file__).with_name("compile_small.py")
    done = subprocess.run([sys.executable, script], env=subprocess_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_large_product_is_predicted_near_the_peak(name, small):
    """No faster than the published peak; a clock that is wrong by a fifth would show."""
    chip = CHIPS[parse_topology(name).chip.name]
    estimated = small[name]["seconds"] / chip.scheduled_share
    assert 0.8 < 2 * SIDE**3 / (estimated * chip.peak_flops) <= 1.0


def test_a_scan_counts_as_often_as_it_runs(small):
    seven, fourteen = (small[name]["seconds"] for name in ("scan7", "scan14"))
    assert fourteen == pytest.approx(2 * seven, rel=0.05)
    assert seven > 7 * small["v5e:2x2"]["seconds"]  # it takes a tanh of each product besides
    assert small["scan7"]["unknown_loops"] == []


def test_a_kernel_is_found_with_its_own_estimate(small):
    expected = 4 * SIDE**2 / (0.6 * CHIPS["v5e"].hbm_bandwidth)
    assert small["kernel"]["kernel_s"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "float32"])
def test_the_attention_kernels_compile_with_all_the_keys_that_they_take(name, small):
    assert small["attention"][name] >= 1


def test_partial_sums_are_exchanged(small):
    """Whatever collective it chooses, each of 4 chips receives at least its part of the others' sums."""
    received = sum(size for _, chips, size in small["split"]["collectives"] if chips == 4)
    result = 2 * SIDE**2  # bfloat16
    assert received in (
        2 * result * 3 // 4,
        4 * result * 3 // 4,
    )  # reduced and gathered, in bfloat16 or float32


def test_pictures_of_a_small_batch_are_left_whole_when_sampling(small):
    assert small["whole"]["seconds"] < 0.7 * small["strips"]["seconds"]


def test_pictures_are_drawn_with_the_attention_kernel(small):
    """On a slice, unless the stage's config forbids it; never in its interpreted form, which is no kernel."""
    assert small["sampled"] == {"auto": True, "xla": False, "flash": True}


def test_a_compiler_without_the_options_for_sampling_still_compiles(small):
    assert small["unknown option"]["seconds"] == small["v5e:2x2"]["seconds"]


def test_statistics_of_a_convolution_cost_nothing(small):
    assert small["with sums"]["seconds"] < 1.1 * small["without sums"]["seconds"]


def test_other_sums_are_made_on_the_matrix_unit(small):
    assert small["summed"]["seconds"] < 0.5 * small["plainly summed"]["seconds"]


def test_the_gradient_of_a_doubled_picture_s_convolution_does_not_see_it_doubled(small):
    assert small["doubled"]["seconds"] < 0.6 * small["plainly doubled"]["seconds"]


def test_a_gradient_is_cut_where_it_is_summed(small):
    """Each of 4 chips receives three others' parts of its own quarter, in bfloat16."""
    quarter = 2 * 3 * 3 * 128 * 128 // 4
    assert small["cut"]["collectives"] == [["reduce-scatter", 4, 3 * quarter]]


def test_a_mesh_may_be_of_other_sides_than_the_slice(small):
    assert small["mesh"] == 32


def test_the_memory_of_an_operation_may_be_limited(small):
    assert small["small operations"]["seconds"] != small["with sums"]["seconds"]


def test_operations_name_their_line(small):
    assert any("compile_small.py:" in source for source in small["v5e:2x2"]["sources"])


def test_plan_from_the_command_line(config_file, subprocess_env, tmp_path):
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "imagen_jax", "plan", f"--config={config_file}:sr", "--topology=v5e:2x2"]
    env = {name: value for name, value in subprocess_env().items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [*command, "--batch_size=4", f"--json={out}", "--config.stage.network.dtype=bfloat16"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(out.read_text())
    assert plan["fits"] is True and f"{plan['params']:,}" in done.stdout
    assert plan["hbm_used_bytes"] + plan["hbm_left_bytes"] == plan["hbm_bytes"] <= 16 * 2**30
    assert plan["hbm_used_bytes"] == sum(plan["memory_bytes"].values())
    flops = 3 * plan["model_flops_per_image"]  # one picture on every one of four chips
    assert plan["predicted_mfu"] == pytest.approx(flops / (plan["predicted_step_s"] * 197e12))
    # Adam: the all-reduce of the gradients of all parameters, over four chips, in at most float32: 3/4 of them twice.
    received = sum(each["received_bytes"] for each in plan["predicted_run_s"]["collectives"])
    assert 0.9 * 1.5 * 2 * plan["params"] < received < 1.1 * 1.5 * 4 * plan["params"]
    assert "prediction" in done.stdout and len(plan["predicted_run_s"]["operations"]) == 10
    assert "compiling sr for 4 chips" in done.stderr


def test_a_slice_that_there_is_not(config_file, subprocess_env):
    command = [sys.executable, "-m", "imagen_jax", "plan", f"--config={config_file}:sr", "--topology=v5e:3x5"]
    done = subprocess.run(command, env=subprocess_env(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "--topology=v5e:3x5" in done.stderr and "Traceback" not in done.stderr


def test_slices_hold_whole_copies_of_a_model(small):
    """The first axis of the mesh, along which slices lie, has the same weights at each of its places."""
    assert small["slices of the mesh"] == [[0], [0], [1], [1]]
    assert small["undivided"] == "config.mesh.data=1: must be a multiple of the 2 slices"


def test_a_gradient_crosses_over_to_another_slice_once(small):
    """Each chip sends the part of the sum that is its share of all the slice's chips."""
    between = [each for each in small["slices"]["collectives"] if each[0] == "between slices"]
    assert len(between) == 1
    (_, slices, received) = between[0]
    assert slices == 2
    assert received in (2 * SIDE**2 // 16, 2 * SIDE**2 // 8)
