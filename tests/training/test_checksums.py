"""Checkpoints know their own content: whichever bit of their files changes, only what was saved comes back."""

import collections
import contextlib
import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from imagen_jax.errors import UserError
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.checksums import add_checksums, begin_checksums, device_checksum
from imagen_jax.training.config import load_config
from imagen_jax.training.keep import Keep
from imagen_jax.training.state import TrainState


def state_of(seed):
    generator = np.random.default_rng(seed)
    params = {
        "kernel": jnp.asarray(generator.standard_normal((48, 32)), jnp.float32),
        "bias": jnp.asarray(generator.standard_normal(7), jnp.bfloat16),
        "fresh": jnp.zeros((16, 8)),
    }
    ema = {name: value + 1 for name, value in params.items()}
    moments = {"mu": params["kernel"] * 0.5, "count": jnp.asarray(seed, jnp.int32)}
    return TrainState(jnp.asarray(seed, jnp.int32), {"d": params}, {"d": ema}, {"d": moments})


def abstract(state, shardings=None):
    shardings = shardings or jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings
    )


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(autouse=True)
def little_garbage():
    """Reading a checkpoint collects garbage: it need not go through what all other tests have left."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def config():
    return load_config("shapes/base16.py")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, config):
    """A work directory with checkpoints of steps 3 and 5, the best remembered."""
    workdir = tmp_path_factory.mktemp("saved")
    with contextlib.closing(Checkpoints(workdir, keep=Keep(best=1))) as checkpoints:
        for step in (3, 5):
            checkpoints.save(step, state_of(step), examples=step * 8, config=config, metric=float(step))
            checkpoints.wait()
    return workdir


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# All of them by: pytest -m kill tests/training/test_checksums.py
@pytest.mark.parametrize("flips", [24, pytest.param(200, marks=pytest.mark.kill)])
def test_a_flipped_bit_is_harmless_or_noticed(saved, tmp_path, capfd, flips):
    """Bits of all files in turn; the checkpoint is restored equal or set aside, and the one before is taken."""
    generator, outcomes = np.random.default_rng(0), collections.Counter()
    names = sorted(p.relative_to(saved) for p in (saved / "checkpoints" / "5").rglob("*") if p.is_file())
    workdir = tmp_path / "run"
    for number in range(flips):
        shutil.copytree(saved, workdir)
        path = workdir / names[number % len(names)]
        bit = int(generator.integers(8 * path.stat().st_size))
        flip(path, bit)
        with contextlib.closing(Checkpoints(workdir, keep=Keep(best=1))) as checkpoints:
            state, examples, step = checkpoints.restore_newest(abstract(state_of(0)))
        said = capfd.readouterr().err.splitlines()
        assert equal(state, state_of(step)) and examples == 8 * step, (path, bit)
        metrics = names[number % len(names)].name == "metrics"
        assert [("is damaged" in line, "5" in line) for line in said] == [(True, True)] * (
            metrics or step == 3
        ), said
        assert (workdir / "damaged_checkpoints" / "5").exists() == (step == 3)
        outcomes["restored equal" if step == 5 else "set aside"] += 1
        shutil.rmtree(workdir)
    print(dict(outcomes))
    assert outcomes["set aside"] >= flips // 6


@pytest.mark.parametrize("changed", ["state", "run", "checksums"])
def test_a_change_that_every_reader_takes_is_noticed(saved, tmp_path, capfd, changed):
    """Files that are whole, with another content: of the arrays, of the count of examples, of nothing."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    if changed == "run":
        path = folder / "5" / "run" / "metadata"
        path.write_text(path.read_text().replace('"examples": 40', '"examples": 41'))
    else:
        shutil.rmtree(folder / "5" / changed)
    if changed == "state":  # that of a checkpoint whose arrays have the same shapes
        shutil.copytree(folder / "3" / "state", folder / "5" / "state")
    with (
        contextlib.closing(Checkpoints(tmp_path)) as checkpoints,
        pytest.raises(UserError, match=r"checkpoints/5 is damaged \(.*\); imagen-jax train sets it aside"),
    ):
        checkpoints.restore(5, abstract(state_of(0)))
    with contextlib.closing(Checkpoints(tmp_path, keep=Keep())) as checkpoints:
        assert checkpoints.restore_newest(abstract(state_of(0)))[2] == 3
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_an_older_checkpoint_is_restored_with_one_warning(saved, tmp_path, capfd):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints" / "5"
    shutil.rmtree(folder / "checksums")
    run = json.loads((folder / "run" / "metadata").read_text())
    del run["crc32c"]
    (folder / "run" / "metadata").write_text(json.dumps(run))
    with contextlib.closing(Checkpoints(tmp_path, keep=Keep())) as checkpoints:
        state, examples, step = checkpoints.restore_newest(abstract(state_of(0)))
    assert equal(state, state_of(5)) and (examples, step) == (40, 5)
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{folder} is of a version that wrote no checksums" in line


def published_sum(array):
    """`device_checksum` by its definition, in whole numbers of any length."""
    bits = np.asarray(array).reshape(-1).view(f"u{array.dtype.itemsize}").tolist()
    total = 0
    for place, number in enumerate(bits):
        number = (number + place * 0x9E3779B9) % 2**32
        number = (number ^ number >> 16) * 0x85EBCA6B % 2**32
        number = (number ^ number >> 13) * 0xC2B2AE35 % 2**32
        total += number ^ number >> 16
    return total % 2**32


@pytest.mark.parametrize(("shape", "dtype"), [((24, 16), "float32"), ((8, 3, 5), "bfloat16"), ((), "int32")])
def test_sums_do_not_depend_on_where_an_array_lies(shape, dtype):
    """Devices and NumPy sum up alike, whole, in parts and in copies."""
    array = jnp.asarray(np.random.default_rng(1).standard_normal(shape) * 100).astype(dtype)
    expected = published_sum(array)
    assert int(device_checksum(array)) == expected
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    for spec in (
        [P()] + [P("a"), P("a", None), P(("a", "b"))][: 3 * bool(shape)] + [P("a", "b")] * (len(shape) == 2)
    ):
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        assert int(device_checksum(placed)) == expected, spec
        assert begin_checksums({"x": placed})() == {"['x']": expected}, spec
    assert add_checksums([{"x": 2**32 - 1, "y": 1}, {"x": 3}]) == {"x": 2, "y": 1}


def test_sums_are_of_the_arrays_as_they_were_begun():
    """A step that takes over the arrays' memory does not change them."""
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = step(state_of(1))
    expected, finish = begin_checksums(state)(), begin_checksums(state)
    for _ in range(3):
        state = jax.block_until_ready(step(state))
    assert finish() == expected != begin_checksums(state)()
