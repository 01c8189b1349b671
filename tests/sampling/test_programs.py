"""Compiled stages: in one call or several, kept from one process to the next."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

import imagen_jax.cache as cache_module
from imagen_jax.cache import VARIABLE, cache_folder, load_program, save_program
from imagen_jax.errors import UserError
from imagen_jax.models.stage import StageNetwork
from imagen_jax.sampling import opened, tracing
from imagen_jax.sampling.inputs import StageInputs, to_pixels
from imagen_jax.sampling.model_folder import ModelFolder
from imagen_jax.sampling.programs import ProgramSpec, StageProgram, prepare
from imagen_jax.sampling.stage_sampler import StageSampler
from imagen_jax.sampling.tracing import lower

GENERATOR = np.random.default_rng(0)
INPUTS = StageInputs(
    seeds=np.array([3, 4], np.uint32),
    text=GENERATOR.standard_normal((2, 8, 16)).astype(np.float32),
    mask=np.arange(8) < np.array([[4], [6]]),
)


@pytest.fixture
def cache(tmp_path):
    return cache_folder(str(tmp_path / "cache"))


@pytest.fixture
def spec(stages):
    return ProgramSpec(stage=stages[0], sampling=stages[0].sampling, batch=2)


def run(program, params, *stops):
    state, first = program.empty_state(), 0
    for last in stops:
        state, first = program(params, program.place(INPUTS), state, first, last), last
    return np.asarray(state[1])


def test_parts_of_the_way_are_the_whole_way_bit_for_bit(spec, random_params, cache, monkeypatch):
    params = jax.device_put(random_params(spec.stage))
    made = prepare(spec, spec.file(cache))
    whole = run(made, params, 3)
    np.testing.assert_array_equal(run(made, params, 1, 2, 3), whole)
    # The program of the trainer's sample grids is another one, and draws the same.
    sampler = StageSampler(StageNetwork(spec.stage))
    pixels = sampler(params, seeds=INPUTS.seeds, text=INPUTS.text, mask=INPUTS.mask)
    np.testing.assert_allclose(pixels.astype(int), to_pixels(whole).astype(int), atol=1)
    # From the cache the network is neither built nor traced.
    monkeypatch.setattr(tracing, "trace", None)
    again = prepare(spec, spec.file(cache))
    np.testing.assert_array_equal(run(again, params, 3), whole)
    assert again.abstract_params.keys() == params.keys()


def test_a_program_is_found_by_all_that_decides_it(spec, stages, cache, monkeypatch):
    quicker = dataclasses.replace(spec.sampling, sampler=dataclasses.replace(spec.sampling.sampler, steps=2))
    network = dataclasses.replace(spec.stage.network, channels=(8,))
    others = [
        dataclasses.replace(spec, batch=3),
        dataclasses.replace(spec, negative=True),
        dataclasses.replace(spec, sampling=quicker),
        dataclasses.replace(spec, stage=dataclasses.replace(spec.stage, network=network)),
        ProgramSpec(stage=stages[1], sampling=spec.sampling, batch=2),
    ]
    keys = {each.file(cache).key for each in [spec, *others]}
    assert len(keys) == 6
    # What a stage says of its sampling by default has no say once settings are chosen.
    same = dataclasses.replace(spec, stage=dataclasses.replace(spec.stage, sampling=quicker))
    assert same.file(cache).key == spec.file(cache).key
    monkeypatch.setattr("imagen_jax.cache._code_hash", lambda: "changed")
    assert spec.file(cache).key not in keys


def test_a_damaged_program_is_none(cache):
    save_program(cache, "name", b"program")
    assert load_program(cache, "name") == b"program"
    path = cache / "programs" / "name"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert load_program(cache, "name") is None and load_program(cache, "other") is None
    assert [each.name for each in path.parent.iterdir()] == ["name"]


def test_a_program_under_another_name_is_none(cache):
    save_program(cache, "name", b"program")
    (cache / "programs" / "other").write_bytes((cache / "programs" / "name").read_bytes())
    assert load_program(cache, "other") is None


def test_programs_that_were_used_longest_ago_make_room(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_PROGRAMS", 3)
    folder = cache / "programs"
    (folder / "folder").mkdir()

    def save(name, size, age):
        save_program(cache, name, bytes(size))
        os.utime(folder / name, (time.time() - age,) * 2)

    def kept():
        return sorted(path.name for path in folder.iterdir() if path.is_file())

    for name, age in (("a", 400), ("b", 300), ("c", 200)):
        save(name, 10, age)
    assert load_program(cache, "a") == bytes(10)  # used now
    save("d", 10, 100)
    assert kept() == ["a", "c", "d"]
    monkeypatch.setattr(cache_module, "MAX_BYTES", 3 * 42 + 8)
    save("e", 50, 50)
    assert kept() == ["a", "e"] and load_program(cache, "e") == bytes(50)
    save_program(cache, "large", bytes(1000))
    assert kept() == ["a", "e"]  # what is too large by itself drives nothing out
    cache_module.remove_oldest(cache / "missing", most_bytes=0)


def test_memory_holds_the_programs_that_were_used_last(stages, cache, model_folder, monkeypatch):
    """Others are read or compiled again when they are wanted, also those that were read ahead for nothing."""
    prepared = []

    def program(spec, file):
        return StageProgram(spec, {}, print)

    monkeypatch.setattr(opened, "MAX_PROGRAMS", 2)
    monkeypatch.setattr(opened, "prepare", lambda *given: prepared.append(given[0].batch) or program(*given))
    monkeypatch.setattr(opened, "load_program", program)
    monkeypatch.setattr(opened, "program_file", lambda spec, cache: types.SimpleNamespace(note={}))
    monkeypatch.setattr(opened, "stored_params", lambda file: {})
    open_stages = opened.OpenStages(ModelFolder(model_folder), cache)
    monkeypatch.setattr(open_stages._folder, "params", lambda *_: {})
    specs = [ProgramSpec(stage=stages[0], sampling=stages[0].sampling, batch=i) for i in range(1, 40)]
    for number in (0, 1, 0, 2, 0, 1):
        open_stages.get(specs[number])
    assert prepared == [1, 2, 3, 2]
    for spec in specs:
        open_stages.ahead(spec)
    assert len(open_stages._programs) == len(open_stages._coming_programs) == 2
    open_stages.get(specs[-1])
    assert prepared == [1, 2, 3, 2]  # it was there, read ahead


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
counts = {"traced": 0, "compiled": 0}
names = {"jaxpr_trace_duration": "traced", "backend_compile_duration": "compiled"}
def count(event, *_, **__):
    name = names.get(event.rsplit("/", 1)[-1])
    if name is not None:
        counts[name] += 1
jax.monitoring.register_event_duration_secs_listener(count)
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
    for number, prompt in enumerate(("a red circle", "a blue square")):
        flags = ["sample", prompt, f"--model={model_folder}", f"--out={tmp_path / str(number)}"]
        done = subprocess.run(
            [sys.executable, "-c", CODE, *flags], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    assert counts[0]["traced"] >= 3 and counts[0]["compiled"] >= 3
    # The text encoder and both stages are run as they were compiled.
    assert counts[1] == {"traced": 0, "compiled": 0}
    assert not [path for path in model_folder.rglob("*") if "cache" in path.name]
