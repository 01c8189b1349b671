"""Which model made a picture: short hashes of its stages and of its text encoder; whether that is the model's."""

import hashlib
import json

from etils import epath

from imagen_jax.data.encoder_identity import EncoderIdentity, check_same_encoder
from imagen_jax.files import read_json
from imagen_jax.models.configs import StageConfig
from imagen_jax.sampling.model_folder import WEIGHTS, ModelFolder
from imagen_jax.text.encoder import TextEncoder

# Weights are told apart by their size and by this many blocks of them, spread evenly, the first and the last among
# them: reading tens of gigabytes for a name would take longer than a picture.
_BLOCKS = 64
_BLOCK_BYTES = 4096
_DIGITS = 16
_TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model")


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
    digest, paths = hashlib.sha256(), sorted(folder.iterdir(), key=lambda each: each.name)
    # A folder may have both; then the pickled ones are not looked at.
    weights = ".safetensors" if any(path.suffix == ".safetensors" for path in paths) else ".bin"
    for path in paths:
        if path.suffix in (".json", weights, ".model") and path.is_file():
            _add_file(digest, path)
    return digest.hexdigest()[:_DIGITS]


def encoder_files(folder: epath.PathLike) -> str | None:
    """`encoder_identity` of a folder that holds all of an encoder; None where the tokenizer lies elsewhere."""
    folder = epath.Path(folder)
    complete = any((folder / name).exists() for name in _TOKENIZERS)
    return encoder_identity(folder) if complete else None


def index_encoder(encoder: TextEncoder | epath.PathLike) -> tuple[EncoderIdentity, str | None]:
    """What model_index.json says about a text encoder: its identity, and `encoder_files`.

    Args:
      encoder: opened, or its local folder.

    Raises:
      UserError: it does not open.
    """
    if not isinstance(encoder, TextEncoder):
        encoder = TextEncoder.load(encoder, dtype="bfloat16")  # half the memory, and the same identity
    return encoder.identity, encoder_files(encoder.folder)


def has_files_of(model: ModelFolder, folder: epath.PathLike) -> bool:
    """Whether a folder's text encoder is, file by file, the one that the model was exported with."""
    return model.index.encoder_files is not None and model.index.encoder_files == encoder_files(folder)


def check_encoder(model: ModelFolder, encoder: TextEncoder) -> None:
    """Refuses an encoder that is not the one that a model's stages were trained with, where that is known.

    Raises:
      UserError: it is another.
    """
    # The files say so at once; its embeddings are looked at only where it is in other files or elsewhere.
    if model.index.encoder is None or has_files_of(model, encoder.folder):
        return
    check_same_encoder(
        model.index.encoder,
        encoder.identity,
        f"text encoder {encoder.name} is not the one that the stages were trained with",
        "; put that one back, or export the model again",
    )
