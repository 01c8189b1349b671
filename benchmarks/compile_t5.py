"""Compiles a T5 encoder for a TPU slice that is not here: memory of each chip, predicted tokens/s and MFU.

python benchmarks/compile_t5.py --topology=v5e:2x4

Needs `pip install 'imagen_jax[plan]'`, and no TPU. The programs are those that `TextEncoder` runs: bfloat16, a batch of
a token budget for every chip at each padded length, with the parameters copied to every chip or spread over them. MFU
counts the matrix products of the tokens, padding included. The last line is one JSON object, in bytes of each chip;
times are predictions of the TPU compiler (docs/planning.md).
"""

import argparse
import functools
import json
import time
from typing import Any

from imagen_jax.plan.environment import find_compiler

find_compiler()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

from imagen_jax.models.t5 import T5Config  # noqa: E402
from imagen_jax.models.t5_weights import t5_shapes  # noqa: E402
from imagen_jax.parallel.mesh import replicated, with_shardings  # noqa: E402
from imagen_jax.plan.chips import Topology, parse_topology  # noqa: E402
from imagen_jax.plan.compile import slice_devices  # noqa: E402
from imagen_jax.plan.estimate import estimate  # noqa: E402
from imagen_jax.plan.flops import jaxpr_flops  # noqa: E402
from imagen_jax.text.encoder import _ROWS, _TOKENS_PER_BATCH, _encode_as, _spread  # noqa: E402

# google/t5-v1_1-xxl
XXL = T5Config(
    vocab_size=32128, width=4096, head_dim=64, num_heads=64, feed_forward_width=10240, num_layers=24
)


def compile_batch(topology: Topology, length: int, copied: bool) -> dict[str, Any]:
    """Memory of each chip and time of a batch for every chip, at a padded length."""
    devices = slice_devices(topology)
    mesh = jax.sharding.Mesh(np.array(devices), ("devices",), axis_types=(AxisType.Auto,))
    abstract = t5_shapes(XXL, jnp.bfloat16)
    shardings = dict.fromkeys(abstract, replicated(mesh)) if copied else _spread(mesh, abstract)
    params = with_shardings(abstract, shardings)
    rows = max(rows for rows in _ROWS if rows * length <= _TOKENS_PER_BATCH) * mesh.size
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=split)
    mask = jax.ShapeDtypeStruct((rows, length), jnp.bool_, sharding=split)
    gathers = None if copied else mesh
    run = functools.partial(_encode_as, XXL, "bfloat16", dtype=jnp.dtype(jnp.bfloat16), mesh=gathers)
    flops = jaxpr_flops(jax.make_jaxpr(run)(params, tokens, mask).jaxpr)
    start = time.monotonic()
    compiled = jax.jit(run).lower(params, tokens, mask).compile()
    memory, seconds = compiled.memory_analysis(), estimate(compiled, topology, devices).seconds
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    return {
        "parameters": "copied" if copied else "spread",
        "rows": rows,
        "length": length,
        **sizes,
        "total": sum(sizes.values()),
        "tokens_per_s": round(rows * length / seconds),
        "mfu": round(flops / (seconds * topology.count * topology.chip.peak_flops), 3),
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
    args = parser.parse_args()
    topology = parse_topology(args.topology)
    batches = []
    for copied in (True, False):
        for length in args.lengths:
            batches.append(compile_batch(topology, length, copied))
            print(batches[-1])
    peak = {
        kind: max(b["total"] for b in batches if b["parameters"] == kind) for kind in ("copied", "spread")
    }
    fits = {kind: total <= topology.chip.hbm_bytes for kind, total in peak.items()}
    print(json.dumps({"topology": topology.name, "batches": batches, "peak_bytes": peak, "fits": fits}))


if __name__ == "__main__":
    main()
