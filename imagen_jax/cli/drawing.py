"""What the verbs that draw pictures share: their flags, and the way from those to files."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imagen_jax.errors import UserError
from imagen_jax.limits import is_count

if TYPE_CHECKING:
    from etils import epath
    from jax.sharding import Mesh

    from imagen_jax.models.configs import SamplingConfig
    from imagen_jax.sampling.batches import Preview
    from imagen_jax.sampling.cascade import Imagen
    from imagen_jax.sampling.drawing import Drawing
    from imagen_jax.sampling.output import Place
    from imagen_jax.sampling.record import PictureRecord
    from imagen_jax.sizes import Size


def add_drawing_flags(parser: argparse.ArgumentParser, *, names: Sequence[str] = ("--num_images",)) -> None:
    """Adds the flags of all verbs that draw; `names` are those of the number of pictures."""
    parser.add_argument(
        *names, dest="num_images", type=int, default=1, help="pictures of each prompt (default 1)"
    )
    parser.add_argument("--seed", type=int, help="seed of the first picture of each prompt (default 0)")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures drawn at a time (default 16)")
    parser.add_argument("--until", type=int, metavar="PIXELS", help="stop at the stage of this picture size")
    parser.add_argument(
        "--size",
        metavar="WIDTHxHEIGHT",
        help="of the pictures of the last stage drawn; default: its own, square",
    )
    parser.add_argument(
        "--preview", action="store_true", help="keep OUT/preview.png up to date with the batch as it forms"
    )
    parser.add_argument("--negative_prompt", help="what guidance leads away from, in every guided stage")
    _add_sampling_flags(parser.add_argument_group("sampling, by default as the model's stages say"))
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--fsdp", type=int, default=1, help="devices over which weights are split (default 1)"
    )
    machine.add_argument(
        "--rows",
        help="devices over which each picture's rows are split, for all stages or one by one (1,1,4)",
    )
    machine.add_argument(
        "--free_stages",
        action=argparse.BooleanOptionalAction,
        help="whether a stage's weights leave memory after its turn; default: when memory is short",
    )
    machine.add_argument(
        "--cache",
        metavar="DIR",
        help='compiled programs; "off": none; default: $IMAGEN_JAX_CACHE or ~/.cache',
    )


def _add_sampling_flags(group: Any) -> None:
    group.add_argument("--sampler", help="ddpm, ddim, dpmpp, dpmpp_sde, dpmpp_3m or heun")
    group.add_argument(
        "--steps", help="network steps, of one network call each (heun: two, and one in the last: 2*STEPS-1)"
    )
    group.add_argument(
        "--grid", help="where the steps lie: time, log_snr or karras; default: the sampler's own"
    )
    group.add_argument(
        "--timesteps", help="DeepFloyd's name for a grid: leading, fast27, smart27, smart50 or smart100"
    )
    group.add_argument("--eta", help="noise of ddim, 0 (none) to 1")
    group.add_argument("--churn", help="noise of heun, 0 (none) or more")
    group.add_argument("--guidance", help="guidance weight, 1 is off")
    group.add_argument(
        "--guidance_interval", metavar="LOW:HIGH", help='log-SNR in nats between which it applies, or "none"'
    )
    group.add_argument(
        "--guidance_oscillate",
        metavar="STEPS",
        help='guide these first steps, then every other one, or "none"',
    )
    group.add_argument("--guidance_rescale", metavar="PHI", help="share of contrast put back, 0 to 1")
    group.add_argument("--threshold", help="none, static or dynamic")
    group.add_argument("--percentile", help="of dynamic thresholding, in percent (99.5)")
    group.add_argument("--aug_level", help="noise on a stage's low-resolution input, 0 to 1")


def first_seed(args: argparse.Namespace, like: "PictureRecord | None") -> int:
    """Of each prompt's first picture; that of --like unless another is asked for."""
    return args.seed if args.seed is not None else 0 if like is None else like.seed


def negative_prompt(args: argparse.Namespace, like: "PictureRecord | None") -> str | None:
    """What guidance leads away from; that of --like unless another is asked for."""
    return like.negative_prompt if args.negative_prompt is None and like is not None else args.negative_prompt


def open_model(args: argparse.Namespace, like: "PictureRecord | None", pictures: int) -> "Imagen":
    """The model of the flags, or of --like, on the devices that there is work for.

    Raises:
      UserError: no model is named, or a flag does not fit it or the machine.
    """
    folder = args.model if args.model is not None or like is None else like.model
    if folder is None:
        raise UserError(
            "--model is missing: the model folder (`imagen-jax export`), or demo, the model in the package"
        )
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: at least 1")

    from imagen_jax.sampling.cascade import Imagen
    from imagen_jax.sampling.model_folder import ModelFolder

    opened = ModelFolder(folder)
    rows = rows_by_stage(args.rows, [stage.name for stage in opened.stages])
    mesh = drawing_mesh(args, pictures, max(rows.values(), default=1))
    return Imagen.load(opened, mesh=mesh, rows=rows, free_stages=args.free_stages, cache=args.cache)


def rows_by_stage(text: str | None, names: list[str]) -> dict[str, int]:
    """--rows by stage name."""
    if text is None:
        return {}
    parts = text.split(",")
    if len(parts) not in (1, len(names)) or not all(is_count(part.strip()) for part in parts):
        raise UserError(f"--rows {text}: give one whole number, or one for each of the {len(names)} stages")
    return dict(zip(names, map(int, parts * len(names) if len(parts) == 1 else parts)))


