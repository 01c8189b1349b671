"""Compiled programs in files: run as jitted functions are, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import imagen_jax.cache as cache_module
from imagen_jax.cache import cache_folder, enable_compilation_cache
from imagen_jax.executables import Program, ProgramFile

SHAPE = (4, 6)


@pytest.fixture
def folder(tmp_path):
    return cache_folder(str(tmp_path / "cache"))


def function(params, x, number):
    return {"sum": x + number * params["b"], "product": x @ params["a"]}


def arguments():
    generator = np.random.default_rng(0)
    a, x = generator.standard_normal((2, 6, 6)).astype(np.float32)
    return {"b": generator.standard_normal(6).astype(np.float32), "a": a}, x[:4], np.int32(3)


def expected():
    params, x, number = arguments()
    return {"sum": x + number * params["b"], "product": x @ params["a"]}


def single(folder, description="single"):
    device = jax.local_devices()[0]
    result = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=SingleDeviceSharding(device))
    results = {"sum": result, "product": result}
    return ProgramFile(folder=folder, description=description, devices=(device,), results=results)


def compiled(file, traced=function, **options):
    lowered = jax.jit(traced, keep_unused=True, **options).lower(*arguments())
    return file.make(lowered.compile, arguments(), {"width": 6})


def check(program):
    made = program(*arguments())
    for name, value in expected().items():
        np.testing.assert_allclose(made[name], value, rtol=1e-5)
    return made


def test_what_was_kept_is_what_runs(folder):
    assert single(folder).load() is None and single(folder).note is None
    first = compiled(single(folder))
    assert isinstance(first, Program)
    found = single(folder)
    assert found.note == {"width": 6}
    jax.tree.map(np.testing.assert_array_equal, check(found.load()), check(first))
    assert single(folder, "another").load() is None


def test_over_several_devices(folder):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[4:])
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    result = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=rows)

    def file():
        devices = tuple(mesh.devices.flat)
        results = {"sum": result, "product": result}
        return ProgramFile(folder=folder, description="mesh", devices=devices, results=results)

    places = ({"a": whole, "b": whole}, rows, whole)
    compiled(file(), in_shardings=places, out_shardings=rows)
    params, x, number = arguments()
    made = file().load()(jax.device_put(params, whole), jax.device_put(x, rows), number)
    for name, value in expected().items():
        np.testing.assert_allclose(made[name], value, rtol=1e-5)
        assert made[name].sharding == rows and len(made[name].addressable_shards) == 4


def test_arguments_that_are_given_away_are_used_up(folder):
    compiled(single(folder), donate_argnums=1)
    params, x, number = jax.device_put(arguments())
    made = single(folder).load()(params, x, number)
    np.testing.assert_allclose(made["sum"], expected()["sum"], rtol=1e-5)
    assert x.is_deleted() and not params["a"].is_deleted()


def test_unused_arguments_are_passed_all_the_same(folder):
    def without_number(params, x, number):
        return {"sum": x + params["b"], "product": x @ params["a"]}

    compiled(single(folder), without_number)
    made = single(folder).load()(*arguments())
    np.testing.assert_allclose(made["sum"], arguments()[1] + arguments()[0]["b"], rtol=1e-5)


def test_what_takes_other_arguments_is_not_kept(folder):
    # Without keep_unused JAX leaves the number out.
    lowered = jax.jit(lambda params, x, number: x + params["b"]).lower(*arguments())
    program = lowered.compile()
    assert single(folder).make(lambda: program, arguments(), None) is program
    assert single(folder).load() is None


def test_what_cannot_be_loaded_is_none(folder, monkeypatch):
    file = single(folder)
    cache_module.save_program(folder, file.key, (4).to_bytes(8, "little") + b"null" + b"no executable")
    assert single(folder).load() is None
    compiled(single(folder))
    assert single(folder).load() is not None
    others = {"_processor": lambda: "another", "_code_hash": lambda: "changed", "_topology": lambda _: 7}
    for name, other in others.items():
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, name, other)
            assert single(folder).load() is None
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        assert single(folder).load() is None


def test_what_jax_took_from_its_own_cache_is_compiled_anew(folder, tmp_path):
    """JAX loads such a program whole, but could not write it again: what a later process loaded would fail to run."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    enable_compilation_cache(folder)
    try:
        for number in range(2):
            # A function of its own each time: JAX remembers executables within a process, too.
            def again(params, x, number):
                return function(params, x, number)

            jax.jit(again, keep_unused=True).lower(*arguments()).compile()
            assert len(list((folder / "xla").glob("*again*-cache"))) == 1
            jax.clear_caches()
            compiled(single(folder, number), again)
            jax.clear_caches()
            check(single(folder, number).load())
            # For other programs JAX's cache goes on.
            jax.jit(lambda x, n=number: x * n + 3).lower(np.ones(5)).compile()
            assert len(list((folder / "xla").glob("*lambda*-cache"))) == number + 1
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def test_a_full_disk_is_no_error(folder, monkeypatch):
    def refuse(*_, **__):
        raise cache_module.UserError("no space left on device")

    monkeypatch.setattr("imagen_jax.executables.save_program", refuse)
    check(compiled(single(folder)))
    assert single(folder).load() is None
