"""Pictures per second and core of the input pipeline against a PyTorch DataLoader on the same records.

python benchmarks/input.py

Makes a record folder of JPEGs of 256×256 pixels with text embeddings in a temporary folder. Both sides read the
TFRecords at random through an index of offsets, decode, cut 64×64 pixels out at random, and pad and mask the
embedding, in batches.
Both are kept to the same cores; the DataLoader has a worker process a core. Rounds alternate. The last line is one
JSON object: medians of pictures/s and core, and of the ratios ours / PyTorch.
"""

import argparse
import io
import json
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from imagen_jax.data import records
from imagen_jax.data.pipeline import PipelineConfig, open_batches
from imagen_jax.data.tfrecord import TFRecordWriter, index_offsets
from imagen_jax.sizes import Size

SIDE, CROP, WIDTH, LENGTH = 256, 64, 512, 128
NAME, SPLIT = "bench", "train"


def jpeg(generator: np.random.Generator) -> bytes:
    """A picture with detail at all scales, as photographs have."""
    total = np.zeros((SIDE, SIDE, 3), np.float32)
    for size in (4, 8, 16, 32, 64, 128):
        coarse = Image.fromarray(generator.integers(0, 256, (size, size, 3), np.uint8))
        total += np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / size
    total = (total - total.min()) / (total.max() - total.min()) * 255
    encoded = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def write_records(folder: Path, count: int, shards: int = 4) -> list[Path]:
    """A record folder as `precompute` writes it; returns its shards."""
    generator, paths, lengths, num_bytes = np.random.default_rng(0), [], [], 0
    pictures = [jpeg(generator) for _ in range(min(count, 256))]
    for shard in range(shards):
        paths.append(folder / records.shard_name(NAME, SPLIT, shard, shards))
        with TFRecordWriter(paths[-1]) as writer:
            for i in range(shard, count, shards):
                tokens = int(generator.integers(5, 40))
                record = records.Record(
                    key=str(i),
                    image=pictures[i % len(pictures)],
                    caption=f"picture {i}",
                    text_embedding=generator.standard_normal((tokens, WIDTH)).astype(ml_dtypes.bfloat16),
                )
                writer.write(records.serialize(record))
        lengths.append(writer.num_records)
        num_bytes += writer.num_bytes
    split = records.SplitInfo(name=SPLIT, shard_lengths=tuple(lengths), num_bytes=num_bytes)
    encoder = records.EncoderInfo(
        text_encoder="none", width=WIDTH, max_length=LENGTH, dtype="bfloat16", source={SPLIT: "benchmark"}
    )
    info = records.FolderInfo(path=folder, name=NAME, splits={SPLIT: split}, encoder=encoder)
    records.write_folder_info(info)
    return paths


class TorchRecords(torch.utils.data.Dataset):
    """The same records, written as one would for PyTorch: Pillow, NumPy and the protocol buffer."""

    def __init__(self, paths: list[Path]):
        self._where = [(path, int(start)) for path in paths for start in index_offsets(path)[:-1]]

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        path, start = self._where[number]
        with path.open("rb") as file:
            file.seek(start)
            (length,) = struct.unpack("<Q4x", file.read(12))
            data = file.read(length)
        feature = tf_example_pb2.Example.FromString(data).features.feature
        with Image.open(io.BytesIO(feature["image"].bytes_list.value[0])) as opened:
            left, top = torch.randint(0, SIDE - CROP + 1, (2,)).tolist()
            picture = opened.convert("RGB").crop((left, top, left + CROP, top + CROP))
        stored = np.frombuffer(feature["text_embedding"].bytes_list.value[0], np.int16).reshape(-1, WIDTH)
        text = np.zeros((LENGTH, WIDTH), np.int16)
        text[: len(stored)] = stored[:LENGTH]
        return {
            "image": torch.from_numpy(np.array(picture)),
            "text": torch.from_numpy(text).view(torch.bfloat16),
            "text_mask": torch.arange(LENGTH) < len(stored),
        }


def torch_batches(dataset: TorchRecords, batch: int, cores: int) -> Iterator[Any]:
    """Endless, with workers that stay."""
    loader = torch.utils.data.DataLoader(
        dataset, batch, shuffle=True, num_workers=cores, persistent_workers=True, drop_last=True
    )
    while True:
        yield from loader


def rate(batches: Iterator[Any], count: int) -> float:
    """Batches per second."""
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=40, help="per round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=1, help="that each side may use (%(default)s)")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {"ours": [], "torch": []}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_records(Path(folder), args.records)
        config = PipelineConfig(
            path=folder,
            split=SPLIT,
            size=Size(SIDE, SIDE),
            crop=CROP,
            max_text_length=LENGTH,
            batch_size=args.batch_size,
            seed=0,
            num_threads=args.cores,
        )
        theirs = torch_batches(TorchRecords(paths), args.batch_size, args.cores)
        for number in range(args.rounds):
            # Opened anew: one that waits between its rounds would fill its buffer at the others' cost.
            with open_batches(config, start_example=number * args.batch_size) as ours:
                rate(ours, 2)
                found["ours"].append(rate(ours, args.batches) * args.batch_size / args.cores)
            rate(theirs, 4)  # what the workers prepared while ours ran
            found["torch"].append(rate(theirs, args.batches) * args.batch_size / args.cores)
            print(number, {name: round(values[-1], 1) for name, values in found.items()}, flush=True)
    report: dict[str, Any] = {
        f"{name}_per_s_and_core": round(statistics.median(values), 1) for name, values in found.items()
    }
    report["ratio"] = round(
        statistics.median(a / b for a, b in zip(found["ours"], found["torch"], strict=True)), 3
    )
    print(json.dumps({"cores": args.cores, **report}))


if __name__ == "__main__":
    main()
