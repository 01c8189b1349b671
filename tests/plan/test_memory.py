import types

import jax
import numpy as np
import pytest

from imagen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from imagen_jax.plan.memory import Memory, account, bytes_per_device, out_of_memory_bytes, program_bytes
from imagen_jax.training.run import Run


@pytest.mark.parametrize("mesh_config", [{}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_bytes_are_those_that_lie_on_a_device(mesh_config, make_config):
    config = make_config("sr")
    mesh = make_mesh(MeshConfig(**mesh_config))
    run = Run.of(config, mesh)
    abstract, state = run.abstract, run.init()
    first = jax.devices()[0]
    lying = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == first
    )
    assert bytes_per_device(abstract) == bytes_per_device(state) == lying


def test_a_batch_is_shared_by_the_devices():
    batch = put_batch({"image": np.zeros((16, 4, 4, 3), np.uint8)}, make_mesh(MeshConfig()))
    assert bytes_per_device(batch) == 2 * 4 * 4 * 3


def test_the_parts_of_a_training_program_add_up(make_config):
    config = make_config("base")
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    state = Run.of(config, mesh).abstract
    batch = put_batch({"image": np.zeros((8, 8, 8, 3), np.uint8)}, mesh)
    one = 8 * 8 * 3
    total = bytes_per_device(state) + one + 1000 + 50
    memory = account(state, batch, total=total, program=50, prefetched=True, available=total + one)
    assert memory.params == memory.ema
    # Adam keeps two numbers a parameter, and counts its steps.
    assert 2 * memory.params < memory.optimizer < 2 * memory.params + 64
    # Of the state, the step's number (4 bytes) is none of its parts: it is left with what is temporary.
    assert (memory.batch, memory.activations, memory.program) == (2 * one, 1000 + 4, 50)
    assert memory.used == total + one
    assert memory.fits
    tight = account(state, batch, total=total, program=50, prefetched=True, available=memory.used - 1)
    assert not tight.fits and tight.left == -1


def test_donated_results_count_once():
    stats = types.SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=90,
        alias_size_in_bytes=80,
        temp_size_in_bytes=50,
        generated_code_size_in_bytes=5,
    )
    assert program_bytes(stats) == 100 + 10 + 50 + 5


@pytest.mark.parametrize(
    "message, size",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
            "HLO temporaries (51.69G) exceeds available HBM (15.75G). HLO module: jit_step.",
            int(51.69 * 2**30),
        ),
        ("(960.50M) exceeds available HBM (1.00G)", int(960.5 * 2**20)),
        ("INTERNAL: something else (51.69G)", None),
    ],
)
def test_what_a_refused_program_would_need(message, size):
    assert out_of_memory_bytes(message) == size


def test_left_is_what_is_not_used():
    memory = Memory(params=1, optimizer=2, ema=3, batch=4, activations=5, program=6, available=25)
    assert (memory.used, memory.left, memory.fits) == (21, 4, True)
