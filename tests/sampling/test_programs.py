"""Compiled stages: in one call or several, kept from one process to the next."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.cache import VARIABLE, cache_folder, remove_oldest
from imagen_jax.diffusion.loop import image_noise, sample
from imagen_jax.diffusion.process import diffuse
from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.diffusion.schedules import CosineSchedule
from imagen_jax.errors import UserError
from imagen_jax.models.stage import StageNetwork
from imagen_jax.sampling import opened
from imagen_jax.sampling.inputs import StageInputs, to_pixels
from imagen_jax.sampling.model_folder import ModelFolder
from imagen_jax.sampling.programs import HookShapes, ProgramSpec, StageProgram, lower, prepare
from imagen_jax.sampling.stage_sampler import StageSampler

GENERATOR = np.random.default_rng(0)
INPUTS = StageInputs(
    seeds=np.array([3, 4], np.uint32),
    text=GENERATOR.standard_normal((2, 8, 16)).astype(np.float32),
    mask=np.arange(8) < np.array([[4], [6]]),
    negative_text=np.zeros((2, 8, 16), np.float32),
    negative_mask=np.arange(8) < np.array([[1], [1]]),
)


@pytest.fixture
def spec(stages):
    return ProgramSpec(stage=stages[0], sampling=stages[0].sampling, batch=2, negative=True)


def run(program, params, *stops, inputs=INPUTS):
    state, first = program.empty_state(), 0
    for last in stops:
        state, first = program(params, program.place(inputs), state, first, last), last
    return np.asarray(state.x0)


def test_parts_of_the_way_are_the_whole_way_bit_for_bit(spec, random_params):
    params = jax.device_put(random_params(spec.stage))
    program = prepare(spec)
    whole = run(program, params, 3)
    np.testing.assert_array_equal(run(program, params, 1, 2, 3), whole)
    # The program of the trainer's sample grids is another one, and draws the same.
    sampler = StageSampler(StageNetwork(spec.stage))
    negative = INPUTS.negative_text, INPUTS.negative_mask
    pixels = sampler(params, seeds=INPUTS.seeds, text=INPUTS.text, mask=INPUTS.mask, negative=negative)
    np.testing.assert_allclose(pixels.astype(int), to_pixels(whole).astype(int), atol=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pinned:
    """Pixels that are known: noised as x_t before each call, and x̂0's own afterwards."""

    known: jax.Array  # (batch, side, side, channels), in [−1, 1]
    mask: jax.Array  # (batch, side, side, 1), 1 where known

    def before_call(self, x_t, moment):
        noised = diffuse(
            self.known, image_noise(moment.keys, 0, x_t.shape[1:]), jnp.broadcast_to(moment.log_snr, len(x_t))
        )
        return jnp.where(self.mask > 0, noised, x_t)

    def after_x0(self, x0, moment):
        return jnp.where(self.mask > 0, self.known, x0)


@pytest.mark.parametrize("kind", [Sampler.DDPM, Sampler.DPMPP_3M])
def test_hooks_go_through_the_program_and_its_parts(spec, random_params, kind):
    params = jax.device_put(random_params(spec.stage))
    known = np.full((2, 8, 8, 3), 0.5, np.float32)
    mask = np.zeros((2, 8, 8, 1), np.float32)
    mask[:, :, :4] = 1
    hook = Pinned(known, mask)
    sampling = dataclasses.replace(spec.sampling, sampler=SamplerConfig(kind=kind, steps=5))
    program = prepare(dataclasses.replace(spec, sampling=sampling, hooks=HookShapes.of([hook])))
    inputs = INPUTS._replace(hooks=(hook,))
    whole = run(program, params, 5, inputs=inputs)
    np.testing.assert_array_equal(whole[:, :, :4], 0.5)
    assert np.abs(whole[:, :, 4:] - 0.5).min() > 0
    np.testing.assert_array_equal(run(program, params, 1, 2, 4, 5, inputs=inputs), whole)
    # Another picture of the batch has no say, what is known has.
    other = dataclasses.replace(hook, known=np.concatenate([known[:1], -known[1:]]))
    changed = run(program, params, 5, inputs=inputs._replace(hooks=(other,)))
    np.testing.assert_allclose(changed[0], whole[0], atol=1e-5)
    assert np.abs(changed[1, :, 4:] - whole[1, :, 4:]).max() > 1e-3


