"""Host memory that loading a large sharded checkpoint takes beyond the arrays it leaves.

python benchmarks/load_weights.py

Writes a T5 encoder of random weights (T5 v1.1-xxl's shapes, fewer layers, several safetensors files under an
index) to a temporary folder, loads it with `load_t5` in a process of its own and samples RssAnon there: pages of
memory-mapped files, and arrays that lie in them, are not counted, copies are. The last line is one JSON object, in
bytes; `fits` says whether the peak stays within three times the largest stored tensor plus 1 GiB beyond the arrays
that are copies.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

WIDTH, HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 4096, 64, 64, 10240, 32128
FILE_BYTES = 10**9  # tensors go into a new file beyond it
BLOCK = 2**22  # float32 values drawn at once, and repeated


def t5_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the hub has them."""
    inner = HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (VOCABULARY, WIDTH),
        "encoder.final_layer_norm.weight": (WIDTH,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, HEADS),
    }
    for i in range(layers):
        block = f"encoder.block.{i}.layer."
        for name in "qkv":
            shapes[f"{block}0.SelfAttention.{name}.weight"] = (inner, WIDTH)
        shapes[f"{block}0.SelfAttention.o.weight"] = (WIDTH, inner)
        shapes[f"{block}0.layer_norm.weight"] = (WIDTH,)
        for name in ("wi_0", "wi_1"):
            shapes[f"{block}1.DenseReluDense.{name}.weight"] = (HIDDEN, WIDTH)
        shapes[f"{block}1.DenseReluDense.wo.weight"] = (WIDTH, HIDDEN)
        shapes[f"{block}1.layer_norm.weight"] = (WIDTH,)
    return shapes


def write_checkpoint(folder: Path, layers: int) -> int:
    """Writes it with a few megabytes of memory; returns its bytes."""
    shapes = t5_shapes(layers)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(math.prod, groups[-1].values())) * 4 + math.prod(shape) * 4 > FILE_BYTES and groups[-1]:
            groups.append({})
        groups[-1][name] = shape
    block = np.random.default_rng(0).standard_normal(BLOCK, np.float32).tobytes()
    weight_map, total = {}, sum(map(math.prod, shapes.values())) * 4
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing") as bar:
        for number, group in enumerate(groups, 1):
            file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            header, offset = {}, 0
            for name, shape in group.items():
                end = offset + math.prod(shape) * 4
                header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
                weight_map[name], offset = file_name, end
            text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
            text += b" " * (-len(text) % 8)
            with (folder / file_name).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for left in range(offset, 0, -len(block)):
                    file.write(block[: min(left, len(block))])
                    bar.update(min(left, len(block)))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "t5", "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": HEAD_DIM}
    config |= {"num_heads": HEADS, "d_ff": HIDDEN, "num_layers": layers, "feed_forward_proj": "gated-gelu"}
    (folder / "config.json").write_text(json.dumps(config))
    return total


def rss_anon() -> int:
    """Anonymous memory of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system's /proc/self/status has no RssAnon")


class Peak(threading.Thread):
    """The largest RssAnon while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._end = 0, threading.Event()

    def run(self) -> None:
        """Samples until `stop`."""
        while not self._end.wait(0.002):
            self.bytes = max(self.bytes, rss_anon())

    def stop(self) -> int:
        """Ends the thread; returns the peak in bytes."""
        self._end.set()
        self.join()
        return max(self.bytes, rss_anon())


def is_mapped(array: Any) -> bool:
    """Whether an array lies in a mapped file."""
    address = array.unsafe_buffer_pointer()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        begin, end = (int(each, 16) for each in span.split("-"))
        if begin <= address < end:
            return name.endswith(".safetensors")
    return False


def load(folder: Path, dtype: str) -> dict[str, float]:
    """Loads the checkpoint in this process."""
    import jax
    import jax.numpy as jnp

    from imagen_jax.models.t5_weights import load_t5
    from imagen_jax.models.weights import WeightReader

    jax.block_until_ready(jnp.zeros(1))
    before, peak = rss_anon(), Peak()
    peak.start()
    start = time.monotonic()
    _, params = load_t5(folder, dtype=jnp.dtype(dtype))
    jax.block_until_ready(params)
    seconds = time.monotonic() - start
    highest = peak.stop()
    leaves = jax.tree.leaves(params)
    with WeightReader(folder) as reader:
        stored = max(math.prod(reader.shape(n)) * reader.dtype(n).itemsize for n in reader.names)
        first = reader.read("shared.weight", (slice(0, 3), slice(None)))
    found = np.asarray(params["token_embedding"][:3])
    if not np.array_equal(found, first.astype(found.dtype)):
        raise SystemExit("the loaded token embedding is not the stored one")
    return {
        "arrays": sum(leaf.nbytes for leaf in leaves),
        "copied": sum(leaf.nbytes for leaf in leaves if not is_mapped(leaf)),
        "before": before,
        "peak": highest,
        "largest_stored": stored,
        "largest_array": max(leaf.nbytes for leaf in leaves),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6, help="of 738 MB each (%(default)s: 5.0 GB in all)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the arrays")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # what the process of its own does
    args = parser.parse_args()
    if args.load is not None:
        print(json.dumps(load(args.load, args.dtype)))
        return
    with tempfile.TemporaryDirectory() as folder:
        total = write_checkpoint(Path(folder), args.layers)
        command = [sys.executable, __file__, f"--load={folder}", f"--dtype={args.dtype}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    # The interpreter and the libraries, `before`, count as well.
    beyond = found["peak"] - found["copied"]
    allowed = 3 * found["largest_stored"] + 2**30
    report = {"checkpoint": total, **found, "beyond_arrays": beyond, "allowed": allowed}
    print(json.dumps({**report, "fits": beyond <= allowed}))


if __name__ == "__main__":
    main()
