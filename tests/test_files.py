"""Reading files of strangers: one line that names the file, whatever is in it."""

import json
import os

import pytest

from imagen_jax.cli.main import main
from imagen_jax.data.records import KeyIndex
from imagen_jax.data.tfrecord import TFRecordReader
from imagen_jax.errors import UserError
from imagen_jax.files import json_field, json_object, parse_json, read_bytes, read_json
from imagen_jax.models.weights import WeightReader

BAD_JSON = {
    "not UTF-8": b'{"a": "caf\xe9"}',
    "not valid JSON": b'{"a": ',
    "nested too deeply": b"[" * 200_000,
    "lone surrogate": b'{"a": "half \\ud83c"}',
    "must be a JSON object": b"[1, 2]",
}


@pytest.mark.parametrize("said", BAD_JSON)
def test_bad_json_is_one_line_that_names_the_file(tmp_path, said):
    path = tmp_path / "config.json"
    path.write_bytes(BAD_JSON[said])
    with pytest.raises(UserError, match=said) as raised:
        read_json(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_byte_order_mark_and_whole_surrogate_pairs_are_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "\N{GRINNING FACE}"}).encode())
    assert read_json(path) == {"a": "\N{GRINNING FACE}"}


@pytest.mark.parametrize(
    ("value", "kind"),
    [("3", int), (True, int), (1.5, int), (None, str), ([], dict), ({}, list), ("1", float)],
)
def test_a_field_of_the_wrong_type_is_named(value, kind):
    with pytest.raises(UserError, match=r"^x\.json: 'size' must be .*, got "):
        json_field({"size": value}, "size", kind, "x.json")


def test_fields_missing_and_whole_numbers_for_numbers():
    with pytest.raises(UserError, match=r"^x\.json: the field 'size' is missing$"):
        json_field({}, "size", int, "x.json")
    assert json_field({}, "size", int, "x.json", default=None) is None
    assert json_field({"size": 3}, "size", float, "x.json") == 3.0
    assert json_object({}, "x") == {}


def test_a_pipe_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(UserError, match="a pipe or a device"):
        read_bytes(path)


@pytest.mark.parametrize("name", ["missing", "nul\0name", "x" * 300, "."])
def test_what_the_system_refuses_is_one_line(tmp_path, name):
    with pytest.raises(UserError) as raised:
        read_bytes(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_limit_is_said(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(11))
    with pytest.raises(UserError, match="11 bytes, where at most 10 are read"):
        read_bytes(path, limit=10)
    assert parse_json("3", "x") == 3


@pytest.mark.parametrize(
    ("name", "open_"),
    [
        ("captions-train.tfrecord-00000-of-00001", lambda path: len(TFRecordReader(path))),
        ("model.safetensors", lambda path: WeightReader(path).names),
        ("model.safetensors", lambda path: WeightReader(path.parent).names),
        ("keys-train.npy", lambda path: KeyIndex(path.parent, "train")),
    ],
)
def test_pipes_are_refused_where_files_are_opened(tmp_path, name, open_):
    """Opened, they would wait for a writer for ever."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="a pipe or a device, not a file") as raised:
        open_(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config=/dev/zero", "--workdir={}/out"],
        ["train", "--config={}/pipe", "--workdir={}/out"],
        ["sample", "--prompts_file={}/pipe", "--model={}", "--out={}/out"],
        ["precompute", "--source=folder:/dev/zero", "--text_encoder={}", "--out={}/out"],
        ["precompute", "--source=folder:{}/pipe", "--text_encoder={}", "--out={}/out"],
        ["precompute", "--source=shapes:count=2", "--text_encoder={}/pipe", "--out={}/out"],
        ["precompute", "--source=shapes:count=2", "--text_encoder={}", "--out=/dev/null"],
    ],
)
def test_commands_refuse_pipes_and_devices(tmp_path, capsys, arguments):
    os.mkfifo(tmp_path / "pipe")
    assert main([argument.format(tmp_path) for argument in arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error: " in lines[-1] and "Traceback" not in lines