def test_a_hook_at_each_moment_has_random_numbers_of_its_own():
    """Noise of two hooks at four calls: sixteen unit Gaussians that know nothing of each other."""
    drawn = []

    class Watch:
        def before_call(self, x_t, moment):
            noise = image_noise(moment.keys, 0, (4096,))
            jax.debug.callback(
                lambda *each: drawn.append([np.asarray(a) for a in each]), noise, moment.log_snr
            )
            return x_t

        def after_x0(self, x0, moment):
            return x0

    keys = jax.vmap(jax.random.key)(jnp.arange(2, dtype=jnp.uint32))
    config = SamplerConfig(steps=4)
    sample(
        lambda x_t, *_: 0.1 * x_t,
        keys=keys,
        shape=(3,),
        schedule=CosineSchedule(),
        config=config,
        hooks=(Watch(), Watch()),
    )
    jax.effects_barrier()
    assert len(drawn) == 8
    np.testing.assert_allclose(
        sorted({float(level) for _, level in drawn}), config.log_snrs(CosineSchedule()), rtol=1e-5
    )
    noise = np.concatenate([each for each, _ in drawn])
    correlation = np.corrcoef(noise)
    assert np.abs(correlation - np.eye(16)).max() < 5 / np.sqrt(4096)


def test_files_that_were_used_longest_ago_make_room(tmp_path):
    folder = tmp_path / "xla"
    (folder / "folder").mkdir(parents=True)
    for name, size, age in (("a", 10, 400), ("b", 30, 300), ("c", 20, 200), ("d", 1000, 100)):
        (folder / name).write_bytes(bytes(size))
        os.utime(folder / name, (time.time() - age,) * 2)
    os.utime(folder / "a")  # used now
    remove_oldest(folder, most_bytes=45)
    # What is too large by itself drives nothing out.
    assert sorted(path.name for path in folder.iterdir()) == ["a", "c", "folder"]
    remove_oldest(tmp_path / "missing", most_bytes=0)


def test_memory_holds_the_programs_that_were_used_last(stages, model_folder, monkeypatch, tmp_path):
    prepared = []
    monkeypatch.setattr(opened, "MAX_PROGRAMS", 2)
    monkeypatch.setattr(
        opened, "prepare", lambda spec: prepared.append(spec.batch) or StageProgram(spec, {}, print)
    )
    monkeypatch.setattr("imagen_jax.cache.MAX_BYTES", 10)
    (tmp_path / "xla").mkdir()
    (tmp_path / "xla" / "old").write_bytes(bytes(20))
    open_stages = opened.OpenStages(ModelFolder(model_folder), tmp_path)
    monkeypatch.setattr(open_stages._folder, "params", lambda *_: {})
    specs = [ProgramSpec(stage=stages[0], sampling=stages[0].sampling, batch=i) for i in range(1, 40)]
    for number in (0, 1, 0, 2, 0, 1):
        open_stages.get(specs[number])
    assert prepared == [1, 2, 3, 2]
    assert len(open_stages._programs) == 2
    assert not list((tmp_path / "xla").iterdir())  # the folder stays within its bounds, too


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "off")
    assert cache_folder() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "asked"))
    assert cache_folder() == tmp_path / "asked" and cache_folder("off") is None
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "imagen_jax"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cache folder {tmp_path / 'file' / 'below'}"):
        cache_folder(str(tmp_path / "file" / "below"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder() is None  # nobody asked for this one: sampling goes on without it


def test_the_compiler_knows_the_number_of_calls_of_a_plan(spec):
    text = lower(spec).compile().as_text()
    assert 'known_trip_count":{"n":"3"}' in text.replace(" ", "")


CODE = """
import json, sys
import jax
from imagen_jax.cli.main import main
counts = {"hits": 0, "misses": 0}
def count(event, **__):
    if event.startswith("/jax/compilation_cache/cache_"):
        counts[event.rsplit("_", 1)[-1]] += 1
jax.monitoring.register_event_listener(count)
code = main(sys.argv[1:])
print(json.dumps(counts))
sys.exit(code)
"""


def test_a_second_process_compiles_nothing(model_folder, tmp_path, subprocess_env):
    """Another prompt of the same shape: every program comes from the cache as the compiler made it."""
    counts = []
    environment = {
        **subprocess_env(),
        VARIABLE: str(tmp_path / "cache"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    for number, prompt in enumerate(("a red circle", "a blue square")):
        flags = ["sample", prompt, f"--model={model_folder}", f"--out={tmp_path / str(number)}"]
        done = subprocess.run(
            [sys.executable, "-c", CODE, *flags], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    assert counts[0]["misses"] >= 3
    # The text encoder and both stages, and whatever else there was.
    assert counts[1]["misses"] == 0 and counts[1]["hits"] >= 3
    assert not [path for path in model_folder.rglob("*") if "cache" in path.name]
