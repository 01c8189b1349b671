"""The whole way in one call: embedded data → records → two stages → model folder → pictures → scores."""

import dataclasses
import json
import time
from typing import Any

from etils import epath

from imagen_jax import demo
from imagen_jax.data import shapes
from imagen_jax.errors import UserError
from imagen_jax.evaluation import oracle
from imagen_jax.files import make_folder
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.sampling.cascade import Imagen, Picture
from imagen_jax.sampling.pictures import grid, save_png
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.precompute import PrecomputeConfig, precompute
from imagen_jax.training.config import load_config
from imagen_jax.training.export import export
from imagen_jax.training.trainer import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is done."""

    variant: str  # of the configs
    train_pictures: int  # records drawn for training
    test_pictures: int  # held-out records for the sample grids
    scored: int  # held-out captions of one object that are sampled and scored
    scored_pairs: int  # held-out captions of two objects


SCALES = {
    "full": Scale(variant="", train_pictures=20_000, test_pictures=64, scored=256, scored_pairs=64),
    "smoke": Scale(variant=":smoke", train_pictures=64, test_pictures=16, scored=8, scored_pairs=4),
}


def held_out_captions(count: int, objects: int) -> list[str]:
    """Captions of scenes whose (colour, shape) pairs never occur in training."""
    return [shapes.scene(index, split="test", objects=objects).caption for index in range(count)]


def _score(model: Imagen, captions: list[str]) -> tuple[list[Picture], dict[str, Any]]:
    made = model.pictures(captions, seed=0, batch_size=64, progress=True)
    return made, oracle.score([picture.pixels for picture in made], captions)


def _table(scores: dict[str, Any], title: str) -> str:
    """The oracle's findings as lines of text."""
    rows = [f"{title}"]
    for name, value in scores.items():
        rows.append(
            f"  {name:<11}" + (f"{100 * value:6.1f} %" if isinstance(value, float) else f"{value:6d}")
        )
    return "\n".join(rows)


def _announce(number: int, what: str) -> None:
    print(f"\n[{number}/6] {what}", flush=True)


def quickstart(out: epath.PathLike, *, scale: str = "full") -> dict[str, Any]:
    """Trains a small cascade on the embedded data and scores its pictures of held-out captions.

    An interrupted run goes on where it was when it is called again.

    Args:
      out: gets text_encoder/, records/, base/, sr/ (work directories), model/, grid.png and scores.json.
      scale: "full" or "smoke".

    Returns:
      The contents of scores.json.

    Raises:
      UserError: for an unknown scale, or an `out` that holds something else.
    """
    if scale not in SCALES:
        raise UserError(f"--scale must be one of {', '.join(SCALES)}; got {scale!r}")
    sizes, out, started = SCALES[scale], epath.Path(out), time.monotonic()
    encoder, records, model_folder = out / "text_encoder", out / "records", out / "model"
    make_folder(out)
    _announce(1, "the frozen text encoder, that of the model in the package")
    if not (encoder / "config.json").exists():
        TextEncoder.load(demo.FOLDER / "text_encoder").save_copy(encoder)
    _announce(2, "captions and pictures → records with text embeddings")
    for split, count in (("train", sizes.train_pictures), ("test", sizes.test_pictures)):
        source = f"shapes:count={count},resolution=64"
        precompute(PrecomputeConfig(source=source, text_encoder=str(encoder), out=str(records), split=split))
    for number, config, name in ((3, "base16", "base"), (4, "sr64", "sr")):
        _announce(number, f"training {config}")
        overrides = [f"--config.data.path={records}"]
        train(load_config(f"shapes/{config}.py{sizes.variant}", overrides), out / name)
    _announce(5, "export to a model folder")
    export([out / "base", out / "sr"], model_folder, text_encoder=str(encoder))
    _announce(6, f"pictures of {sizes.scored} held-out captions")
    model = Imagen.load(model_folder, mesh=make_mesh(MeshConfig()))
    made, scores = _score(model, held_out_captions(sizes.scored, 1))
    pairs_made, pair_scores = _score(model, held_out_captions(sizes.scored_pairs, 2))
    shown = [picture.pixels for picture in made[:48] + pairs_made[:16]]
    save_png(out / "grid.png", grid(shown, columns=8))
    minutes = round((time.monotonic() - started) / 60, 2)
    result = {**scores, "two_objects": pair_scores, "minutes": minutes}
    (out / "scores.json").write_text(json.dumps(result, indent=2) + "\n")
    print(_table(scores, f"\nOne object, {sizes.scored} held-out captions"))
    print(_table(pair_scores, f"Two objects, {sizes.scored_pairs} held-out captions"))
    print(f"{minutes} minutes\nmodel:    {model_folder}\npictures: {out / 'grid.png'}", flush=True)
    return result
