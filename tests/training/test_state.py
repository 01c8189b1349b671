import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.training.config import Decay, OptimizerConfig
from imagen_jax.training.roles import DENOISER
from imagen_jax.training.run import Run
from imagen_jax.training.state import learning_rate, make_optimizer, state_bytes


@pytest.mark.parametrize("decay", list(Decay))
@pytest.mark.parametrize("warmup", [0, 10])
def test_learning_rate_follows_its_formula(decay, warmup):
    steps, peak = 100, 2e-3
    rate = learning_rate(OptimizerConfig(learning_rate=peak, warmup_steps=warmup, decay=decay), steps)
    for step in range(steps + 1):
        if step < warmup:
            expected = peak * step / warmup
        elif decay is Decay.CONSTANT:
            expected = peak
        elif decay is Decay.INVERSE_SQRT:
            expected = peak * math.sqrt(max(1, warmup) / max(1, warmup, step))
        else:
            expected = peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        np.testing.assert_allclose(float(rate(step)), expected, rtol=1e-5, atol=1e-9, err_msg=str(step))


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradients = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([4.0])}  # norm 5
    changes = {}
    for clip in (None, 2.5):
        config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, clip_norm=clip, eps=1.0, b1=0.0, b2=0.0)
        optimizer = make_optimizer(config, 10)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        changes[clip] = optax.apply_updates(params, updates)
    # Adam without averaging and with ε = 1: −g / (|g| + 1).
    np.testing.assert_allclose(np.asarray(changes[None]["a"])[0], -3 / 4, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(changes[2.5]["a"])[0], -1.5 / 2.5, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(changes[2.5]["b"])[0], -2 / 3, rtol=1e-5)


def test_a_fresh_state_is_what_its_abstract_form_says(make_config):
    config, mesh = make_config("base"), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    run = Run.of(config, mesh)
    state, abstract = run.init(), run.abstract
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(abstract)):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    assert int(state.step) == 0
    for name, value in state.params[DENOISER].items():
        assert np.array_equal(value, state.ema[DENOISER][name])
        assert value.dtype == jnp.float32
    assert state_bytes(state) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert state_bytes(abstract) == state_bytes(state)
