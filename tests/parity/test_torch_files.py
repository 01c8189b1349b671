"""Files that PyTorch pickled, in both of its forms, and whole encoders of transformers in them."""

import json
from collections import OrderedDict

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

from imagen_jax.errors import UserError  # noqa: E402
from imagen_jax.models.t5_weights import load_t5  # noqa: E402
from imagen_jax.models.weights import WeightReader  # noqa: E402


@pytest.mark.parametrize("archive", [True, False])
def test_every_kind_of_tensor(tmp_path, archive):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 6, generator=generator)
    tensors = {
        **{str(kind): (100 * whole).to(kind) for kind in (torch.float64, torch.float16, torch.bfloat16)},
        **{str(kind): (9 * whole).to(kind) for kind in (torch.int64, torch.int32, torch.int16, torch.int8)},
        "uint8": (9 * whole).abs().to(torch.uint8),
        "bool": whole > 0,
        "whole": whole,
        "transposed": whole.t(),
        "column": whole[:, 2],
        "every second": whole[1::2, ::3],
        "expanded": whole[:1].expand(3, 6),
        "parameter": torch.nn.Parameter(whole[2]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    state = OrderedDict(tensors)
    state._metadata = OrderedDict({"": {"version": 1}})  # as a network's state has it
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    with WeightReader(tmp_path) as reader:
        assert reader.names == set(tensors)
        for name, tensor in tensors.items():
            got, want = reader.read(name), tensor.detach()
            assert got.shape == tuple(want.shape) and str(got.dtype) == str(want.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(got.astype(np.float64), want.double().numpy())


@pytest.mark.parametrize("archive", [True, False])
def test_a_network_is_not_run(tmp_path, archive):
    torch.save(torch.nn.Linear(3, 4), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    with pytest.raises(UserError, match=r"asks for 'torch\.nn\.modules\.linear\.Linear'"):
        WeightReader(tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("archive", [True, False])
def test_an_encoder_is_that_of_its_safetensors(tmp_path, archive, shards):
    import transformers

    config = transformers.T5Config(
        vocab_size=120, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = transformers.T5ForConditionalGeneration(config)  # the decoder is ignored
    model.save_pretrained(tmp_path / "safetensors")
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "safetensors" / "config.json").read_text())
    state, weight_map = model.state_dict(), {}
    for number in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = OrderedDict(list(state.items())[number::shards])
        torch.save(part, folder / file, _use_new_zipfile_serialization=archive)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (shape, ours), (other, theirs) = load_t5(folder), load_t5(tmp_path / "safetensors")
    assert shape == other and ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
