"""`imagen-jax sample`: from prompts to PNG files, a grid and a contact sheet."""

import argparse
import codecs
import io
import re
import sys

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
from imagen_jax.files import read_given

_PROMPTS_BYTES = 64 * 2**20  # of a list of prompts
_BREAKS = re.compile("[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+")

EXAMPLE = """example:
  imagen-jax sample "a small red circle on a blue background" --model=demo --out=pictures --num_images=4

Writes one PNG a picture (all that makes it again is in its metadata), grid.png, and index.html with prompts and
seeds. Image j of each prompt has seed SEED + j and depends on its prompt and that seed only. The same command
goes on after an interruption. Sampling flags take one value for all stages, or one a stage, base first, separated
by commas; an empty one keeps the stage's own: --steps=64,32 --guidance=,1.

  imagen-jax sample --like=pictures/00000-a-small-red-circle-on-a-blue-background-2.png --out=again

makes that very picture; flags beside --like replace what it was made with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help='captions; "-" reads them from standard input'
    )
    parser.add_argument(
        "--model",
        help="model folder (`imagen-jax export`), or demo, that in the package; default with --like: the picture's",
    )
    parser.add_argument("--out", required=True, help="folder for the pictures")
    parser.add_argument(
        "--like", metavar="PNG", help="a picture of this command: its prompt, seed and settings"
    )
    parser.add_argument(
        "--prompts_file", help='text file, one prompt a line, comments begin with "# "; "-": standard input'
    )
    add_drawing_flags(parser)


def read_prompts(prompts: list[str], file: str | None) -> list[str]:
    """The prompts of the command line followed by those of the file; "-" is standard input.

    Raises:
      UserError: if the file cannot be read, or is not UTF-8 text.
    """
    found: list[str] = []
    for prompt in prompts:
        found += _standard_input() if prompt == "-" else [prompt]
    if file == "-":
        found += _standard_input()
    elif file is not None:
        where = f"--prompts_file {file}"
        content = read_given(file, "--prompts_file", limit=_PROMPTS_BYTES)
        found += prompt_lines(content, where)
    return found


def _standard_input() -> list[str]:
    # What stands in for it in a notebook may have no bytes.
    stream = getattr(sys.stdin, "buffer", None) or io.BytesIO(
        sys.stdin.read().encode("utf-8", "surrogatepass")
    )
    content = stream.read(_PROMPTS_BYTES + 1)
    if len(content) > _PROMPTS_BYTES:
        raise UserError(f"standard input: more than {_PROMPTS_BYTES} bytes of prompts")
    return prompt_lines(content, "standard input")


def prompt_lines(content: bytes, where: str) -> list[str]:
    """Prompts, one a line; empty lines and comments ("# …") are passed over.

    Only a newline ends a line. Within a line, what else could break it on paper or a screen (U+2028, U+0085, form
    feeds, …) becomes a space.

    Args:
      content: UTF-8, with or without a byte order mark.
      where: what to call it in messages.

    Raises:
      UserError: a line is not UTF-8; names it.
    """
    found = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        try:
            text = _BREAKS.sub(" ", line.decode("utf-8")).strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 text: line {number}: {error.reason}") from error
        if text and text != "#" and not text.startswith("# "):
            found.append(text)
    return found


def run(args: argparse.Namespace) -> int:
    """Samples and writes the pictures."""
    from imagen_jax.sampling.record import read_record

    like = None if args.like is None else read_record(args.like)
    if like is not None and like.given is not None:
        raise UserError(
            f"--like {args.like} was made of another picture; imagen-jax edit --like makes it again"
        )
    prompts = read_prompts(args.prompts, args.prompts_file)
    if not prompts and like is not None:
        prompts = [like.prompt]
    if not prompts:
        raise UserError('give a prompt, as in imagen-jax sample "a red circle" …, --prompts_file or --like')

    if len(args.prompts) > 2 and not any(
        re.search(r"\s", prompt) or not prompt.isascii() for prompt in args.prompts
    ):
        print(
            f"{len(args.prompts)} prompts of one word; a caption of several goes in quotation marks: "
            f'"{" ".join(args.prompts)}"',
            file=sys.stderr,
        )

    from imagen_jax.sampling.drawing import Drawing, wanted_pictures

    wanted = wanted_pictures(prompts, first_seed(args, like), args.num_images)
    size = wanted_size(args, like)
    model = open_model(args, like, len(wanted))
    sampling, until = settings(args, model, like)
    negative = negative_prompt(args, like)
    drawing = Drawing(wanted=wanted, negative_prompt=negative, sampling=sampling, until=until, size=size)
    draw_missing(args, model, drawing, like)
    return 0
