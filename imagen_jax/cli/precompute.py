"""`imagen-jax precompute`: captions and pictures to records with text embeddings."""

import argparse

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
        help="captioned pictures: shapes[:count=N,resolution=PIXELS,language=en|zh|both,objects=1|2|any], "
        "webdataset:PATH/*.tar (img2dataset layout) or folder:PATH (captions.jsonl, or a .txt per picture)",
    )
    parser.add_argument(
        "--text_encoder", required=True, metavar="DIR_OR_HUB_ID", help="T5 encoder: a folder or a hub id"
    )
    parser.add_argument(
        "--make_small_encoder",
        action="store_true",
        help="if the folder --text_encoder is not there, make a small encoder of fixed random weights in it, "
        "which knows the words of this source (no download; no substitute for a trained one)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="record folder to write, local or cloud")
    parser.add_argument("--split", default="train", help="name of the split to write (%(default)s)")
    parser.add_argument(
        "--max_length", type=int, default=128, metavar="TOKENS", help="longer captions are cut (%(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16"], default="bfloat16", help="of the stored embeddings (%(default)s)"
    )
    parser.add_argument(
        "--num_shards", type=int, metavar="N", help="number of files (default: about 1000 pictures in each)"
    )
    parser.add_argument("--name", default="captions", help="first part of the file names (%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="take only the first N samples (default: all)")


def run(args: argparse.Namespace) -> int:
    """Runs the job and prints its summary; returns the exit code."""
    # Imported here so that --help does not wait for JAX.
    from imagen_jax.text.precompute import EmbeddingDtype, PrecomputeConfig, precompute, source_captions

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
    )
    if args.make_small_encoder and not epath.Path(args.text_encoder).exists():
        from imagen_jax.text.small import make_small_encoder

        make_small_encoder(args.text_encoder, vocabulary_texts=source_captions(config))
    summary = precompute(config)
    print(
        f"{summary.captions} captions, {summary.tokens} tokens, {summary.num_bytes / 1e6:.1f} MB "
        f"in {summary.num_shards} shards of {args.out}"
    )
    if summary.written:
        print(f"written now: {summary.written} captions, {summary.captions_per_second:.1f} captions/s")
    else:
        print("everything was there already")
    skipped = ", ".join(f"{reason}: {count}" for reason, count in sorted(summary.skipped.items()))
    if skipped:
        print(f"skipped: {skipped} (listed in {args.out}/skipped.jsonl)")
    return 0
