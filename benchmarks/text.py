"""Captions per second of the text encoder against transformers' T5EncoderModel on PyTorch, on the CPU.

python benchmarks/text.py

Both have the same random weights (T5 v1.1-small's shape), captions, tokenizer and number of threads. One round
measures, one after the other, so that a busy machine slows all alike:
  ours         `TextEncoder.encode` of all captions, tokenizer and copies included
  torch_128    PyTorch, every caption padded to 128 tokens (of the first --padded captions)
  torch_sorted PyTorch given the captions sorted by length, each batch padded to its longest
  equal        both on the same padded batches of token ids, turn by turn, networks alone
The last line is one JSON object: medians over the rounds of captions/s and of the ratios ours / PyTorch, and the
share of real tokens among those computed.
"""

import argparse
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import T5Config, T5EncoderModel

from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.small import make_small_encoder

DATA = Path(__file__).parents[2] / "shared" / "data"
TOKENS_PER_BATCH = 4096
PADDED_LENGTH = 128
EQUAL_ROWS = 128


def read_captions(prompts: Path, emoji: Path) -> list[str]:
    """Distinct captions, in order."""
    captions = [line.split("\t")[0] for line in prompts.read_text(encoding="utf-8").splitlines()[1:]]
    for path in sorted(emoji.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".txt") else None
                if file is not None:
                    captions.append(file.read().decode("utf-8").strip())
    return list(dict.fromkeys(filter(None, captions)))


def make_folder(folder: Path, captions: list[str]) -> None:
    """A text encoder of T5 v1.1-small's shape and random weights, whose tokenizer knows the captions' words."""
    make_small_encoder(folder, vocabulary_texts=captions, width=8, layers=1)  # for its tokenizer
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder)


def batches(rows: list[list[int]], length: Callable[[int], int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids and mask in batches of a token budget; `length` gives the padded one for a batch's longest."""
    start = 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and (stop + 1 - start) * length(len(rows[stop])) <= TOKENS_PER_BATCH:
            stop += 1
        group = rows[start:stop]
        padded = length(max(map(len, group)))
        tokens = np.zeros((len(group), padded), np.int64)
        for i, ids in enumerate(group):
            tokens[i, : len(ids)] = ids
        yield tokens, np.arange(padded) < np.array([[len(ids)] for ids in group])
        start = stop


def run_torch(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        ids, attention = torch.from_numpy(tokens), torch.from_numpy(mask.astype(np.int64))
        return model(input_ids=ids, attention_mask=attention).last_hidden_state.numpy()


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def equal_batches(rows: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Full batches of EQUAL_ROWS texts padded to 8, 16 and 32 tokens: the same few shapes for both."""
    made = []
    for length in (8, 16, 32):
        chosen = [ids for ids in rows if length // 2 < len(ids) <= length]
        for start in range(0, len(chosen) - EQUAL_ROWS + 1, EQUAL_ROWS):
            made += list(batches(chosen[start : start + EQUAL_ROWS], lambda _, length=length: length))
    if not made:
        raise SystemExit(f"--captions: too few for a batch of {EQUAL_ROWS} of about the same length")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, default=DATA / "prompts" / "PartiPrompts.tsv")
    parser.add_argument("--emoji", type=Path, default=DATA / "emoji", help="folder of tars with .txt members")
    parser.add_argument("--captions", type=int, help="use only the first N (default: all)")
    parser.add_argument("--padded", type=int, default=128, help="captions padded to 128 (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    captions = read_captions(args.prompts, args.emoji)[: args.captions]
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), captions)
        ours, theirs = TextEncoder.load(folder), T5EncoderModel.from_pretrained(folder).eval()
    report = measure(ours, theirs, captions, args)
    print(json.dumps({"captions": len(captions), "threads": args.threads, "rounds": args.rounds, **report}))


def measure(ours: TextEncoder, theirs: Any, captions: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Compares the results, then times."""
    rows = ours.tokenize(captions, PADDED_LENGTH)
    same = equal_batches(sorted(rows, key=len))

    def run_ours(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.asarray(ours.encode_tokens(*jax.device_put((tokens.astype(np.int32), mask))))

    def sorted_by_length() -> None:
        tokenized = sorted(ours.tokenize(captions, PADDED_LENGTH), key=len)
        for batch in batches(tokenized, lambda longest: longest):
            run_torch(theirs, *batch)

    def padded() -> None:
        tokenized = ours.tokenize(captions[: args.padded], PADDED_LENGTH)
        for batch in batches(tokenized, lambda _: PADDED_LENGTH):
            run_torch(theirs, *batch)

    # The first call of each compiles; it also shows that both compute the same.
    encoded = ours.encode(captions)
    error = 0.0
    for tokens, mask in same[:1] + same[-1:]:
        error = max(
            error, float(np.abs(run_ours(tokens, mask) - run_torch(theirs, tokens, mask))[mask].max())
        )
    if [len(each) for each in encoded] != [len(ids) for ids in rows] or error > 1e-3:
        raise SystemExit(f"the two encoders differ by {error}")
    found: dict[str, list[float]] = {"ours": [], "torch_sorted": [], "torch_128": [], "equal_ours": []}
    found["equal_torch"] = []
    for number in range(args.rounds):
        found["ours"].append(len(captions) / seconds(lambda: ours.encode(captions)))
        found["torch_sorted"].append(len(captions) / seconds(sorted_by_length))
        found["torch_128"].append(min(args.padded, len(captions)) / seconds(padded))
        both = [0.0, 0.0]
        for batch in same:
            both[0] += seconds(lambda batch=batch: run_ours(*batch))
            both[1] += seconds(lambda batch=batch: run_torch(theirs, *batch))
        count = sum(len(tokens) for tokens, _ in same)
        found["equal_ours"].append(count / both[0])
        found["equal_torch"].append(count / both[1])
        print(number, {name: round(values[-1], 1) for name, values in found.items()}, flush=True)

    def ratio(top: str, bottom: str) -> float:
        pairs = zip(found[top], found[bottom], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    report: dict[str, Any] = {
        f"{name}_per_s": round(statistics.median(values), 1) for name, values in found.items()
    }
    report["ratio_padded_to_128"] = ratio("ours", "torch_128")
    report["ratio_sorted"] = ratio("ours", "torch_sorted")
    report["ratio_equal_batches"] = ratio("equal_ours", "equal_torch")
    counts = ours.count_tokens(captions, max_length=PADDED_LENGTH)
    report["useful_tokens"] = round(counts.useful / counts.computed, 4)
    report["largest_difference"] = error
    return report


if __name__ == "__main__":
    main()
