"""Weights stored in int8: what the library reads there, and what comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from imagen_jax.errors import UserError
from imagen_jax.models.weights import load_state, quantise_weights, save_state


@pytest.fixture
def state():
    random = np.random.default_rng(0)
    kernel = random.standard_normal((3, 3, 4, 8)) * np.geomspace(1e-3, 30, 8)
    kernel[..., 5] = 0.0
    tensors = {"kernel": kernel, "bias": random.standard_normal(8), "table": random.standard_normal((6, 2))}
    return {name: jnp.asarray(value, jnp.float32) for name, value in tensors.items()}


def test_the_library_finds_int8_values_and_their_scales(state, tmp_path):
    file = tmp_path / "model.safetensors"
    save_state(quantise_weights(state), file)
    stored = load_file(file)
    assert stored["kernel"].dtype == stored["table"].dtype == np.int8 and stored["bias"].dtype == np.float32
    restored = load_state(state, file)
    np.testing.assert_array_equal(restored["bias"], state["bias"])
    for name in ("kernel", "table"):
        by_hand = stored[name].astype(np.float32) * stored[f"{name}:int8_scale"]
        np.testing.assert_array_equal(restored[name], by_hand)
        axes = tuple(range(state[name].ndim - 1))
        largest = np.abs(np.asarray(state[name])).max(axis=axes)
        assert (np.abs(by_hand - state[name]).max(axis=axes) <= largest / 254 * 1.001).all()
        assert (np.abs(stored[name]).max(axis=axes) == np.where(largest > 0, 127, 0)).all()


def test_a_part_on_a_device_is_that_of_the_whole(state, tmp_path):
    file = tmp_path / "model.safetensors"
    save_state(quantise_weights(state), file)
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    split = {
        "kernel": NamedSharding(mesh, PartitionSpec(None, None, None, "fsdp")),
        "bias": NamedSharding(mesh, PartitionSpec()),
        "table": NamedSharding(mesh, PartitionSpec("fsdp")),
    }
    parts, whole = load_state(state, file, shardings=split), load_state(state, file)
    for name in state:
        assert parts[name].sharding == split[name]
        np.testing.assert_array_equal(parts[name], whole[name])


@pytest.mark.parametrize(
    "change",
    [
        {"kernel:int8_scale": np.ones(7, np.float32)},
        {"kernel:int8_scale": np.ones(8, np.float16)},
        {"kernel": np.ones((3, 3, 4, 8), np.float32)},
    ],
)
def test_scales_that_do_not_fit_are_refused(state, tmp_path, change):
    save_file(
        {**{n: np.asarray(t) for n, t in quantise_weights(state).items()}, **change},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(UserError, match="kernel:int8_scale is no scale of kernel"):
        load_state(state, tmp_path / "a.safetensors")


def test_int8_without_a_scale_is_refused(state, tmp_path):
    tensors = {name: np.asarray(value) for name, value in quantise_weights(state).items()}
    del tensors["table:int8_scale"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="table is int8"):
        load_state(state, tmp_path / "a.safetensors")
