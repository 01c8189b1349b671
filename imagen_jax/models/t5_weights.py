"""T5 encoders as the hub has them: their config.json, and their weights under the names of `models.t5`.

Without the network: where its program is stored, nothing but the weights is needed.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from imagen_jax.config import build
from imagen_jax.errors import UserError
from imagen_jax.files import json_field, read_json
from imagen_jax.limits import MAX_BLOCKS, MAX_CHANNELS, MAX_VOCABULARY, check_numbers
from imagen_jax.models.weight_files import check_config_is_plain
from imagen_jax.models.weights import SafetensorsReader, TensorSource, check_tensors, load_tensors


class Activation(enum.Enum):
    """Non-linearity of the feed-forward layer."""

    RELU = "relu"
    GELU = "gelu"  # exact, with erf
    GELU_TANH = "gelu_new"  # the tanh approximation: what "gated-gelu" means in every T5 config
    SILU = "silu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Shape of a T5 encoder."""

    vocab_size: int  # rows of the token embedding
    width: int  # d_model: channels of the residual stream
    head_dim: int  # d_kv: channels of one head
    num_heads: int  # heads * head_dim need not be the width
    feed_forward_width: int  # d_ff
    num_layers: int
    activation: Activation = Activation.GELU_TANH
    gated: bool = True  # v1.1 and later: act(x W_gate) * (x W_up)
    bias_per_layer: bool = False  # umT5: every layer has its own relative bias
    num_buckets: int = 32  # relative positions, both directions together
    max_distance: int = 128  # tokens; farther ones share the last bucket
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        for field in ("vocab_size", "width", "head_dim", "num_heads", "feed_forward_width", "num_layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise ValueError(f"num_buckets must be a multiple of 4, got {self.num_buckets}")
        check_numbers(
            self,
            vocab_size=MAX_VOCABULARY,
            num_layers=MAX_BLOCKS,
            **dict.fromkeys(("width", "head_dim", "num_heads", "num_buckets"), MAX_CHANNELS),
            feed_forward_width=8 * MAX_CHANNELS,
        )
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(f"max_distance must exceed num_buckets / 4, got {self.max_distance}")
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"norm_epsilon must be positive and below 1, got {self.norm_epsilon}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "T5Config":
        """From the contents of a Hugging Face config.json.

        Raises:
            UserError: not a T5 encoder, its weights are quantised, or a field is missing or not supported.
        """
        check_config_is_plain(config)
        kind = config.get("model_type")
        if kind not in ("t5", "mt5", "umt5"):
            raise UserError(f"config.json: model_type {kind!r} is not a T5 encoder (t5, mt5 or umt5)")
        fields = ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_layers")
        for field in fields:
            if not isinstance(config.get(field), int) or isinstance(config[field], bool):
                raise UserError(f"config.json: {field} is {config.get(field)!r}, expected a whole number")
        projection = json_field(
            config,
            "feed_forward_proj",
            str,
            "config.json",
            default="relu" if kind == "t5" else "gated-gelu",
        )
        gated = projection.startswith("gated-")
        name = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
        if name not in [activation.value for activation in Activation]:
            raise UserError(f"config.json: feed_forward_proj {projection!r} is not supported")
        values = {
            "vocab_size": config["vocab_size"],
            "width": config["d_model"],
            "head_dim": config["d_kv"],
            "num_heads": config["num_heads"],
            "feed_forward_width": config["d_ff"],
            "num_layers": config["num_layers"],
            "activation": name,
            "gated": gated,
            "bias_per_layer": kind == "umt5",
            "num_buckets": config.get("relative_attention_num_buckets", 32),
            "max_distance": config.get("relative_attention_max_distance", 128),
            "norm_epsilon": config.get("layer_norm_epsilon", 1e-6),
        }
        return build(cls, values, "config.json")

    @classmethod
    def from_folder(cls, folder: epath.PathLike) -> "T5Config":
        """From the config.json of a folder; see `from_dict`."""
        path = epath.Path(folder) / "config.json"
        if not path.exists():
            raise UserError(f"{folder}: no config.json; expected a Hugging Face model folder")
        config = read_json(path)
        try:
            return cls.from_dict(config)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error


def t5_shapes(config: T5Config, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of all parameters; those of the layers have a leading axis over them, matrices are (out, in)."""
    depth, width, hidden = config.num_layers, config.width, config.feed_forward_width
    inner, bias = config.num_heads * config.head_dim, (config.num_buckets, config.num_heads)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding": (config.vocab_size, width),
        "layers.attention_norm": (depth, width),
        "layers.query": (depth, inner, width),
        "layers.key": (depth, inner, width),
        "layers.value": (depth, inner, width),
        "layers.attention_out": (depth, width, inner),
        "layers.feed_forward_norm": (depth, width),
        "layers.feed_forward_up": (depth, hidden, width),
        "layers.feed_forward_down": (depth, width, hidden),
        "final_norm": (width,),
    }
    if config.gated:
        shapes["layers.feed_forward_gate"] = (depth, hidden, width)
    if config.bias_per_layer:
        shapes["layers.relative_bias"] = (depth, *bias)
    else:
        shapes["relative_bias"] = bias
    return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, shape in shapes.items()}


def t5_sources(config: T5Config, names: frozenset[str]) -> dict[str, TensorSource]:
    """Where each parameter lies in a Hugging Face checkpoint that has the tensors `names`."""
    block = "encoder.block.{}.layer."
    feed_forward = block + "1.DenseReluDense."
    table = {
        "layers.attention_norm": block + "0.layer_norm.weight",
        "layers.query": block + "0.SelfAttention.q.weight",
        "layers.key": block + "0.SelfAttention.k.weight",
        "layers.value": block + "0.SelfAttention.v.weight",
        "layers.attention_out": block + "0.SelfAttention.o.weight",
        "layers.feed_forward_norm": block + "1.layer_norm.weight",
        "layers.feed_forward_up": feed_forward + ("wi_1" if config.gated else "wi") + ".weight",
        "layers.feed_forward_down": feed_forward + "wo.weight",
    }
    if config.gated:
        table["layers.feed_forward_gate"] = feed_forward + "wi_0.weight"
    bias = block + "0.SelfAttention.relative_attention_bias.weight"
    if config.bias_per_layer:
        table["layers.relative_bias"] = bias
    depth = range(config.num_layers)
    sources = {
        ours: TensorSource(names=tuple(theirs.format(i) for i in depth), stacked=True)
        for ours, theirs in table.items()
    }
    # The two names are one tied tensor; older files have both, newer ones either.
    shared = "shared.weight" if "shared.weight" in names else "encoder.embed_tokens.weight"
    sources["token_embedding"] = TensorSource(names=(shared,))
    if not config.bias_per_layer:
        sources["relative_bias"] = TensorSource(names=(bias.format(0),))
    sources["final_norm"] = TensorSource(names=("encoder.final_layer_norm.weight",))
    return sources


def load_t5(
    folder: epath.PathLike, *, dtype: Any = jnp.float32, shardings: Any = None, variant: str | None = None
) -> tuple[T5Config, dict[str, jax.Array]]:
    """Opens the encoder of a Hugging Face folder (config.json and safetensors).

    Args:
        folder: local folder; tensors of a decoder are ignored.
        dtype: of the parameters.
        shardings: None, one sharding, or a function from the parameters' shapes to a dictionary of shardings.
        variant: of the weights; see `SafetensorsReader`.

    Returns:
        Its shape, and the parameters of `models.t5.encode`.

    Raises:
        UserError: not a T5 encoder, or its files are missing or do not fit.
    """
    config = T5Config.from_folder(folder)
    abstract = t5_shapes(config, dtype)
    with SafetensorsReader(folder, variant) as reader:
        sources = _checked_sources(config, reader)
        chosen = shardings(abstract) if callable(shardings) else shardings
        return config, load_tensors(abstract, reader, sources, shardings=chosen)


def check_t5(folder: epath.PathLike, *, variant: str | None = None) -> T5Config:
    """Checks an encoder as `load_t5` does, without reading its tensors; raises as that does.

    Returns:
        Its shape.
    """
    config = T5Config.from_folder(folder)
    with SafetensorsReader(folder, variant) as reader:
        check_tensors(t5_shapes(config), reader, _checked_sources(config, reader))
    return config


def _checked_sources(config: T5Config, reader: SafetensorsReader) -> dict[str, TensorSource]:
    """Where each parameter lies in a checkpoint whose tensors are those of an encoder of this shape."""
    if config.num_layers > len(reader.names):
        raise UserError(
            f"{reader.location}: config.json has num_layers {config.num_layers}, but the weights are "
            f"{len(reader.names)} tensors"
        )
    sources = t5_sources(config, reader.names)
    check_t5_tensors(reader)
    _check_nothing_left(reader.location, reader, sources)
    return sources


def check_t5_tensors(reader: SafetensorsReader) -> None:
    """Refuses weights of which an encoder could not be read as they are.

    Raises:
        UserError: they are quantised; names file, tensor and dtype.
    """
    reader.check_plain()
    for name in sorted(reader.names):
        if name.startswith(("encoder.", "shared.")):
            reader.check_float(name)


def _check_nothing_left(
    folder: epath.PathLike, reader: SafetensorsReader, sources: Mapping[str, TensorSource]
) -> None:
    """Refuses tensors of the encoder that would not be read: with them it would compute something else."""
    read = {name for source in sources.values() for name in source.names} | {"encoder.embed_tokens.weight"}
    left = sorted(name for name in reader.names - read if name.startswith("encoder."))
    if left:
        raise UserError(f"{folder}: unexpected tensor {left[0]}; the weights are of another network than T5")
