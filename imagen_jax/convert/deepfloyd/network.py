"""DeepFloyd IF's U-Nets in diffusers' files: config.json to and from ours, and the tensors' names.

Everything is driven by config.json. A flag that would change what is computed and that is not supported is
refused by name.
"""

from collections.abc import Mapping
from typing import Any

from imagen_jax.errors import UserError
from imagen_jax.files import json_field
from imagen_jax.models.deepfloyd import DeepFloydUNetConfig
from imagen_jax.models.network import Activation, NetworkConfig
from imagen_jax.models.weights import TensorSource

_DOWN = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}
_UP = {"ResnetUpsampleBlock2D": False, "SimpleCrossAttnUpBlock2D": True}
_MIDDLE = "UNetMidBlock2DSimpleCrossAttn"

# Flags with only one supported value, which is what every published network has. A file may leave them out:
# then they have the second value, diffusers' default.
_FIXED: dict[str, tuple[Any, Any]] = {
    "_class_name": ("UNet2DConditionModel", "UNet2DConditionModel"),
    "mid_block_type": (_MIDDLE, "UNetMidBlock2DCrossAttn"),
    "center_input_sample": (False, False),
    "flip_sin_to_cos": (True, True),
    "freq_shift": (0, 0),
    "norm_eps": (1e-5, 1e-5),
    "dropout": (0.0, 0.0),
    "resnet_time_scale_shift": ("scale_shift", "default"),
    "cross_attention_norm": ("group_norm", None),
    "addition_embed_type": ("text", None),
    "time_embedding_type": ("positional", "positional"),
    "timestep_post_act": (None, None),
    "time_cond_proj_dim": (None, None),
    "num_class_embeds": (None, None),
    "class_embeddings_concat": (False, False),
    "conv_in_kernel": (3, 3),
    "conv_out_kernel": (3, 3),
    "dual_cross_attention": (False, False),
}
# Groups of the norm over the text: no flag of its own in diffusers, where it is this number.
_TEXT_NORM_GROUPS = 32
_PICTURE_CHANNELS = 3


def _whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    return _positive(config.get(name, default), name)


def _positive(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}, expected a positive whole number")
    return value


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    return json_field(config, name, float, "config.json", default=default)


def _per_level(config: Mapping[str, Any], name: str, levels: int, default: Any) -> tuple[Any, ...]:
    """A flag that is one value, or a list of one a level: positive whole numbers, or true or false, as the default."""
    value = config.get(name, default)
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(values) != levels:
        raise UserError(f"{name} is {value!r}, expected one value for each of {levels} levels")
    if not isinstance(default, bool):
        return tuple(_positive(number, name) for number in values)
    if not all(isinstance(value, bool) for value in values):
        raise UserError(f"{name} is {value!r}, expected true or false")
    return values


def _activation(name: str, value: Any) -> Activation:
    if value not in ("gelu", "silu", "swish"):
        raise UserError(f"{name} is {value!r}; only gelu and silu are supported")
    return Activation.GELU if value == "gelu" else Activation.SILU


def _check_fixed(config: Mapping[str, Any]) -> None:
    for name, (supported, default) in _FIXED.items():
        value = config.get(name, default)
        if value != supported:
            raise UserError(
                f"{name} is {value!r}; only {supported!r} is supported: is this a DeepFloyd network?"
            )
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        raise UserError(
            f"encoder_hid_dim_type is {config['encoder_hid_dim_type']!r}; only 'text_proj' is supported"
        )
    if config.get("class_embed_type") not in (None, "timestep"):
        raise UserError(f"class_embed_type is {config['class_embed_type']!r}; only 'timestep' is supported")


def _attention_levels(config: Mapping[str, Any], levels: int) -> tuple[bool, ...]:
    """Whether each level attends to the text."""
    down, up = config.get("down_block_types", ()), config.get("up_block_types", ())
    for name, kinds, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        fits = isinstance(kinds, (list, tuple)) and len(kinds) == levels
        if not fits or not all(isinstance(kind, str) and kind in known for kind in kinds):
            raise UserError(f"{name} is {kinds!r}; expected {levels} of {', '.join(known)}")
    attends = tuple(_DOWN[kind] for kind in down)
    if attends != tuple(_UP[kind] for kind in reversed(up)):
        raise UserError(f"up_block_types {up!r} is not down_block_types {down!r} mirrored")
    return attends


