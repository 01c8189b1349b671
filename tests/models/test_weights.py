import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from imagen_jax.errors import UserError
from imagen_jax.models.weights import (
    TensorSource,
    WeightReader,
    flatten_names,
    load_state,
    load_tensors,
    save_state,
)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)])
        self.scale = nnx.Param(jnp.float32(3.0))
        self.low = nnx.Param(jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 7)


NAMES = {"blocks.0.bias", "blocks.0.kernel", "blocks.1.bias", "blocks.1.kernel", "low", "scale"}


def make_state(seed: int = 0) -> nnx.State:
    return nnx.state(Net(nnx.Rngs(seed)), nnx.Param)


def abstract_state() -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_saved_file_opens_in_the_library(tmp_path):
    state = make_state()
    save_state(state, tmp_path / "new" / "net.safetensors", metadata={"step": "7"})
    tensors = load_file(tmp_path / "new" / "net.safetensors")
    assert set(tensors) == NAMES
    for name, leaf in flatten_names(state)[0].items():
        assert tensors[name].dtype == leaf.dtype and tensors[name].shape == leaf.shape
        np.testing.assert_array_equal(tensors[name], np.asarray(leaf))
    with WeightReader(tmp_path / "new" / "net.safetensors") as reader:
        assert reader.metadata() == {"step": "7"}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["net.safetensors"]  # no partial file stays


