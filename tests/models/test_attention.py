"""The attention kernels, interpreted, against plain attention, and which of both is taken."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.models.attention import attend
from imagen_jax.models.execution import Execution
from imagen_jax.models.flash_attention import flash_attention, supports
from imagen_jax.models.network import Attention
from imagen_jax.parallel.mesh import MeshConfig, make_mesh


def inputs(queries, keys, channels, seed=0):
    generator = np.random.default_rng(seed)
    shapes = [(8, queries, channels), (8, keys, channels), (8, keys, channels)]
    arrays = [jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes]
    mask = np.arange(keys) < generator.integers(1, keys + 1, (8, 1))
    mask[0] = np.arange(keys) == 0
    return arrays, jnp.asarray(mask)


def with_gradients(function, arrays):
    """Output and the gradients of its product with fixed numbers."""
    weights = jnp.asarray(np.random.default_rng(9).standard_normal(arrays[0].shape), jnp.float32)
    output, pull = jax.vjp(function, *arrays)
    return [output, *pull(weights)]


def reference(query, key, value, mask, heads):
    """In float64, one example and one head at a time; masked keys are left out."""
    made = np.zeros(query.shape)
    for n in range(len(query)):
        q, k, v = (np.split(np.asarray(x[n], np.float64), heads, axis=-1) for x in (query, key, value))
        real = np.asarray(mask[n])
        for h, columns in enumerate(np.split(np.arange(query.shape[-1]), heads)):
            logits = q[h] @ k[h][real].T / np.sqrt(q[h].shape[-1])
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            made[n][:, columns] = weights / weights.sum(axis=-1, keepdims=True) @ v[h][real]
    return made


# Two heads in the lanes of a register, and one; several blocks of queries; keys that need padding.
@pytest.mark.parametrize(
    ("queries", "keys", "channels", "head"), [(16, 21, 256, 64), (1024, 600, 128, 128), (64, 128, 128, 32)]
)
def test_kernels_are_plain_attention(queries, keys, channels, head):
    arrays, mask = inputs(queries, keys, channels)
    kernels, plain = (
        jax.jit(
            lambda *arrays, kind=kind: with_gradients(
                lambda q, k, v: attend(q, k, v, mask, heads=channels // head, kind=kind), arrays
            )
        )(*arrays)
        for kind in (Attention.FLASH, Attention.XLA)
    )
    for made, expected in zip(kernels, plain):
        np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kernels[0], reference(*arrays, mask, channels // head), atol=1e-5)


def test_kernels_in_bfloat16_keep_statistics_in_float32():
    arrays, mask = inputs(64, 128, 128)
    rounded = [each.astype(jnp.bfloat16) for each in arrays]
    made = flash_attention(*rounded, mask, head_channels=64, interpret=True)
    assert made.dtype == jnp.bfloat16
    expected = reference(*(each.astype(jnp.float32) for each in rounded), mask, 2)
    np.testing.assert_allclose(made.astype(jnp.float32), expected, atol=0.03)


def test_gradients_in_bfloat16_are_those_of_plain_attention():
    arrays, mask = inputs(64, 128, 128)
    rounded = [x.astype(jnp.bfloat16) for x in arrays]
    made = jax.grad(
        lambda *x: flash_attention(*x, mask, head_channels=64, interpret=True).astype(jnp.float32).sum() ** 2,
        (0, 1, 2),
    )(*rounded)
    plain = jax.grad(lambda *x: attend(*x, mask, heads=2).sum() ** 2, (0, 1, 2))
    exact = plain(*(x.astype(jnp.float32) for x in rounded))
    for gradient, expected in zip(made, exact, strict=True):
        assert gradient.dtype == jnp.bfloat16
        error = np.linalg.norm(gradient.astype(jnp.float32) - expected)
        assert error < 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_kernels_on_a_mesh_see_their_own_examples_and_heads(sizes):
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    arrays, mask = inputs(16, 24, 256)

    def run(kind, mesh):
        with Execution(mesh=mesh).active():
            return jax.jit(
                lambda *arrays: with_gradients(
                    lambda q, k, v: attend(q, k, v, mask, heads=4, kind=kind), arrays
                )
            )(*arrays)

    for made, expected in zip(run(Attention.FLASH, mesh), run(Attention.XLA, None)):
        np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)


def kernels(kind, mesh, channels=128):
    arrays, mask = inputs(16, 24, channels)
    with Execution(mesh=mesh).active():
        traced = jax.make_jaxpr(lambda *arrays: attend(*arrays, mask, heads=2, kind=kind))(*arrays)
    return str(traced).count("pallas_call")


def test_automatic_choice_looks_at_the_mesh_and_not_at_this_machine():
    here = make_mesh(MeshConfig())
    assert kernels(Attention.AUTO, here) == kernels(Attention.AUTO, None) == 0
    assert kernels(Attention.XLA, here) == 0 and kernels(Attention.FLASH, here) == 1
    assert supports(1024, 1152, 1024, 64, 4) and supports(4096, 4224, 2048, 64, 2)
    for shapes in ((1024, 1152, 96, 32), (8, 136, 128, 64), (64, 192, 128, 48), (4096, 5376, 128, 64)):
        assert not supports(*shapes, 2), shapes
    assert not supports(4096, 4224, 2048, 64, 4)


def test_a_kind_may_be_named_and_a_wrong_name_is_refused():
    x, mask = jnp.ones((1, 16, 128)), jnp.ones((1, 16), bool)
    with pytest.raises(ValueError, match="'fast' is not a valid Attention"):
        attend(x, x, x, mask, heads=2, kind="fast")
    with pytest.raises(ValueError, match="16 positions"):
        attend(x[:, :3], x, x, mask, heads=2, kind="flash")  # it is the kernel that is asked


def test_shapes_that_the_kernels_do_not_take_are_refused():
    with pytest.raises(ValueError, match="got 16 positions and 96 channels in 2 heads"):
        kernels(Attention.FLASH, None, channels=96)


@pytest.fixture
def lengths_seen(monkeypatch):
    """cuDNN's place is taken by XLA, which understands the same number of keys; gives what it was handed."""
    plain, seen = jax.nn.dot_product_attention, []

    def instead(*arrays, implementation=None, **options):
        if implementation == "cudnn":
            seen.append(options["key_value_seq_lengths"])
        return plain(*arrays, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    return seen


@pytest.fixture
def on_gpus(monkeypatch):
    """Parameters lie on GPUs, as far as attention can see; the function says over how many rows are split."""

    def lie(rows=1):
        mesh = types.SimpleNamespace(
            devices=np.array([types.SimpleNamespace(platform="gpu")]), shape={"tensor": 1, "rows": rows}
        )
        monkeypatch.setattr(Execution, "current", lambda: types.SimpleNamespace(mesh=mesh))

    return lie


def test_cudnn_is_told_the_number_of_keys(lengths_seen, on_gpus):
    (query, key, value), mask = inputs(16, 21, 128)
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    on_gpus()
    chosen = attend(*half, mask, heads=2, kind=Attention.AUTO)
    np.testing.assert_array_equal(lengths_seen[0], mask.sum(axis=1))
    np.testing.assert_allclose(
        np.asarray(chosen, np.float32), reference(*half, mask, 2), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize(
    ("dtype", "channels", "rows"),
    [("float32", 128, 1), ("bfloat16", 24, 1), ("bfloat16", 512, 1), ("bfloat16", 128, 2)],
)
def test_what_cudnn_does_not_take_runs_plainly(lengths_seen, on_gpus, dtype, channels, rows):
    arrays, mask = inputs(16, 21, channels)
    on_gpus(rows)
    attend(*(x.astype(dtype) for x in arrays), mask, heads=2, kind=Attention.AUTO)
    assert lengths_seen == []
    if rows == 1:
        with pytest.raises(ValueError, match=f"attention 'cudnn' needs bfloat16.*{dtype} and heads of"):
            attend(*(x.astype(dtype) for x in arrays), mask, heads=2, kind="cudnn")


def test_an_example_without_keys_stays_finite(lengths_seen, on_gpus):
    (query, key, value), mask = inputs(16, 21, 128)
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    on_gpus()
    made = attend(*half, jnp.zeros_like(mask), heads=2, kind="cudnn")
    assert np.isfinite(np.asarray(made, np.float32)).all() and (np.asarray(lengths_seen[0]) == 1).all()
