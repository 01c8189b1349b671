"""`imagen-jax precompute`: captions and pictures to records with text embeddings."""

import argparse
import shutil
import sys
import warnings
from typing import Any

from etils import epath

_EXAMPLE = """example:
  imagen-jax precompute --source='webdataset:data/*.tar' --text_encoder=google/t5-v1_1-xxl --out=records
  imagen-jax precompute --source=shapes:count=20000 --text_encoder=models/t5-small --out=records

An interrupted job is continued by the same command. Samples that cannot be used are left out, counted
and listed in OUT/skipped.jsonl."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLE
    parser.add_argument(
        "--source",
        required=True,
        metavar="SPEC",
        help="captioned pictures: shapes[:count=N,resolution=PIXELS,language=en|zh|both,objects=1|2|equal|any,"
        "world=plain|rich,jitter=narrow|wide,siblings=no|yes], "
        "webdataset:PATH/*.tar (img2dataset layout; {00000..00099}.tar, .tar.gz and https:// too), folder:PATH "
        "(captions.jsonl, metadata.jsonl, or a .txt per picture), "
        "tfds:NAME or parquet:PATH",
    )
    _add_encoder_arguments(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="record folder to write, local or cloud")
    parser.add_argument("--split", default="train", help="name of the split to write (%(default)s)")
    parser.add_argument(
        "--max_length", type=int, default=128, metavar="TOKENS", help="longer captions are cut (%(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "int8"],
        default="bfloat16",
        help="of the stored embeddings; int8 has a scale per token and 64 channels (%(default)s)",
    )
    parser.add_argument(
        "--min_side",
        type=int,
        metavar="PIXELS",
        help="leave out pictures whose shorter side is smaller, which training would have to enlarge (default: none)",
    )
    parser.add_argument(
        "--embeddings_only",
        action="store_true",
        help="leave the pictures out: keyed embeddings, to be joined to the pictures of another record folder",
    )
    parser.add_argument(
        "--num_shards", type=int, metavar="N", help="number of files (default: about 1000 pictures in each)"
    )
    parser.add_argument("--name", default="captions", help="first part of the file names (%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="take only the first N samples (default: all)")
    parser.add_argument(
        "--num_processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the job, each started with the same flags (%(default)s)",
    )
    parser.add_argument(
        "--process_index",
        type=int,
        default=0,
        metavar="I",
        help="of this process, from 0 to N-1: it writes the shards I, I+N, … (%(default)s)",
    )


def _add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text_encoder",
        required=True,
        metavar="DIR_OR_HUB_ID",
        help="T5 encoder: a folder, a hub id (ID@REVISION for a revision), or demo, that of the model in the package",
    )
    parser.add_argument(
        "--make_small_encoder",
        action="store_true",
        help="if the folder --text_encoder is not there, make a small encoder of fixed random weights in it, "
        "which knows the words of this source (no download; no substitute for a trained one)",
    )
    parser.add_argument(
        "--pretrain_on",
        metavar="SPEC",
        help="with --make_small_encoder: the encoder learns to find the pictures of this source by their captions, "
        "so that its embeddings tell what belongs together (default: it stays as it was made)",
    )
    parser.add_argument(
        "--pretrain_steps",
        type=int,
        metavar="N",
        help="with --pretrain_on: for how long, 128 pictures a step (default: 3000)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the job and prints its summary; returns the exit code."""
    # Imported here so that --help does not wait for JAX.
    from imagen_jax.errors import UnknownTokensWarning, UserError
    from imagen_jax.text.precompute import PrecomputeConfig, precompute
    from imagen_jax.text.store import EmbeddingDtype

    config = PrecomputeConfig(
        source=args.source,
        text_encoder=args.text_encoder,
        out=args.out,
        split=args.split,
        max_length=args.max_length,
        dtype=EmbeddingDtype(args.dtype),
        num_shards=args.num_shards,
        name=args.name,
        limit=args.limit,
        min_side=args.min_side,
        embeddings_only=args.embeddings_only,
        num_processes=args.num_processes,
        process_index=args.process_index,
    )
    pretraining = _pretraining(args)
    if args.make_small_encoder:
        _make_small_encoder(config, pretraining)
    elif pretraining is not None:
        raise UserError("--pretrain_on: goes with --make_small_encoder; other encoders stay as they are")
    with warnings.catch_warnings():
        warnings.simplefilter("always", UnknownTokensWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        summary = precompute(config)
    _print_summary(config, summary)
    return 0


def _pretraining(args: argparse.Namespace) -> Any:
    """What the flags say about the small encoder's training: a `PretrainingConfig`, or None."""
    from imagen_jax.errors import UserError

    if args.pretrain_on is None:
        if args.pretrain_steps is not None:
            raise UserError(f"--pretrain_steps={args.pretrain_steps}: goes with --pretrain_on")
        return None
    from imagen_jax.text.pretraining import PretrainingConfig

    steps = {} if args.pretrain_steps is None else {"steps": args.pretrain_steps}
    try:
        return PretrainingConfig(source=args.pretrain_on, split=args.split, **steps)
    except ValueError as error:
        raise UserError(f"--pretrain_steps: {error}") from error


def _make_small_encoder(config: Any, pretraining: Any) -> None:
    """Makes the small encoder unless it is there; of several processes, all may try at once."""
    from imagen_jax.errors import UserError
    from imagen_jax.files import is_cloud
    from imagen_jax.text.precompute import source_captions
    from imagen_jax.text.small import make_small_encoder

    def make(folder: epath.Path) -> None:
        # An encoder that learns has use for a further layer; one of random weights only gets noisier.
        layers = 2 if pretraining is None else 3
        make_small_encoder(
            folder, vocabulary_texts=source_captions(config), layers=layers, byte_fallback=True
        )
        if pretraining is not None:
            from imagen_jax.text.pretraining import pretrain

            pretrain(folder, pretraining)

    target = epath.Path(config.text_encoder)
    if is_cloud(target):
        if pretraining is not None:
            raise UserError(f"--pretrain_on: {target} is in the cloud; make the encoder in a local folder")
        # Nothing is renamed there; several processes write the same bytes, and config.json last.
        if not (target / "config.json").exists():
            make(target)
        return
    # A name per process: a killed one finds and overwrites its own.
    temporary = target.parent / f"incomplete.{target.name}.{config.process_index}"
    if not target.exists():
        make(temporary)
        try:
            temporary.rename(target)
        except OSError:
            # Another process was faster; the bytes are the same.
            if not target.exists():
                raise
    shutil.rmtree(temporary, ignore_errors=True)


def _print_summary(config: Any, summary: Any) -> None:
    """What the split holds and what this run did."""
    print(
        f"{summary.captions} captions, {summary.tokens} tokens, {summary.num_bytes / 1e6:.1f} MB "
        f"({summary.bytes_per_caption:.0f} bytes per caption) in {summary.num_complete} shards of {config.out}"
    )
    if summary.written:
        print(f"written now: {summary.written} captions, {summary.captions_per_second:.1f} captions/s")
    elif summary.complete:
        print("everything was there already")
    print(
        f"useful tokens: {summary.useful_share:.1%} of those computed; "
        f"unknown tokens: {summary.unknown_share:.1%}"
    )
    if summary.samples is not None:
        left_out = sum(summary.skipped.values())
        used = summary.samples - left_out
        records = f"{used} records"
        if used != summary.captions:  # several captions of one picture
            records = f"{used} used, with {summary.captions} records,"
        print(f"samples: {summary.samples} = {records} + {left_out} skipped")
    if summary.cut:
        share = 100 * summary.cut / summary.captions
        print(f"cut at --max_length={config.max_length}: {summary.cut} captions ({share:.3g} %)")
    skipped = ", ".join(f"{reason}: {count}" for reason, count in sorted(summary.skipped.items()))
    if skipped:
        listed = f" (listed in {config.out}/skipped.jsonl)" if summary.complete else ""
        print(f"skipped: {skipped}{listed}")
    if not summary.complete:
        missing = summary.num_shards - summary.num_complete
        print(f"shards of other processes are not complete yet: {missing} of {summary.num_shards}")
