"""`imagen-jax edit`: from a picture of the user's to others that show a prompt."""

import argparse
import math
import sys
from typing import TYPE_CHECKING

from imagen_jax.cli.drawing import (
    add_drawing_flags,
    draw_missing,
    first_seed,
    negative_prompt,
    open_model,
    settings,
    wanted_size,
)
from imagen_jax.errors import UserError

if TYPE_CHECKING:
    from imagen_jax.sampling.cascade import Imagen
    from imagen_jax.sampling.drawing import Drawing
    from imagen_jax.sampling.given import GivenPicture
    from imagen_jax.sampling.record import PictureRecord

EXAMPLE = """example:
  imagen-jax edit circle.png "a small blue circle on a white background" --model=demo --out=edited --strength=0.7
  imagen-jax edit circle.png "a red circle left of a green star" --model=demo --out=edited --mask=mask.png
  imagen-jax edit circle.png "a small red circle" --model=demo --out=edited --outpaint=32,0,32,0

--strength is the schedule's time at which the way begins with the picture: 1 is pure noise, 0.5 as much picture as
noise; it is snapped to the sampler's steps, and what is taken is printed. Of --mask white is painted, and black comes
out unchanged. A picture of a size that the model does not draw is brought to the nearest that it does. Every PNG says
how it was made; --like makes it again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "picture", nargs="?", metavar="PICTURE", help="what to begin with; with --like its own"
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the result shows")
    parser.add_argument(
        "--model",
        help="model folder (`imagen-jax export`), or demo, that in the package; default with --like: the picture's",
    )
    parser.add_argument("--out", required=True, help="folder for the pictures")
    parser.add_argument("--like", metavar="PNG", help="a picture of this command: all that made it")
    change = parser.add_argument_group("what is changed")
    change.add_argument(
        "--strength",
        help="above 0, at most 1, for all stages or one by one (0.6,0.8); default: 0.6, with a mask 1",
    )
    change.add_argument("--mask", metavar="PNG", help="of the picture's size; white: to be painted")
    change.add_argument(
        "--outpaint", metavar="LEFT,TOP,RIGHT,BOTTOM", help="pixels to paint around the picture"
    )
    change.add_argument(
        "--resamplings",
        type=int,
        help="with a mask: how often a stretch of steps is walked, so that both sides fit (default 4)",
    )
    add_drawing_flags(parser, names=("--num_images", "--variations"))


def _margins(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    try:
        if len(parts) == 4:
            return tuple(int(part) for part in parts)
    except ValueError:
        pass
    raise UserError(f"--outpaint {text:.80}: give four whole numbers of pixels, LEFT,TOP,RIGHT,BOTTOM")


def _strengths(text: str, names: list[str]) -> dict[str, float]:
    """By stage name."""
    parts = text.split(",")
    if len(parts) not in (1, len(names)):
        raise UserError(f"--strength {text:.80}: give one value, or one for each of the {len(names)} stages")
    found = {}
    for name, part in zip(names, parts * len(names) if len(parts) == 1 else parts):
        try:
            found[name] = float(part)
        except ValueError:
            raise UserError(f"--strength {text:.80}: {part!r} is not a number") from None
    return found


def _given(args: argparse.Namespace, like: "PictureRecord | None") -> "tuple[GivenPicture, dict]":
    """The picture with its mask, and what its record says of the files."""
    from imagen_jax.sampling.given import GivenPicture, enlarged, read_mask, read_picture

    path = args.picture if args.picture is not None or like is None else like.given_file
    if path is None:
        raise UserError('give a picture and a prompt, as in imagen-jax edit circle.png "a blue circle" …')
    anew = like is None or args.mask is not None or args.outpaint is not None
    mask = args.mask if like is None or anew else like.mask_file
    margins = args.outpaint and _margins(args.outpaint) if like is None or anew else like.outpaint
    if mask is not None and margins:
        raise UserError("--mask and --outpaint: give one of them")
    pixels = read_picture(path, "PICTURE")
    files = {"given_file": str(path), "mask_file": mask, "outpaint": margins or None}
    if margins:
        return enlarged(pixels, *margins), files
    return GivenPicture(pixels=pixels, mask=None if mask is None else read_mask(mask)), files


def _say_strengths(model: "Imagen", drawing: "Drawing") -> None:
    """Where each stage begins."""
    for plan in model.check(drawing):
        sampler = plan.sampling.sampler
        log_snr = float(sampler.log_snrs(plan.stage.schedule)[0])
        begins = "noise alone"
        if plan.begins_with_picture:
            sigma = math.sqrt(1.0 / (1.0 + math.exp(log_snr)))
            begins = f"the picture with noise of sigma {sigma:.3f}"
        print(
            f"{plan.stage.name}: begins with {begins}, step {sampler.first_step} of {sampler.steps}; "
            f"{sampler.network_calls} network calls",
            file=sys.stderr,
        )


def run(args: argparse.Namespace) -> int:
    """Edits the picture and writes the results."""
    from imagen_jax.sampling.record import read_record

    like = None if args.like is None else read_record(args.like)
    if like is not None and like.given is None:
        raise UserError(
            f"--like {args.like} was not made by imagen-jax edit; imagen-jax sample --like makes it again"
        )
    prompt = args.prompt if args.prompt is not None or like is None else like.prompt
    if prompt is None:
        raise UserError('give a picture and a prompt, as in imagen-jax edit circle.png "a blue circle" …')
    given, files = _given(args, like)
    if args.resamplings is not None and given.mask is None:
        raise UserError(f"--resamplings {args.resamplings}: goes with --mask or --outpaint")

    from imagen_jax.sampling.drawing import Drawing
    from imagen_jax.sampling.overrides import resampled

    model = open_model(args, like, args.num_images)
    sampling, until = settings(args, model, like)
    names = [stage.name for stage in model.stages]
    strength: dict[str, float] = {}
    if args.strength is not None or like is None:
        strength = _strengths(args.strength or str(given.usual_strength), names)
    if given.mask is not None and (args.resamplings is not None or like is None):
        sampling = resampled(sampling, args.resamplings)
    drawing = Drawing.of(
        [prompt],
        seed=first_seed(args, like),
        num_images=args.num_images,
        negative_prompt=negative_prompt(args, like),
        sampling=sampling,
        until=until,
        size=wanted_size(args, like),
    )
    drawing = drawing.beginning_with(given, model.stages, strength)
    if drawing.given[0].size != given.size:
        print(
            f"PICTURE is of {given.size} pixels; the model draws {drawing.given[0].size}, to which it is brought",
            file=sys.stderr,
        )
    if like is not None and not args.picture and drawing.given[0].sha256 != like.given:
        raise UserError(f"--like {args.like}: {files['given_file']} is not the picture that it was made of")
    _say_strengths(model, drawing)
    draw_missing(args, model, drawing, like, **files)
    return 0
