"""A folder of pictures: names, what is there already, the grid and the contact sheet."""

import base64
import dataclasses
import enum
import html
import io
import os
import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

import numpy as np
from etils import epath
from PIL import Image

from imagen_jax.config import to_dict
from imagen_jax.errors import UserError
from imagen_jax.files import AtomicFile
from imagen_jax.sampling.pictures import (
    DamagedPictureError,
    begins_as_ours,
    grid,
    read_metadata,
    save_png,
)
from imagen_jax.sampling.record import PictureRecord, read_record, settings_differences

_SLUG_LENGTH = 48  # characters of the prompt in a file's name
_THUMBNAIL = 256  # pixels, longest side of a picture in the contact sheet and in large grids
GRID_PICTURES = 400  # in the grid at most
_GRID_SIDE = 8192  # pixels, beyond which a grid is made of thumbnails


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a picture belongs."""

    path: epath.Path
    record: PictureRecord
    there: bool  # complete, and made in this very way
    damaged: bool = False  # a picture of this program that was cut short is there, and is written anew


def slug(prompt: str) -> str:
    """The prompt as a part of a file's name: letters and digits of any script, all else hyphens."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:_SLUG_LENGTH].rstrip("-_") or "empty"


class _Holds(enum.Enum):
    """What is under a picture's name."""

    NOTHING = "nothing"
    DAMAGED = "damaged"  # a picture of this program, cut short
    THIS = "this"
    ANOTHER = "another"  # made otherwise, or no file of this program: it stays


def _holds(path: epath.Path, record: PictureRecord) -> _Holds:
    if not path.exists():
        return _Holds.NOTHING
    try:
        metadata = read_metadata(path, whole=True)
    except DamagedPictureError:
        return _Holds.DAMAGED if begins_as_ours(path) else _Holds.ANOTHER
    except UserError:  # a stranger's record
        return _Holds.ANOTHER
    return _Holds.THIS if record.same_picture(metadata) else _Holds.ANOTHER


def find_place(folder: epath.Path, index: int, record: PictureRecord) -> Place:
    """The file of a picture: FOLDER/<number of its prompt>-<prompt>-<seed>.png.

    Where that name holds a picture made in another way or a file of somebody else, which stay, "-2" is appended,
    then "-3" and so on.

    Args:
      folder: of the pictures.
      index: number of the prompt in its list.
      record: how the picture is made.
    """
    name, number = f"{index:05d}-{slug(record.prompt)}-{record.seed}", 1
    while True:
        path = folder / f"{name}{'' if number == 1 else f'-{number}'}.png"
        held = _holds(path, record)
        if held is not _Holds.ANOTHER:
            there, damaged = held is _Holds.THIS, held is _Holds.DAMAGED
            return Place(path=path, record=record, there=there, damaged=damaged)
        number += 1


def beside(place: Place) -> list[str]:
    """What differs from the picture of the same prompt and seed that kept its name; nothing if there is none."""
    first = place.path.parent / f"{place.path.name[:5]}-{slug(place.record.prompt)}-{place.record.seed}.png"
    if first == place.path:
        return []
    try:
        old = read_record(first, flag="--out")
    except UserError as error:
        return [str(error).removeprefix("--out ")]
    other = [
        name
        for name in ("prompt", "negative_prompt", "size", "text_encoder", "version")
        if getattr(old, name) != getattr(place.record, name)
    ]
    names = [[(each.name, each.identity) for each in record.stages] for record in (old, place.record)]
    return other + settings_differences(old, place.record) + (["stages"] if names[0] != names[1] else [])


def save_picture(place: Place, pixels: np.ndarray) -> None:
    """Writes a picture with its record."""
    save_png(place.path, pixels, place.record.to_metadata())


def _read(path: epath.Path) -> Image.Image:
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # its checksums fit, or it would not have been kept
        raise UserError(f"{path} is not a readable picture: {error}") from error


def write_grid(path: epath.Path, places: Sequence[Place], columns: int | None) -> int:
    """A picture of the first pictures, side by side; thumbnails where it would become too large.

    Returns:
      How many it shows.
    """
    shown = [_read(place.path) for place in places[:GRID_PICTURES]]
    side = shown[0].size  # a picture that somebody resized is shown like the others
    shown = [image if image.size == side else image.resize(side) for image in shown]
    across = columns or int(np.ceil(np.sqrt(len(shown))))
    if max(across, -(-len(shown) // across)) * max(shown[0].size) > _GRID_SIDE:
        for image in shown:
            image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    save_png(path, grid([np.asarray(image) for image in shown], columns=across))
    return len(shown)


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
section { margin: 0 0 1.5rem; }
h2 { font-size: 1rem; font-weight: 600; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { margin: 0; }
img { display: block; width: 160px; height: 160px; object-fit: contain; }
img.small { image-rendering: pixelated; }
figcaption { font-size: .8rem; opacity: .7; text-align: center; }
pre { overflow-x: auto; font-size: .8rem; }
"""


def _inline(path: epath.Path) -> tuple[str, bool]:
    """A picture as a data address, and whether it is small and shown as it is."""
    image = _read(path)
    small, buffer = max(image.size) <= _THUMBNAIL, io.BytesIO()
    if small:
        image.save(buffer, "PNG")
        kind = "png"
    else:
        image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", small


def _sheet(places: Sequence[Place]) -> Iterable[str]:
    """The contact sheet, piece by piece."""
    first = places[0].record
    settings = {each.name: to_dict(each.sampling) for each in first.stages}
    facts = [f"{len(places)} pictures", f"model {first.model}", f"imagen_jax {first.version}"]
    if first.negative_prompt is not None:
        facts.append(f"negative prompt: {first.negative_prompt}")
    yield (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{len(places)} pictures</title>\n<style>{_STYLE}</style>\n<h1>Pictures</h1>\n"
        f"<p>{html.escape(' · '.join(facts))}</p>\n<details><summary>Settings</summary>\n<pre>"
    )
    for name, values in settings.items():
        yield html.escape(f"{name}: {values}\n")
    yield "</pre></details>\n"
    heading: tuple[str, str] | None = None
    for place in places:
        group = (place.path.name[:5], place.record.prompt)
        if group != heading:
            yield "</div></section>\n" if heading is not None else ""
            yield f'<section><h2>{html.escape(place.record.prompt)}</h2><div class="row">\n'
            heading = group
        source, small = _inline(place.path)
        link, label = quote(place.path.name), html.escape(place.record.prompt, quote=True)
        yield (
            f'<figure><a href="{link}"><img{" class=small" if small else ""} src="{source}" alt="{label}"></a>'
            f"<figcaption>seed {place.record.seed}</figcaption></figure>\n"
        )
    yield "</div></section>\n</html>\n"


def write_contact_sheet(path: epath.Path, places: Sequence[Place]) -> None:
    """One HTML file that needs nothing else: pictures with prompts and seeds, each linked to its PNG beside it."""
    with AtomicFile(path, tag=str(os.getpid())) as file:
        for piece in _sheet(places):
            file.write(piece.encode("utf-8"))
