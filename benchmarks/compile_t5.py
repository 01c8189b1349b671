"""Compiles a T5 encoder for a TPU slice that is not here, and says what it needs of each device's memory.

JAX_PLATFORMS=cpu python benchmarks/compile_t5.py --topology=v5e:2x4

Needs `pip install libtpu`, and no TPU. The program is the one that `TextEncoder` runs: bfloat16, parameters spread
over all devices, batches of a token budget at each padded length. The last line is one JSON object, in bytes per
device; `fits` says whether the largest batch leaves room in `--memory`.
"""

import argparse
import functools
import json
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from imagen_jax.models.t5 import T5Config
from imagen_jax.models.t5_weights import t5_shapes
from imagen_jax.parallel.jax_internals import get_topology_desc
from imagen_jax.text.encoder import _ROWS, _TOKENS_PER_BATCH, _encode_as, _spread

# google/t5-v1_1-xxl
XXL = T5Config(
    vocab_size=32128, width=4096, head_dim=64, num_heads=64, feed_forward_width=10240, num_layers=24
)


def compile_batch(mesh: jax.sharding.Mesh, length: int) -> dict[str, Any]:
    """Memory per device of one batch of a padded length."""
    abstract = t5_shapes(XXL, jnp.bfloat16)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        _spread(mesh, abstract),
    )
    rows = max(rows for rows in _ROWS if rows * length <= _TOKENS_PER_BATCH)
    spec = PartitionSpec() if rows % mesh.size else PartitionSpec(mesh.axis_names)
    split = NamedSharding(mesh, spec)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=split)
    mask = jax.ShapeDtypeStruct((rows, length), jnp.bool_, sharding=split)
    start = time.monotonic()
    run = jax.jit(functools.partial(_encode_as, XXL, "bfloat16"), static_argnames="dtype")
    compiled = run.lower(params, tokens, mask, dtype=jnp.dtype(jnp.bfloat16)).compile()
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    largest = max(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in abstract.values())
    return {
        "rows": rows,
        "length": length,
        **sizes,
        "total": sum(sizes.values()),
        "largest_parameter_whole": int(largest),
        "compile_s": round(time.monotonic() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[32, 128], help="padded lengths, tokens (32 128)"
    )
    parser.add_argument("--memory", type=float, default=16.0, help="of one device, GiB (%(default)s)")
    args = parser.parse_args()
    # Otherwise libtpu asks a metadata server that only Google's machines have.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topology = get_topology_desc(topology_name=args.topology, platform="tpu")
    count = len(topology.devices)
    mesh = topologies.make_mesh(topology, (count,), ("devices",))
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,))
    batches = []
    for length in args.lengths:
        batches.append(compile_batch(mesh, length))
        print(
            {name: round(value / 2**20, 1) if value > 2**20 else value for name, value in batches[-1].items()}
        )
    peak = max(batch["total"] for batch in batches)
    report = {
        "topology": args.topology,
        "devices": count,
        "batches": batches,
        "peak_gib": round(peak / 2**30, 3),
    }
    print(json.dumps({**report, "fits": peak <= args.memory * 2**30}))


if __name__ == "__main__":
    main()
