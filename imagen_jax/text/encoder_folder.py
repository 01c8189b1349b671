"""Where a text encoder's files are: a folder, a pipeline's folders or the hub; looked at and copied."""

import os
from collections.abc import Iterable

from etils import epath

from imagen_jax.demo import packaged
from imagen_jax.errors import UserError
from imagen_jax.files import copy_file, make_folder
from imagen_jax.models.t5 import T5Config
from imagen_jax.models.t5_weights import check_t5, check_t5_tensors
from imagen_jax.models.weights import WeightReader
from imagen_jax.text.tokenizer import TOKENIZER_FILES, CaptionTokenizer

_HUB_FILES = ("config.json", *TOKENIZER_FILES)
_SAFETENSORS = ("*.safetensors", "*.safetensors.index*.json")
_PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index*.json")


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a repository on the hub, "owner/name" or "owner/name@revision", and no path."""
    return name.partition("@")[0].count("/") == 1 and not name.startswith((".", "/", "~"))


def split_hub_id(name: str) -> tuple[str, str | None]:
    """Repository and revision (a branch, tag or commit) of "owner/name@revision"; None: the main one."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def download(hub_id: str) -> epath.Path:
    """The hub's copy of an encoder, from the cache or the network.

    Pickled weights are fetched where a repository has no others.

    Args:
        hub_id: "owner/name" or "owner/name@revision".

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    if not is_hub_id(hub_id):
        raise UserError(f"text encoder {hub_id}: no such folder")
    # Only here: importing it takes longer than opening a small local encoder.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    repository, revision = split_hub_id(hub_id)

    def fetch(weights: Iterable[str]) -> epath.Path:
        wanted = [*_HUB_FILES, *weights]
        return epath.Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))

    try:
        folder = fetch(_SAFETENSORS)
        return folder if any(folder.glob("*.safetensors")) else fetch(_PICKLED)
    except HFValidationError as error:
        raise UserError(f"text encoder {hub_id}: neither a folder nor a hub id") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(
            f"text encoder {hub_id}: no such folder, and not to be had from the hub "
            f"({type(error).__name__}); check the name and the network, or give a local folder"
        ) from error


def find_encoder(folder_or_hub_id: epath.PathLike) -> epath.Path:
    """The local folder of an encoder: as it is named, the one in the box, or the hub's copy; raises as `download`."""
    folder = epath.Path(packaged(folder_or_hub_id))
    return folder if folder.is_dir() else download(os.fspath(folder_or_hub_id))


def parts(folder: epath.Path) -> tuple[epath.Path, epath.Path]:
    """The folders of the model and of the tokenizer, which pipeline folders keep side by side."""
    model = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    for candidate in (model, model.parent / "tokenizer"):
        if any((candidate / name).exists() for name in TOKENIZER_FILES):
            return model, candidate
    # ByT5 needs no vocabulary: config.json names its class.
    return model, model


def check_encoder_folder(source: epath.PathLike, *, variant: str | None = None) -> None:
    """Looks at an encoder's files without reading its weights, before anything is made for it.

    Args:
        source: a local folder as `TextEncoder.load` takes it.
        variant: of the weights, see `WeightReader`.

    Raises:
        UserError: as `TextEncoder.load`.
    """
    model, words = parts(epath.Path(source))
    config = check_t5(model, variant=variant)
    CaptionTokenizer.load(words, model, rows=config.vocab_size)


def copy_encoder(
    source: epath.PathLike,
    folder: epath.PathLike,
    *,
    tokenizer: epath.PathLike | None = None,
    variant: str | None = None,
) -> None:
    """Copies an encoder's config.json, weights and tokenizer, file by file, so that `TextEncoder.load` opens it.

    Args:
        source: a local folder as `TextEncoder.load` takes it.
        folder: where to.
        tokenizer: where the tokenizer goes; None: into the same folder.
        variant: of the weights, see `WeightReader`; the copy has it in its files' names too.

    Raises:
        UserError: not a T5 encoder, or weights that are quantised.
    """
    model, words = parts(epath.Path(source))
    T5Config.from_folder(model)
    with WeightReader(model, variant) as reader:
        check_t5_tensors(reader)
        files = [model / "config.json", *reader.files]
        if len(reader.files) > 1:
            indexes = model.glob(f"*{reader.files[0].suffix}.index*.json")
            files += [index for index in indexes if (variant or "") in index.name]
    moves = [(file, epath.Path(folder)) for file in files]
    target = epath.Path(folder if tokenizer is None else tokenizer)
    moves += [(words / name, target) for name in TOKENIZER_FILES if (words / name).exists()]
    # A folder with a configuration is complete: it comes last.
    for file, place in sorted(moves, key=lambda move: move[0].name == "config.json"):
        # Under another name first: an encoder that is in use has its file mapped.
        copy_file(file, make_folder(place) / file.name)
