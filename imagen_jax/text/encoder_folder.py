"""Where a text encoder's files are: a folder, a pipeline's folders or the hub; looked at and copied."""

from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.files import copy_file, make_folder
from imagen_jax.models.t5 import T5Config
from imagen_jax.models.t5_weights import check_t5, check_t5_tensors
from imagen_jax.models.weights import SafetensorsReader
from imagen_jax.text.tokenizer import TOKENIZER_FILES, CaptionTokenizer

_HUB_FILES = ("*.safetensors", "*.safetensors.index*.json", "config.json", *TOKENIZER_FILES)


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a repository on the hub, "owner/name", and no local path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def download(hub_id: str) -> epath.Path:
    """The hub's copy of an encoder, weights in safetensors only, from the cache or the network.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    if not is_hub_id(hub_id):
        raise UserError(f"text encoder {hub_id}: no such folder")
    # Only here: importing it takes longer than opening a small local encoder.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        return epath.Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except HFValidationError as error:
        raise UserError(f"text encoder {hub_id}: neither a folder nor a hub id") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(
            f"text encoder {hub_id}: no such folder, and not to be had from the hub "
            f"({type(error).__name__}); check the name and the network, or give a local folder"
        ) from error


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
        variant: of the weights, see `SafetensorsReader`.

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
        variant: of the weights, see `SafetensorsReader`; the copy has it in its files' names too.

    Raises:
        UserError: not a T5 encoder, or weights that are pickled or quantised.
    """
    model, words = parts(epath.Path(source))
    T5Config.from_folder(model)
    with SafetensorsReader(model, variant) as reader:
        check_t5_tensors(reader)
        files = [model / "config.json", *reader.files]
        if len(reader.files) > 1:
            files += [
                each for each in model.glob("*.safetensors.index*.json") if (variant or "") in each.name
            ]
    moves = [(file, epath.Path(folder)) for file in files]
    target = epath.Path(folder if tokenizer is None else tokenizer)
    moves += [(words / name, target) for name in TOKENIZER_FILES if (words / name).exists()]
    for file, place in moves:
        # Under another name first: an encoder that is in use has its file mapped.
        copy_file(file, make_folder(place) / file.name)
