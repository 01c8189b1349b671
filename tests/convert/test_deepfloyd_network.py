"""DeepFloyd's networks at full size, without allocating them; what is refused. Numbers: tests/parity."""

import pytest

from imagen_jax.convert.deepfloyd.network import diffusers_config, unet_config, unet_sources
from imagen_jax.errors import UserError
from imagen_jax.models.stage import StageNetwork
from imagen_jax.training.config import load_config

# Published counts of parameters and tensors (of I-L and I-M: inferred, to three digits).
FULL = {"stage1.py": (4_304_695_110, 775), "stage2.py": (1_243_277_190, 939)}


@pytest.mark.parametrize("file", FULL)
def test_full_size_has_the_published_parameters(file):
    network = StageNetwork(load_config(f"deepfloyd/{file}").stage)
    sources = unet_sources(network.abstract_params)
    stored = {name for source in sources.values() for name in source.names}
    assert (network.parameter_count(), len(stored)) == FULL[file]
    assert len(sources) == len(stored)
    some = {
        "stage1.py": ("down_blocks.3.attentions.2.add_k_proj.weight", (2816, 2816)),
        "stage2.py": ("class_embedding.linear_1.weight", (1280, 160)),
    }
    name, shape = some[file]
    (ours,) = [key for key, source in sources.items() if source.names == (name,)]
    assert network.abstract_params[ours].shape == shape[::-1]


def tiny():
    return diffusers_config(load_config("deepfloyd/stage2.py:tiny").stage.network, 32)


def test_config_survives_the_way_there_and_back():
    assert unet_config(tiny()) == load_config("deepfloyd/stage2.py:tiny").stage.network


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("cross_attention_norm", "layer_norm"),
        ("resnet_time_scale_shift", "default"),
        ("act_fn", "relu"),
        ("in_channels", 4),
        ("class_embed_type", None),
        ("attention_head_dim", [32, 64]),
        ("up_block_types", ["SimpleCrossAttnUpBlock2D"] * 2),
        ("encoder_hid_dim", None),
        ("block_out_channels", None),
        ("block_out_channels", [32, "64"]),
        ("block_out_channels", [33, 64]),
        ("down_block_types", 5),
        ("up_block_types", [[], {}]),
        ("layers_per_block", 0),
        ("attention_head_dim", [[8], [8]]),
        ("only_cross_attention", "yes"),
        ("time_embedding_dim", "128"),
        ("resnet_out_scale_factor", "1"),
        ("resnet_skip_time_act", 1),
        ("act_fn", ["gelu"]),
    ],
)
def test_unsupported_flags_are_named(flag, value):
    with pytest.raises(UserError, match=flag):
        unet_config({**tiny(), flag: value})
