"""Runs of several roles: their updates, averages and checkpoints, against what the roles ask for."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from imagen_jax.models.text_form import zero_text
from imagen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from imagen_jax.training import export as export_module
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.config import Decay, Optimizer, OptimizerConfig
from imagen_jax.training.keep import Keep
from imagen_jax.training.objectives import DiffusionObjective, Losses
from imagen_jax.training.roles import DENOISER, Role, Roles
from imagen_jax.training.run import Run
from imagen_jax.training.state import gradient_names
from imagen_jax.training.train_step import make_train_step, split_index

NULL = zero_text(6, 16)
SLOW = OptimizerConfig(
    kind=Optimizer.ADAM, learning_rate=1e-2, warmup_steps=0, decay=Decay.CONSTANT, clip_norm=None
)


class Line:
    """A critic of one weight and one offset."""

    def __init__(self):
        number = jax.ShapeDtypeStruct((), jnp.float32)
        self.abstract_params = {"offset": number, "weight": number}

    def init(self, key):
        return {"offset": jnp.zeros(()), "weight": jax.random.normal(key)}


class Offsets:
    """An adapter that adds a number to each bias of the last convolution."""

    def __init__(self, network):
        self.abstract_params = {"conv_out.bias": network.abstract_params["conv_out.bias"]}

    def init(self, key):
        return {name: jnp.zeros(leaf.shape) for name, leaf in self.abstract_params.items()}

    def adapted(self, base, adapter):
        return {**base, "conv_out.bias": base["conv_out.bias"] + adapter["conv_out.bias"]}


class WithCritic(DiffusionObjective):
    """Diffusion, and a critic that learns the mean of the pictures every other step."""

    def roles(self):
        return {**super().roles(), "critic": Role(network=Line(), optimizer=SLOW, every=2, averaged=False)}

    def losses(self, roles, params, batch, keys):
        means = batch["image"].astype(jnp.float32).mean(axis=(1, 2, 3)) / 255
        critic = jnp.square(params["critic"]["weight"] * means + params["critic"]["offset"] - 2.0)
        denoiser = super().losses(roles, params, batch, keys)
        return {**denoiser, "critic": Losses(critic, jnp.zeros_like(critic))}


class Adapted(DiffusionObjective):
    """The denoiser is frozen, and offsets of its output learn."""

    def roles(self):
        network = super().roles()[DENOISER].network
        adapter = Role(network=Offsets(network), optimizer=SLOW, adapts=DENOISER)
        return {DENOISER: Role(network=network), "offsets": adapter}


def batch_of(mesh):
    generator = np.random.default_rng(0)
    batch = {
        "image": generator.integers(0, 256, (8, 8, 8, 3), np.uint8),
        "text": generator.standard_normal((8, 6, 16)).astype(np.float32),
        "text_mask": np.arange(6) < generator.integers(1, 7, (8, 1)),
        "index": split_index(np.arange(8)),
    }
    return put_batch(batch, mesh)


@pytest.fixture
def run_of(make_config):
    """run_of(objective, overrides) → a run of it on one device, and on how many it is asked for."""

    def make(objective, *overrides, **mesh):
        count = int(np.prod(list(mesh.values()) or [1]))
        config = make_config("base", *overrides)
        return Run.of(config, make_mesh(MeshConfig(**mesh), jax.devices()[:count]), objective(config))

    return make


def host(tree):
    return jax.tree.map(np.array, tree)


@pytest.mark.parametrize("gather", ["block", "once"])
def test_a_second_network_has_its_optimizer_and_its_turn(run_of, gather):
    run = run_of(WithCritic, f"stage.network.gather={gather}", data=2, fsdp=2)
    plain = run_of(DiffusionObjective, f"stage.network.gather={gather}", data=2, fsdp=2)
    batch, step = batch_of(run.mesh), make_train_step(run)
    state = run.init()
    names, states = gradient_names(state), [host(state)]
    for _ in range(3):
        state, metrics = step(state, batch, NULL)
        states.append(host(state))
        assert len(names) == len(metrics["tensor_squares"])
        assert (float(metrics["grad_norm/critic"]) > 0) == (len(states) % 2 == 0)
    critics = [each.params["critic"] for each in states]
    # Adam's first step is the learning rate; the second step of the run is not the critic's.
    for name in ("weight", "offset"):
        assert abs(critics[1][name] - critics[0][name]) == pytest.approx(1e-2, rel=1e-3)
        assert critics[2][name] == critics[1][name] != critics[3][name]
    assert "critic" not in states[0].ema
    # The denoiser learns as it does alone.
    alone, single = plain.init(), make_train_step(plain)
    for _ in range(3):
        alone, _ = single(alone, batch, NULL)
    for name, value in alone.params[DENOISER].items():
        np.testing.assert_allclose(states[-1].params[DENOISER][name], value, atol=1e-5, err_msg=name)


def test_accumulated_gradients_are_those_of_the_whole_batch_for_every_role(run_of):
    ends = []
    for parts in (1, 4):
        run = run_of(WithCritic, f"train.accumulate={parts}", "optimizer.warmup_steps=0")
        ends.append(host(make_train_step(run)(run.init(), batch_of(run.mesh), NULL)[1]["tensor_squares"]))
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-3, atol=1e-9)


def test_an_adapter_learns_and_what_it_adapts_stays(run_of):
    run = run_of(Adapted)
    state, step, batch = run.init(), make_train_step(run), batch_of(run.mesh)
    before, losses = host(state), []
    for _ in range(4):
        state, metrics = step(state, batch, NULL)
        losses.append(float(metrics["loss"]))
    after = host(state)
    assert losses[-1] < losses[0]
    for name, value in before.params[DENOISER].items():
        np.testing.assert_array_equal(after.params[DENOISER][name], value)
    assert set(after.opt_state) == set(after.ema) == {"offsets"}
    # What is exported: the frozen weights with the average of what adapts them.
    bias = after.params[DENOISER]["conv_out.bias"] + after.ema["offsets"]["conv_out.bias"]
    np.testing.assert_allclose(run.average(state)["conv_out.bias"], bias, rtol=1e-6)
    assert np.abs(after.ema["offsets"]["conv_out.bias"]).max() > 0


@pytest.mark.parametrize("objective", [WithCritic, Adapted])
def test_roles_come_back_from_checkpoints(run_of, objective, tmp_path):
    run = run_of(objective)
    state = run.init()._replace(step=jnp.asarray(3, jnp.int32))
    with contextlib.closing(Checkpoints(tmp_path, keep=Keep())) as checkpoints:
        checkpoints.save(3, state, examples=24, config=run.config)
        checkpoints.wait()
        restored, examples, step = checkpoints.restore_newest(run.abstract)
    assert (examples, step) == (24, 3)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_exported_has_the_adapter_merged(run_of, tmp_path):
    run = run_of(Adapted)
    state = run.init()
    state.ema["offsets"] = jax.tree.map(lambda value: value + 0.5, state.ema["offsets"])
    with contextlib.closing(Checkpoints(tmp_path, keep=Keep())) as checkpoints:
        checkpoints.save(1, state, examples=8, config=run.config)
        checkpoints.wait()
    params = export_module._averaged(epath.Path(tmp_path), run.config, None, Adapted)
    assert params.keys() == run.network.abstract_params.keys()
    np.testing.assert_array_equal(params["conv_out.bias"], 0.5)
    np.testing.assert_array_equal(params["conv_in.kernel"], state.params[DENOISER]["conv_in.kernel"])


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"a": Role(network=Line())}, "a role must learn at every step; of a none does"),
        (
            {"a": Role(network=Line(), optimizer=SLOW), "b": Role(network=Line(), adapts="c")},
            "'b' adapts 'c'",
        ),
    ],
)
def test_roles_that_make_no_run_are_refused(roles, message):
    with pytest.raises(ValueError, match=message):
        Roles(roles)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Role(network=Line(), every=0)
