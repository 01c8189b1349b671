"""Draws pictures of captions of a record folder and says how often each is nearest to its own picture.

python benchmarks/nearest.py --model=MODEL --records=RECORDS --out=DIR

Writes DIR/samples.png and DIR/references.png of the first 16 captions. The last line is one JSON object: `top1`,
the rate at which a sample is nearest (squared pixel distance, 16×16) to its own caption's picture among `captions`
of them, and `chance`.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from imagen_jax.data.pictures import decode_picture, resize
from imagen_jax.data.pipeline import RecordSource, record_count
from imagen_jax.data.records import parse
from imagen_jax.evaluation.nearest import nearest
from imagen_jax.parallel.mesh import MeshConfig, make_mesh, use_cpu_devices
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.pictures import grid, save_png
from imagen_jax.sizes import Size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--records", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", required=True)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    use_cpu_devices()
    count = record_count(args.records, args.split)
    chosen = np.random.default_rng(args.seed).choice(count, args.captions, replace=False)
    source = RecordSource(args.records, args.split)
    records = [parse(source[int(i)].data, source.encoder.width, str(i)) for i in chosen]
    model = Imagen.load(args.model, mesh=make_mesh(MeshConfig()))
    side = model.stages[-1].resolution
    made = model.pictures([record.caption for record in records], seed=args.seed, progress=True)
    samples = np.stack([picture.pixels for picture in made])
    references = np.stack([resize(decode_picture(record.image), Size(side, side)) for record in records])
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_png(out / "samples.png", grid(list(samples[:16]), columns=4))
    save_png(out / "references.png", grid(list(references[:16]), columns=4))
    for record in records[:16]:
        print(record.caption)
    top1 = float((nearest(samples, references) == np.arange(len(samples))).mean())
    print(json.dumps({"top1": top1, "captions": len(samples), "chance": 1 / len(samples)}))


if __name__ == "__main__":
    main()
