"""Which model made a picture: short hashes of its stages and of its text encoder."""

import hashlib
import json

from etils import epath

from imagen_jax.files import read_json
from imagen_jax.models.configs import StageConfig
from imagen_jax.sampling.model_folder import WEIGHTS

# Weights are told apart by their size and by this many blocks of them, spread evenly, the first and the last among
# them: reading tens of gigabytes for a name would take longer than a picture.
_BLOCKS = 64
_BLOCK_BYTES = 4096
_DIGITS = 16


def _add_file(digest: "hashlib._Hash", path: epath.Path) -> None:
    size = path.stat().length
    digest.update(f"{path.name} {size}\n".encode())
    with path.open("rb") as file:
        if size <= _BLOCKS * _BLOCK_BYTES:
            digest.update(file.read())
            return
        for number in range(_BLOCKS):
            file.seek(number * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))


def stage_identity(folder: epath.Path, config: StageConfig) -> str:
    """Of a stage's network and weights; its name and default sampling settings have no say.

    Args:
      folder: the model folder.
      config: the stage's.
    """
    # As it stands in the folder: fields that come and go with versions of this package do not make another model.
    written = read_json(folder / config.name / "config.json")
    network = {name: value for name, value in written.items() if name not in ("name", "sampling")}
    digest = hashlib.sha256(json.dumps(network, sort_keys=True).encode())
    _add_file(digest, folder / config.name / WEIGHTS)
    return digest.hexdigest()[:_DIGITS]


def encoder_identity(folder: epath.Path) -> str:
    """Of a text encoder's configuration, tokenizer and weights, wherever they lie."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir(), key=lambda each: each.name):
        if path.suffix in (".json", ".safetensors", ".model") and path.is_file():
            _add_file(digest, path)
    return digest.hexdigest()[:_DIGITS]
