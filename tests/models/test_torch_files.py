"""PyTorch's pickled weights: tensors are read, and a file that asks for anything else is refused before it runs.

The pickles are put together here, opcode by opcode; `tests/parity/test_torch_files.py` has PyTorch's own.
"""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from imagen_jax.errors import UserError
from imagen_jax.models.weights import WeightReader
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.small import make_small_encoder

PROTOCOL, END = b"\x80\x02", b"."
MAGIC = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
KINDS = {np.float32: "FloatStorage", np.float16: "HalfStorage", np.int64: "LongStorage"}


def plain(value):
    """The opcodes of numbers, texts and tuples."""
    return pickle.dumps(value, 2)[2:-1]


def name_of(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def call(module, name, *arguments):
    return name_of(module, name) + b"(" + b"".join(arguments) + b"tR"


def storage(key, kind, count):
    parts = plain("storage"), name_of("torch", kind), plain(key), plain("cpu"), plain(count)
    return b"(" + b"".join(parts) + b"tQ"


def tensor(key, kind, count, first, shape, strides):
    hooks = call("collections", "OrderedDict")
    parts = storage(key, kind, count), plain(first), plain(shape), plain(strides), plain(False), hooks
    return call("torch._utils", "_rebuild_tensor_v2", *parts)


def dictionary(**items):
    return b"}(" + b"".join(plain(key) + value for key, value in items.items()) + b"u"


def archive(path, program, data, compression=zipfile.ZIP_STORED):
    """A file in the form of the zip archive."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", PROTOCOL + program + END)
        for key, content in data.items():
            file.writestr(f"archive/data/{key}", content)
    return path


def sequence(path, program, data, widths):
    """A file in the older form."""
    out = io.BytesIO()
    for value in MAGIC:
        out.write(pickle.dumps(value, 2))
    out.write(PROTOCOL + program + END + pickle.dumps(sorted(data), 2))
    for key in sorted(data):
        out.write(struct.pack("<q", len(data[key]) // widths[key]) + data[key])
    path.write_bytes(out.getvalue())
    return path


NUMBERS = np.arange(24, dtype=np.float32) / 7
HALVES = np.arange(5, dtype=np.float16)
PROGRAM = dictionary(
    whole=tensor("0", "FloatStorage", 24, 0, (4, 6), (6, 1)),
    part=tensor("0", "FloatStorage", 24, 6, (2, 6), (6, 1)),
    transposed=tensor("0", "FloatStorage", 24, 0, (6, 4), (1, 6)),
    scalar=tensor("0", "FloatStorage", 24, 23, (), ()),
    empty=tensor("0", "FloatStorage", 24, 0, (0, 6), (6, 1)),
    halves=call("torch._utils", "_rebuild_parameter", tensor("1", "HalfStorage", 5, 0, (5,), (1,))),
)
DATA = {"0": NUMBERS.tobytes(), "1": HALVES.tobytes()}


@pytest.mark.parametrize("form", ["archive", "sequence"])
def test_tensors_are_read(tmp_path, form):
    path = tmp_path / "pytorch_model.bin"
    if form == "archive":
        archive(path, PROGRAM, DATA)
    else:
        sequence(path, PROGRAM, DATA, {"0": 4, "1": 2})
    whole = NUMBERS.reshape(4, 6)
    wanted = {
        "whole": whole,
        "part": whole[1:3],
        "transposed": whole.T,
        "scalar": whole[3, 5],
        "empty": whole[:0],
        "halves": HALVES,
    }
    with WeightReader(tmp_path) as reader:
        assert reader.names == set(wanted)
        for name, array in wanted.items():
            assert reader.shape(name) == array.shape and reader.dtype(name) == array.dtype
            np.testing.assert_array_equal(reader.read(name), array)
        np.testing.assert_array_equal(
            reader.read("transposed", (slice(1, 3), slice(2, 4))), whole.T[1:3, 2:4]
        )
        got = reader.read("whole")
    with pytest.raises(ValueError, match="read-only"):
        got[0, 0] = 1
    np.testing.assert_array_equal(got, whole)  # mapped still


def test_safetensors_come_first(tmp_path):
    archive(tmp_path / "pytorch_model.bin", PROGRAM, DATA)
    save_file({"x": HALVES}, tmp_path / "model.safetensors")
    assert WeightReader(tmp_path).names == {"x"}


def as_torch(source, folder, shards):
    """An encoder's folder with its weights in PyTorch's form, in so many files."""
    with WeightReader(source) as reader:
        arrays = {name: np.array(reader.read(name)) for name in sorted(reader.names)}
    names, weight_map = sorted(arrays), {}
    folder.mkdir()
    for other in source.iterdir():
        if other.suffix == ".json":
            (folder / other.name).write_text(other.read_text())
    for number in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        mine = names[number::shards]
        items, data = {}, {}
        for key, name in enumerate(mine):
            array = arrays[name]
            strides = tuple(step // array.itemsize for step in array.strides)
            kind = KINDS[array.dtype.type]
            items[name] = tensor(str(key), kind, array.size, 0, array.shape, strides)
            data[str(key)] = array.tobytes()
        archive(folder / file, dictionary(**items), data)
        weight_map |= dict.fromkeys(mine, file)
    if shards > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_an_encoder_is_that_of_its_safetensors(tmp_path, shards):
    source = make_small_encoder(tmp_path / "source", vocabulary_texts=["a red circle"], width=16, layers=2)
    folder = as_torch(source, tmp_path / "torch", shards)
    ours, theirs = TextEncoder.load(folder), TextEncoder.load(source)
    for mine, other in zip(ours.encode(["a red circle"]), theirs.encode(["a red circle"]), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert ours.identity == theirs.identity
    ours.save_copy(tmp_path / "copy")
    assert TextEncoder.load(tmp_path / "copy").identity == theirs.identity


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that hostile pickles would leave, by a function of a module that can be imported."""
    marker = tmp_path / "marker"
    (tmp_path / "evil.py").write_text(f"def leave(*_):\n    open({str(marker)!r}, 'w').close()\nleave()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield marker
    assert not marker.exists()


GOOD = tensor("0", "FloatStorage", 24, 0, (4, 6), (6, 1))
BUILD = b"}(" + plain("first") + plain(-(10**6)) + plain("dtype") + plain("O") + b"ub"
HOSTILE = {
    "a shell": call("os", "system", plain("touch marker")),
    "another shell": call("posix", "system", plain("touch marker")),
    "a process": call("subprocess", "Popen", plain(("touch", "marker"))),
    "python": call("builtins", "exec", plain("import evil")),
    "python 2's name": call("__builtin__", "eval", plain("__import__('evil')")),
    "an import": call("importlib", "import_module", plain("evil")),
    "a module": name_of("evil", "leave"),
    "an attribute of what is known": call("collections", "OrderedDict.fromkeys", plain(("a",))),
    "a function of the package": call("imagen_jax.files", "write_text", plain("marker"), plain("x")),
    "NumPy's loader": call("numpy", "load", plain("marker"), plain(None), plain(True)),
    "PyTorch's loader": call("torch", "load", plain("marker")),
    "PyTorch's storage loader": call("torch.storage", "_load_from_bytes", plain("marker")),
    "a network": call("torch.nn.modules.linear", "Linear", plain(2), plain(2)),
    "a tensor changed afterwards": GOOD + BUILD,
    "a kind of storage changed": dictionary(y=GOOD) + name_of("torch", "FloatStorage") + BUILD + b"0",
    "a name by extension": b"\x82\x01",
    "an instance": b"(ios\nsystem\n",
    "an object": b"(" + name_of("os", "system") + plain("touch marker") + b"o",
}
WRONG = {
    "numbers beyond the storage": tensor("0", "FloatStorage", 24, 1, (4, 6), (6, 1)),
    "numbers beyond the file": tensor("0", "FloatStorage", 240, 0, (40, 6), (6, 1)),
    "numbers before the storage": tensor("0", "FloatStorage", 24, -6, (4, 6), (6, 1)),
    "strides backwards": tensor("0", "FloatStorage", 24, 23, (4, 6), (-6, -1)),
    "strides of other length": tensor("0", "FloatStorage", 24, 0, (4, 6), (6,)),
    "a shape of texts": tensor("0", "FloatStorage", 24, 0, ("4", 6), (6, 1)),
    "another storage's name": tensor("9", "FloatStorage", 24, 0, (4, 6), (6, 1)),
    "a kind of storage that is none": tensor("0", "QInt8Storage", 24, 0, (4, 6), (6, 1)),
    "a number": plain(3),
    "a text": plain("x"),
    "a reference to nothing": b"h\x63",
    "opcodes that are none": b"\xff\xfe",
}


def refused(path):
    with pytest.raises(UserError, match=f"^{path}: ") as caught:
        WeightReader(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("case", HOSTILE | WRONG)
def test_anything_else_is_refused(tmp_path, marker, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    program = dictionary(x=(HOSTILE | WRONG)[case])
    refused(archive(tmp_path / "pytorch_model.bin", program, DATA))
    refused(sequence(tmp_path / "other.bin", program, DATA, {"0": 4, "1": 2}))
    (tmp_path / "bare.bin").write_bytes(PROTOCOL + program + END)
    refused(tmp_path / "bare.bin")
    # As the whole file and not as one of its tensors.
    refused(archive(tmp_path / "whole.bin", (HOSTILE | WRONG)[case], DATA))


def test_what_is_refused_changes_nothing_for_the_next_file(tmp_path):
    for case, program in HOSTILE.items():
        if "changed" in case:
            refused(archive(tmp_path / "hostile.bin", dictionary(x=program), DATA))
    with WeightReader(archive(tmp_path / "pytorch_model.bin", PROGRAM, DATA)) as reader:
        np.testing.assert_array_equal(reader.read("whole"), NUMBERS.reshape(4, 6))


def test_damaged_files_are_named(tmp_path):
    path = archive(tmp_path / "pytorch_model.bin", PROGRAM, DATA)
    content = path.read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refused(path)
    path = sequence(tmp_path / "older.bin", PROGRAM, DATA, {"0": 4, "1": 2})
    content = path.read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refused(path)


def test_compressed_numbers_are_refused(tmp_path):
    """PyTorch never compresses; what is mapped cannot be."""
    refused(archive(tmp_path / "pytorch_model.bin", PROGRAM, DATA, zipfile.ZIP_DEFLATED))


def test_a_big_endian_file_is_refused(tmp_path):
    path = archive(tmp_path / "pytorch_model.bin", PROGRAM, DATA | {})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", "big")
    with pytest.raises(UserError, match="little-endian"):
        WeightReader(path)
