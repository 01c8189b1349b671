"""Weights of T5 encoders as the hub has them, under the names of `models.t5`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.models.t5 import T5Config, abstract_t5
from imagen_jax.models.weights import (
    TensorSource,
    WeightReader,
    check_tensors,
    flatten_names,
    load_tensors,
)


def t5_shapes(config: T5Config, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of all parameters; those of the layers have a leading axis over them, matrices are (out, in)."""
    return flatten_names(abstract_t5(config, param_dtype=dtype)[1])[0]


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


def hub_tensors(config: T5Config, params: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """An encoder's parameters under the names and in the shapes of a Hugging Face checkpoint: `load_t5` undone."""
    tensors: dict[str, np.ndarray] = {}
    for ours, source in t5_sources(config, frozenset({"shared.weight"})).items():
        layers = np.asarray(params[ours]) if source.stacked else np.asarray(params[ours])[None]
        tensors.update(zip(source.names, layers, strict=True))
    return tensors


def load_t5(
    folder: epath.PathLike, *, dtype: Any = jnp.float32, shardings: Any = None, variant: str | None = None
) -> tuple[T5Config, dict[str, jax.Array]]:
    """Opens the encoder of a Hugging Face folder (config.json and safetensors).

    Args:
        folder: local folder; tensors of a decoder are ignored.
        dtype: of the parameters.
        shardings: None, one sharding, or a function from the parameters' shapes to a dictionary of shardings.
        variant: of the weights; see `WeightReader`.

    Returns:
        Its shape, and the parameters of `models.t5.encode`.

    Raises:
        UserError: not a T5 encoder, or its files are missing or do not fit.
    """
    config = T5Config.from_folder(folder)
    with WeightReader(folder, variant) as reader:
        sources = _checked_sources(config, reader)
        abstract = t5_shapes(config, dtype)
        chosen = shardings(abstract) if callable(shardings) else shardings
        return config, load_tensors(abstract, reader, sources, shardings=chosen)


def check_t5(folder: epath.PathLike, *, variant: str | None = None) -> T5Config:
    """Checks an encoder as `load_t5` does, without reading its tensors; raises as that does.

    Returns:
        Its shape.
    """
    config = T5Config.from_folder(folder)
    with WeightReader(folder, variant) as reader:
        sources = _checked_sources(config, reader)
        check_tensors(t5_shapes(config), reader, sources)
    return config


def _checked_sources(config: T5Config, reader: WeightReader) -> dict[str, TensorSource]:
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


def check_t5_tensors(reader: WeightReader) -> None:
    """Refuses weights of which an encoder could not be read as they are.

    Raises:
        UserError: they are quantised; names file, tensor and dtype.
    """
    reader.check_plain()
    for name in sorted(reader.names):
        if name.startswith(("encoder.", "shared.")):
            reader.check_float(name)


def _check_nothing_left(
    folder: epath.PathLike, reader: WeightReader, sources: Mapping[str, TensorSource]
) -> None:
    """Refuses tensors of the encoder that would not be read: with them it would compute something else."""
    read = {name for source in sources.values() for name in source.names} | {"encoder.embed_tokens.weight"}
    left = sorted(name for name in reader.names - read if name.startswith("encoder."))
    if left:
        raise UserError(f"{folder}: unexpected tensor {left[0]}; the weights are of another network than T5")
