"""The width of the text that a run reads, for a config that does not say it."""

from typing import Any

from imagen_jax.errors import UserError
from imagen_jax.models.t5 import T5Config
from imagen_jax.text.encoder_folder import find_encoder, parts

_FLAG = "--config.stage.network.text_width"


def fill_text_width(values: dict[str, Any]) -> None:
    """Sets an unset `stage.network.text_width` of a config, a nested dictionary, to what its data has.

    That is the width of its online text encoder, or of the embeddings in `data.embeddings` or `data.path`.

    Raises:
      UserError: neither is there; names the flag.
    """
    network, data = values.get("stage", {}), values.get("data", {})
    network = network.get("network", {}) if isinstance(network, dict) else network
    if not isinstance(network, dict) or not isinstance(data, dict):
        return  # `build` says what is wrong with it
    if network.get("text_width") is None:
        network["text_width"] = _width(data)


def _width(data: dict[str, Any]) -> int:
    from imagen_jax.data.pipeline import embedding_width

    name, encoder = "text_encoder", data.get("text_encoder")
    try:
        if isinstance(encoder, str):
            return T5Config.from_folder(parts(find_encoder(encoder))[0]).width
        name = "path" if data.get("embeddings") is None else "embeddings"
        return embedding_width(str(data.get(name)))
    except UserError as error:
        raise UserError(f"{_FLAG} is not set, and --config.data.{name} does not tell it: {error}") from error
