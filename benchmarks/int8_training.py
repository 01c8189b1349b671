"""Pictures of a stage trained on int8 embeddings against those of one trained on bfloat16 ones.

python benchmarks/int8_training.py --quickstart=runs/quickstart --out=DIR

The base stage of the quickstart is trained twice, from the same seed, on the same embedded pictures, whose embeddings
are stored in either precision by the quickstart's own text encoder. Each is joined to the quickstart's SR stage, and
both cascades draw the same held-out captions with the same seeds. The last line is one JSON object: the oracle's
findings for each, in per cent, the differences in points (int8 − bfloat16), and their standard errors over the pairs.
An interrupted run goes on where it was.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from imagen_jax.evaluation import oracle
from imagen_jax.parallel.mesh import MeshConfig, make_mesh, use_cpu_devices
from imagen_jax.quickstart import held_out_captions
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.text.precompute import PrecomputeConfig, precompute
from imagen_jax.text.store import EmbeddingDtype
from imagen_jax.training.config import load_config
from imagen_jax.training.export import export
from imagen_jax.training.trainer import train

CHUNK = 64
ATTRIBUTES = ("background", "colour", "size", "shape")


def trained_model(quickstart: Path, out: Path, dtype: EmbeddingDtype, pictures: int) -> Path:
    """Records, base stage and model folder of one precision."""
    encoder = str(quickstart / "text_encoder")
    for split, count in (("train", pictures), ("test", 64)):
        source = f"shapes:count={count},resolution=64"
        records = str(out / "records")
        precompute(
            PrecomputeConfig(source=source, text_encoder=encoder, out=records, split=split, dtype=dtype)
        )
    train(load_config("shapes/base16.py", [f"--config.data.path={out / 'records'}"]), out / "base")
    export([out / "base", quickstart / "sr"], out / "model", text_encoder=encoder)
    return out / "model"


def fulfilled(model: Imagen, captions: list[str], path: Path) -> np.ndarray:
    """Whether each picture has each attribute of its caption, bool (N, attributes); kept in `path` on the way."""
    found = np.load(path) if path.exists() else np.zeros((0, len(ATTRIBUTES)), bool)
    for start in range(len(found), len(captions), CHUNK):
        chunk = captions[start : start + CHUNK]
        made = model.pictures(chunk, seed=start, batch_size=CHUNK)
        rows = []
        for picture, caption in zip(made, chunk, strict=True):
            parts = oracle.check(picture.pixels, caption)
            rows.append([parts.get(name, True) for name in ATTRIBUTES])
        found = np.concatenate([found, np.array(rows)])
        np.save(path, found)
        print(f"{path.parent.name}: {len(found)} of {len(captions)} pictures", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, required=True, help="what `imagen-jax quickstart` left")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2048, help="pictures of each cascade (%(default)s)")
    parser.add_argument("--train_pictures", type=int, default=20_000)
    args = parser.parse_args()
    use_cpu_devices()
    captions = held_out_captions(args.seeds, 1)
    found = {}
    for dtype in (EmbeddingDtype.INT8, EmbeddingDtype.BFLOAT16):
        folder = args.out / dtype.value
        model = Imagen.load(
            trained_model(args.quickstart, folder, dtype, args.train_pictures), mesh=make_mesh(MeshConfig())
        )
        found[dtype.value] = fulfilled(model, captions, folder / "fulfilled.npy")
    report: dict[str, Any] = {"seeds": args.seeds}
    for name, rows in found.items():
        report[name] = dict(zip(ATTRIBUTES, np.round(100 * rows.mean(0), 2).tolist()))
        report[name]["fulfilled"] = round(100 * float(rows.all(1).mean()), 2)
    pairs = {name: np.column_stack([rows, rows.all(1)]).astype(float) for name, rows in found.items()}
    points = 100 * (pairs["int8"] - pairs["bfloat16"])
    names = (*ATTRIBUTES, "fulfilled")
    report["difference"] = dict(zip(names, np.round(points.mean(0), 2).tolist()))
    errors = points.std(0) / math.sqrt(len(points))
    report["standard_error"] = dict(zip(names, np.round(errors, 2).tolist()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