def drawing_mesh(args: argparse.Namespace, pictures: int, rows: int) -> "Mesh | None":
    """No more devices than there is work for; None: one."""
    import jax

    from imagen_jax.parallel.mesh import MeshConfig, make_mesh, use_cpu_devices

    if args.fsdp < 1:
        raise UserError(f"--fsdp {args.fsdp}: at least 1")
    busy = min(args.batch_size, pictures)
    if busy > 1 or args.fsdp * rows > 1:
        use_cpu_devices()
    devices = jax.devices()
    if rows == 1 and args.fsdp == 1:
        devices = devices[:busy]
    if len(devices) == 1 and args.fsdp * rows == 1:
        return None
    if len(devices) % (args.fsdp * rows):
        raise UserError(
            f"--fsdp {args.fsdp} and --rows {args.rows or 1} do not divide the {len(devices)} devices"
        )
    return make_mesh(MeshConfig(fsdp=args.fsdp), devices)


def settings(
    args: argparse.Namespace, model: "Imagen", like: "PictureRecord | None"
) -> "tuple[dict[str, SamplingConfig], int | None]":
    """How each stage is sampled, and the size to stop at."""
    from imagen_jax.sampling.overrides import FLAGS, override_all, parse_overrides
    from imagen_jax.sampling.record import check_same_model

    base = {stage.name: stage.sampling for stage in model.stages}
    until = args.until
    if like is not None:
        stages, encoder = model.identities
        check_same_model(like, stages, encoder, str(model.folder.path))
        base |= {each.name: each.sampling for each in like.stages}
        sides = {stage.name: stage.resolution for stage in model.stages}
        until = sides[like.stages[-1].name] if until is None else until
    flags = {name: getattr(args, name) for name in FLAGS}
    made = override_all(list(base.values()), parse_overrides(flags, len(base)))
    return dict(zip(base, made)), until


def _say_what_is_there(places: "list[Place]", like: "PictureRecord | None") -> None:
    import imagen_jax
    from imagen_jax.sampling.output import beside

    if like is not None and like.version != imagen_jax.__version__:
        print(
            f"--like was made by version {like.version}, this is {imagen_jax.__version__}: "
            "the picture may come out otherwise",
            file=sys.stderr,
        )
    there = sum(place.there for place in places)
    if there:
        print(
            f"{there} of {len(places)} {'pictures are' if len(places) > 1 else 'picture is'} there already",
            file=sys.stderr,
        )
    damaged = [place.path.name for place in places if place.damaged]
    if damaged:
        print(
            f"--out holds damaged pictures, which are drawn again: {', '.join(damaged[:3])}", file=sys.stderr
        )
    other = next((place for place in places if not place.there and beside(place)), None)
    if other is not None:
        print(
            f"--out holds pictures made otherwise ({'; '.join(beside(other)[:3])}); they stay, and new ones get "
            f"names such as {other.path.name}",
            file=sys.stderr,
        )


def _previewer(path: "epath.Path") -> "Any":
    from imagen_jax.sampling.pictures import grid, save_png

    def show(preview: "Preview") -> None:
        save_png(path, grid(list(preview.pixels)))

    return show


def wanted_size(args: argparse.Namespace, like: "PictureRecord | None") -> "Size | None":
    """Of the pictures; of those --like unless they stop elsewhere."""
    from imagen_jax.sizes import Size, parse_size

    if args.size is not None:
        return parse_size(args.size, "--size")
    if like is None or like.size is None or args.until is not None:
        return None
    width, height = like.size
    return Size(height, width)


def draw_missing(
    args: argparse.Namespace,
    model: "Imagen",
    drawing: "Drawing",
    like: "PictureRecord | None",
    **files: Any,
) -> None:
    """Draws what is missing in --out and writes the overviews.

    Args:
      args: the flags.
      model: that draws.
      drawing: all that is wanted.
      like: the picture whose settings are taken.
      **files: further fields of the pictures' records.
    """
    from imagen_jax.files import make_folder
    from imagen_jax.sampling import output

    # Checked before the folder is made.
    model.check(drawing, batch_size=args.batch_size)
    records = [
        dataclasses.replace(model.record(drawing, number), **files) for number in range(len(drawing.wanted))
    ]
    for warning in model.text_warnings(drawing):
        print(f"warning: {warning}", file=sys.stderr)
    out = make_folder(args.out)
    places = [output.find_place(out, i // args.num_images, record) for i, record in enumerate(records)]
    _say_what_is_there(places, like)
    numbers = [number for number, place in enumerate(places) if not place.there]
    missing = [places[number] for number in numbers]
    preview = _previewer(out / "preview.png") if args.preview else None
    pictures = model.draw(drawing.part(numbers), batch_size=args.batch_size, progress=True, preview=preview)
    written, fault = set[int](), None
    try:
        for picture in pictures:
            output.save_picture(missing[picture.index], picture.pixels)
            written.add(picture.index)
    except UserError as error:
        fault = error
    lost = {place.path for number, place in enumerate(missing) if number not in written}
    places = [place for place in places if place.path not in lost]
    if fault is not None and not places:
        raise fault
    # A row a prompt; one prompt's many pictures would make a thread.
    row = (
        args.num_images
        if args.num_images > 1 and (len(places) > args.num_images or args.num_images <= 8)
        else None
    )
    shown = output.write_grid(out / "grid.png", places, row)
    output.write_contact_sheet(out / "index.html", places)
    all_of_them = "all" if shown == len(places) else f"the first {shown}"
    print(
        f"{len(places)} picture{'s' * (len(places) != 1)} in {out}; {all_of_them} side by side in "
        f"{out / 'grid.png'}, with prompts and seeds in {out / 'index.html'}"
    )
    if fault is not None:
        raise fault