def test_state_round_trip_is_exact_and_bytes_are_reproducible(tmp_path):
    state = make_state()
    save_state(state, tmp_path / "a.safetensors")
    save_state(state, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_state(abstract_state(), tmp_path / "a.safetensors")
    assert_same(loaded, state)
    net = nnx.merge(nnx.split(Net(nnx.Rngs(1)))[0], loaded)
    np.testing.assert_array_equal(net.blocks[0].kernel[...], flatten_names(state)[0]["blocks.0.kernel"])


def mapped_file(address):
    """The file whose mapping holds an address; "" if none does."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        begin, end = (int(each, 16) for each in span.split("-"))
        if begin <= address < end:
            return name[0] if name else ""
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_what_is_read_is_the_file_in_memory(tmp_path):
    generator = np.random.default_rng(0)
    odd = {f"odd{i}": generator.standard_normal(3 + i).astype(np.float32) for i in range(3)}
    even = {f"a{i}": generator.standard_normal((32, 2 + i)).astype(ml_dtypes.bfloat16) for i in range(3)}
    state, path = odd | even, tmp_path / "net.safetensors"
    save_state(state, path)
    with WeightReader(path) as reader:
        found = {name: reader.read(name) for name in state}
        loaded = load_state(state, path, shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    # Valid after closing, and nobody's to change.
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value)
        assert not found[name].flags.writeable and found[name].flags.aligned
    # Where they begin at a multiple of 64 bytes JAX takes them as they lie, and small ones do not push others off it.
    aligned = {name for name, array in found.items() if array.ctypes.data % 64 == 0}
    assert aligned >= even.keys()
    # A function that may overwrite its argument overwrites a copy.
    before = path.read_bytes()
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    for name, value in loaded.items():
        assert (mapped_file(value.unsafe_buffer_pointer()) == str(path)) == (name in aligned)
        np.testing.assert_array_equal(double(value), state[name] * 2)
    assert path.read_bytes() == before


def test_an_older_file_is_replaced(tmp_path):
    for seed in (0, 1):
        save_state(make_state(seed), tmp_path / "net.safetensors")
    assert_same(load_state(abstract_state(), tmp_path / "net.safetensors"), make_state(1))


def test_dtype_converts_floating_leaves_only(tmp_path):
    state = {"w": jnp.linspace(0, 1, 5), "ids": jnp.arange(3)}
    save_state(state, tmp_path / "x.safetensors")
    loaded = load_state(jax.eval_shape(lambda: state), tmp_path / "x.safetensors", dtype=jnp.bfloat16)
    assert loaded["ids"].dtype == jnp.int32
    np.testing.assert_array_equal(loaded["w"], state["w"].astype(jnp.bfloat16))


def test_shardings_place_every_leaf(tmp_path):
    state = make_state()
    save_state(state, tmp_path / "x.safetensors")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = jax.tree.map(
        lambda leaf: jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(*(["data"] if leaf.ndim else []))
        ),
        abstract_state(),
    )
    loaded = load_state(abstract_state(), tmp_path / "x.safetensors", shardings=shardings)
    assert_same(loaded, state)
    for leaf, sharding in zip(jax.tree.leaves(loaded), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert_same(load_state(abstract_state(), tmp_path / "x.safetensors", shardings=single), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.bias"), "blocks.1.bias is missing"),
        (lambda t: t.update(extra=np.zeros(2)), "unexpected tensor extra"),
        (lambda t: t.update(low=np.zeros((3, 2), np.float32)), r"low has shape \(3, 2\), expected \(2, 3\)"),
    ],
)
def test_other_networks_are_refused(tmp_path, change, message):
    save_state(make_state(), tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        load_state(abstract_state(), tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, ml_dtypes.float8_e4m3fn])
def test_numbers_that_are_not_the_parameters_are_refused(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    save_state(make_state(), path)
    save_file(load_file(path) | {"low": np.ones((2, 3), dtype)}, path)
    with pytest.raises(UserError, match=rf"{path}: tensor low .*quantised") as caught:
        load_state(abstract_state(), path)
    assert "\n" not in str(caught.value)
    # The other way round a fraction would be cut off.
    save_state({"ids": jnp.linspace(0, 1, 3)}, path)
    with pytest.raises(UserError, match="tensor ids is float32, expected int32"):
        load_state({"ids": jax.ShapeDtypeStruct((3,), jnp.int32)}, path)


@pytest.mark.parametrize(
    "name",
    [
        *("blocks.0.SCB", "blocks.0.kernel.absmax", "blocks.0.kernel.quant_state.bitsandbytes__nf4"),
        *(
            "blocks.0.qweight",
            "blocks.0.scales",
            "blocks.0.weight_scale",
            "blocks.0.scale_weight",
            "scaled_fp8",
        ),
    ],
)
def test_what_belongs_to_quantised_weights_is_named(tmp_path, name):
    path = tmp_path / "x.safetensors"
    save_state(make_state(), path)
    save_file(load_file(path) | {name: np.ones(3, np.float32)}, path)
    with pytest.raises(UserError, match=rf"tensor {name} \(F32\) belongs to quantised weights"):
        load_state(abstract_state(), path)


def test_random_keys_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="key has dtype"):
        save_state({"key": jax.random.key(0)}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def shard(folder, suffix=""):
    """Two shards and an index, as transformers and diffusers lay them out."""
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    b = (np.arange(8) / 3).astype(ml_dtypes.bfloat16).reshape(2, 4)
    files = [f"model{suffix}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a": a}, folder / files[0], metadata={"format": "pt"})
    save_file({"b": b}, folder / files[1])
    weight_map = {"a": files[0], "b": files[1]}
    (folder / f"model.safetensors.index{suffix}.json").write_text(json.dumps({"weight_map": weight_map}))
    return a, b


@pytest.mark.parametrize("suffix", ["", ".fp16"])
def test_shards_are_read_through_their_index(tmp_path, suffix):
    a, b = shard(tmp_path, suffix)
    with WeightReader(tmp_path, suffix.lstrip(".") or None) as reader:
        assert reader.names == {"a", "b"} and len(reader.files) == 2
        assert reader.shape("a") == (4, 6) and reader.dtype("b") == ml_dtypes.bfloat16
        np.testing.assert_array_equal(reader.read("a", (slice(1, 3), slice(2, None))), a[1:3, 2:])
        np.testing.assert_array_equal(reader.read("b"), b)
        with pytest.raises(UserError, match=r"no tensor c"):
            reader.read("c")


def test_the_plain_file_wins_over_a_variant_unless_asked(tmp_path):
    save_file({"x": np.float32([1])}, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"x": np.float16([2])}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert WeightReader(tmp_path).read("x") == 1
    assert WeightReader(tmp_path, "fp16").read("x") == 2
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert WeightReader(tmp_path).read("x") == 2


def test_a_missing_shard_is_named(tmp_path):
    shard(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    reader = WeightReader(tmp_path)
    reader.read("a")
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing"):
        reader.read("b")


@pytest.mark.parametrize("name", ["flax_model.msgpack", "tf_model.h5", "last.ckpt"])
def test_other_kinds_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=rf"{name}.*never loaded"):
        WeightReader(tmp_path)
    with pytest.raises(UserError, match="never loaded"):
        WeightReader(tmp_path / name)


def test_unreadable_places_give_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        WeightReader(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no weights \(looked for model.safetensors, .*pytorch_model.bin"):
        WeightReader(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        WeightReader(tmp_path)
    (tmp_path / "x.index.json").write_text('{"weight_map": {"a": "../../secret.bin"}}')
    with pytest.raises(UserError, match="is not a file of weights beside the index"):
        WeightReader(tmp_path / "x.index.json")


BAD_HEADERS = {
    "a list": b"[1, 2]",
    "no JSON": b'{"x": ',
    "a tensor that is a number": b'{"x": 3}',
    "a dtype that is a number": b'{"x": {"dtype": 1, "shape": [1], "data_offsets": [0, 4]}}',
    "a shape of words": b'{"x": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}',
    "a negative shape": b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    "offsets beyond the file": b'{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}',
    "offsets that are not the shape's": b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_bad_headers_give_one_line(tmp_path, kind):
    header, path = BAD_HEADERS[kind], tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=rf"^{path}: ") as caught:
        WeightReader(tmp_path).read("x")
    assert "\n" not in str(caught.value)
    for size in (0, 7, 2**63):  # of the header: cut off, or larger than any file
        path.write_bytes(size.to_bytes(8, "little")[: max(size, 1)])
        with pytest.raises(UserError, match=rf"^{path}: not a readable safetensors file"):
            WeightReader(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": ["model.safetensors"]}, "'weight_map' must be an object"),
        ({"weight_map": {"x": 3}}, "weight_map: 'x' must be a text, got 3"),
        ({"weight_map": {"x": "../model.safetensors"}}, "is not a file of weights beside the index"),
        ({"weight_map": {"x": "/model.safetensors"}}, "is not a file of weights beside the index"),
        ({"weights": {}}, "no weight_map"),
        ([], "must be a JSON object"),
    ],
)
def test_bad_indices_give_one_line(tmp_path, content, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        WeightReader(tmp_path)
    assert str(caught.value).startswith(str(index)) and "\n" not in str(caught.value)


def test_git_lfs_pointers_are_named(tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4242\n"
    for name in ("model.safetensors.index.json", "model.safetensors"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer, not the file; run git lfs pull"):
            WeightReader(tmp_path)


def test_sources_permute_stack_and_slice(tmp_path):
    generator = np.random.default_rng(0)
    stored = {f"layer.{i}.conv": generator.normal(size=(4, 3, 2, 5)).astype(np.float32) for i in range(3)}
    save_file(stored, tmp_path / "model.safetensors")
    source = TensorSource(names=tuple(stored), axes=(2, 3, 1, 0), stacked=True)  # OIHW -> HWIO
    expected = np.stack([np.moveaxis(t, (0, 1), (3, 2)) for t in stored.values()])
    with WeightReader(tmp_path) as reader:
        abstract = {"conv": jax.ShapeDtypeStruct(expected.shape, jnp.float32)}
        loaded = load_tensors(abstract, reader, {"conv": source})
        np.testing.assert_array_equal(loaded["conv"], expected)
        index = (slice(1, 3), slice(0, 1), slice(2, 5), slice(None), slice(1, 3))
        np.testing.assert_array_equal(source.read(reader, index, np.float32), expected[index])
        with pytest.raises(UserError, match="no tensor for parameter bias"):
            load_tensors(abstract | {"bias": abstract["conv"]}, reader, {"conv": source})


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transposed_matrices(layers, dtype, tmp_path):
    """Larger than the tiles in which they are copied, and no multiple of them."""
    generator = np.random.default_rng(0)
    stored = {f"{i}": generator.standard_normal((130, 200), np.float32) for i in range(layers)}
    save_file(stored, tmp_path / "model.safetensors")
    source = TensorSource(names=tuple(stored), axes=(1, 0), stacked=True)
    expected = np.stack([matrix.T for matrix in stored.values()])
    abstract = {"kernel": jax.ShapeDtypeStruct(expected.shape, jnp.float32)}
    with WeightReader(tmp_path) as reader:
        loaded = load_tensors(abstract, reader, {"kernel": source}, dtype=dtype)
    np.testing.assert_array_equal(loaded["kernel"], jnp.asarray(expected, dtype))


def test_a_source_of_several_tensors_has_to_be_stacked():
    with pytest.raises(ValueError, match="exactly one name"):
        TensorSource(names=("a", "b"))
