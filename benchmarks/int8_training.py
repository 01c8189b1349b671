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
from pathlib import Path

from paired_scores import compared, findings, percent

from imagen_jax.parallel.mesh import MeshConfig, make_mesh, use_cpu_devices
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.text.precompute import PrecomputeConfig, precompute
from imagen_jax.text.store import EmbeddingDtype
from imagen_jax.training.config import load_config
from imagen_jax.training.export import export
from imagen_jax.training.trainer import train


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
    found = {}
    for dtype in (EmbeddingDtype.INT8, EmbeddingDtype.BFLOAT16):
        folder = args.out / dtype.value
        model = Imagen.load(
            trained_model(args.quickstart, folder, dtype, args.train_pictures), mesh=make_mesh(MeshConfig())
        )
        found[dtype.value] = findings(model, args.seeds, folder / f"{dtype.value}.npy")
    report = {"seeds": args.seeds, **{name: percent(rows) for name, rows in found.items()}}
    report |= compared(found["int8"], found["bfloat16"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