def _options(config: Mapping[str, Any], *, mid_self_attention: bool) -> dict[str, Any]:
    """The fields that only these networks have."""
    embedding_act = config.get("time_embedding_act_fn")
    return {
        "text_channels": _whole(config, "cross_attention_dim"),
        "pool_heads": _whole(config, "addition_embed_type_num_heads", 64),
        "norm_groups": _whole(config, "norm_num_groups", 32),
        "text_norm_groups": _TEXT_NORM_GROUPS,
        "mid_self_attention": mid_self_attention,
        "activation": _activation("act_fn", config.get("act_fn", "silu")),
        "embedding_activation": None
        if embedding_act is None
        else _activation("time_embedding_act_fn", embedding_act),
        "skip_time_act": json_field(config, "resnet_skip_time_act", bool, "config.json", default=False),
        "block_scale": _number(config, "resnet_out_scale_factor", 1.0),
        "mid_scale": _number(config, "mid_block_scale_factor", 1.0),
    }


def unet_config(config: Mapping[str, Any]) -> DeepFloydUNetConfig:
    """The network that a diffusers config.json describes.

    Args:
      config: contents of the file.

    Raises:
      UserError: a flag is missing or not supported, naming it, or no network can be built of these numbers.
    """
    try:
        return _unet_config(config)
    except UserError:
        raise
    except ValueError as error:  # what the network's configuration refuses
        raise UserError(f"config.json: {error}") from error


def _unet_config(config: Mapping[str, Any]) -> DeepFloydUNetConfig:
    _check_fixed(config)
    channels = config.get("block_out_channels")
    if not isinstance(channels, (list, tuple)) or not channels:
        raise UserError(f"block_out_channels is {channels!r}, expected a list of channels")
    channels = tuple(_positive(number, "block_out_channels") for number in channels)
    if channels[0] % 2:
        raise UserError(f"block_out_channels is {channels!r}, expected an even number first")
    levels = len(channels)
    attends = _attention_levels(config, levels)
    heads = _per_level(config, "attention_head_dim", levels, 8)
    if len(set(heads)) > 1:
        raise UserError(f"attention_head_dim is {heads!r}; one value for all levels is supported")
    only_cross = _per_level(config, "only_cross_attention", levels, False)
    if (
        config.get("mid_block_only_cross_attention") is None
    ):  # then it is as the levels are, where these agree
        mid_only = config.get("only_cross_attention") is True
    else:
        mid_only = json_field(config, "mid_block_only_cross_attention", bool, "config.json")
    inputs, outputs = _whole(config, "in_channels"), _whole(config, "out_channels")
    if inputs not in (_PICTURE_CHANNELS, 2 * _PICTURE_CHANNELS):
        raise UserError(f"in_channels is {inputs}; expected 3 (a base) or 6 (super-resolution)")
    if outputs not in (_PICTURE_CHANNELS, 2 * _PICTURE_CHANNELS):
        raise UserError(f"out_channels is {outputs}; expected 3, or 6 with a learned variance")
    enlarges = inputs > _PICTURE_CHANNELS
    if enlarges != (config.get("class_embed_type") == "timestep"):
        raise UserError(
            f"class_embed_type is {config.get('class_embed_type')!r} with in_channels {inputs}; "
            "super-resolution has 'timestep' and 6 channels, a base neither"
        )
    embedding_width = config.get("time_embedding_dim")
    return DeepFloydUNetConfig(
        channels=channels,
        num_res_blocks=_per_level(config, "layers_per_block", levels, 2),
        self_attention=tuple(a and not only for a, only in zip(attends, only_cross)),
        text_attention=attends,
        text_width=_whole(config, "encoder_hid_dim"),
        head_channels=heads[0],
        embedding_width=None if embedding_width is None else _positive(embedding_width, "time_embedding_dim"),
        low_res_channels=_PICTURE_CHANNELS if enlarges else 0,
        learned_variance=outputs > _PICTURE_CHANNELS,
        **_options(config, mid_self_attention=not mid_only),
    )


def diffusers_config(network: NetworkConfig, resolution: int) -> dict[str, Any]:
    """The config.json from which diffusers builds the network: what `unet_config` reads back.

    Args:
      network: a DeepFloyd network.
      resolution: pixels, side of its pictures.

    Raises:
      UserError: the network is of another kind, or has parts that diffusers knows no flag for.
    """
    if not isinstance(network, DeepFloydUNetConfig):
        raise UserError(f"only networks of kind {DeepFloydUNetConfig.KIND} have a form in diffusers")
    if network.patch_size != 1 or network.text_norm_groups != _TEXT_NORM_GROUPS:
        raise UserError(
            f"patch_size {network.patch_size} with text_norm_groups {network.text_norm_groups} has no form in "
            "diffusers"
        )
    attends = network.text_attention
    down = {attends: kind for kind, attends in _DOWN.items()}
    up = {attends: kind for kind, attends in _UP.items()}
    only_cross = [text and not itself for text, itself in zip(attends, network.self_attention)]
    if any(itself and not text for text, itself in zip(attends, network.self_attention)):
        raise UserError("a level with self-attention and no text has no form in diffusers")
    act = network.embedding_activation
    return {
        "_class_name": "UNet2DConditionModel",
        **{name: value for name, (value, _) in _FIXED.items()},
        "sample_size": resolution,
        "in_channels": network.image_channels + network.low_res_channels,
        "out_channels": network.channels_out,
        "down_block_types": [down[kind] for kind in attends],
        "up_block_types": [up[kind] for kind in reversed(attends)],
        "only_cross_attention": only_cross,
        "mid_block_only_cross_attention": not network.mid_self_attention,
        "block_out_channels": list(network.channels),
        "layers_per_block": list(network.num_res_blocks),
        "attention_head_dim": network.head_channels,
        "norm_num_groups": network.norm_groups,
        "act_fn": network.activation.value,
        "cross_attention_dim": network.text_channels,
        "encoder_hid_dim": network.text_width,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type_num_heads": network.pool_heads,
        "class_embed_type": "timestep" if network.low_res_channels else None,
        "time_embedding_dim": network.embedding_width,
        "time_embedding_act_fn": None if act is None else act.value,
        "resnet_skip_time_act": network.skip_time_act,
        "resnet_out_scale_factor": network.block_scale,
        "mid_block_scale_factor": network.mid_scale,
    }


# Our module → theirs. What is inside blocks follows below.
_TOP = {
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    "conditioning.time.dense1": "time_embedding.linear_1",
    "conditioning.time.dense2": "time_embedding.linear_2",
    "conditioning.aug_level.dense1": "class_embedding.linear_1",
    "conditioning.aug_level.dense2": "class_embedding.linear_2",
    "conditioning.project": "encoder_hid_proj",
    "conditioning.pool.norm": "add_embedding.norm1",
    "conditioning.pool.query": "add_embedding.pool.q_proj",
    "conditioning.pool.key": "add_embedding.pool.k_proj",
    "conditioning.pool.value": "add_embedding.pool.v_proj",
    "conditioning.pool.out": "add_embedding.proj",
    "conditioning.pool.out_norm": "add_embedding.norm2",
    "mid1.res": "mid_block.resnets.0",
    "mid1.attention": "mid_block.attentions.0",
    "mid2.res": "mid_block.resnets.1",
}
_PARTS = {
    "res": {
        "norm1": "norm1",
        "conv1": "conv1",
        "embed": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "shortcut": "conv_shortcut",
    },
    "attention": {
        "norm": "group_norm",
        "text_norm": "norm_cross",
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "text_key": "add_k_proj",
        "text_value": "add_v_proj",
        "out": "to_out.0",
    },
}


def _their_module(ours: str) -> str:
    """Where a module (the dotted name of a parameter without its last part) lies in diffusers."""
    if ours in _TOP:
        return _TOP[ours]
    parts = ours.split(".")
    leaf = parts.pop()
    if parts[0] in ("downsamples", "upsamples"):
        side = "down" if parts[0] == "downsamples" else "up"
        return f"{side}_blocks.{parts[1]}.{side}samplers.0.{_PARTS['res'][leaf]}"
    kind = parts.pop()
    inner = _PARTS[kind][leaf]
    if parts[0] in ("mid1", "mid2"):
        return f"{_TOP[f'{parts[0]}.{kind}']}.{inner}"
    side, level, number = parts
    return f"{side}_blocks.{level}.{'resnets' if kind == 'res' else 'attentions'}.{number}.{inner}"


def unet_sources(abstract_params: Mapping[str, Any]) -> dict[str, TensorSource]:
    """Where each parameter of a DeepFloyd network lies in diffusers' file.

    Args:
      abstract_params: the network's parameters, or their shapes, by dotted names.
    """
    sources = {}
    for name, leaf in abstract_params.items():
        module, _, kind = name.rpartition(".")
        if name == "conditioning.pool.positional_embedding":
            sources[name] = TensorSource(names=("add_embedding.pool.positional_embedding",))
        elif kind == "kernel":
            # Convolutions are stored (out, in, height, width), matrices (out, in); a shortcut is a 1×1 convolution.
            axes = (2, 3, 1, 0) if len(leaf.shape) == 4 else (1, 0)
            sources[name] = TensorSource(names=(f"{_their_module(module)}.weight",), axes=axes)
        else:
            theirs = "weight" if kind == "scale" else "bias"
            sources[name] = TensorSource(names=(f"{_their_module(module)}.{theirs}",))
    return sources
