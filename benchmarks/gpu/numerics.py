"""The same numbers on a GPU as on the CPU: networks, text encoder and samplers, in float32 and in bfloat16."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Results
from training import config_of

from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.models.execution import Execution
from imagen_jax.models.network import Attention
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.t5 import T5Config, encode
from imagen_jax.models.t5_weights import t5_shapes
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.sampling.programs import ProgramSpec, whole_way
from imagen_jax.training.config import load_config


def difference(run: Callable[[Any], Callable[..., Any]], arguments: Any) -> float:
    """Largest difference over largest number, of `run(device)`'s function on the default device and on the CPU."""
    outputs = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            placed = jax.device_put(arguments, device)
            outputs.append(np.asarray(jax.jit(run(device))(*placed), np.float32))
    return float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[1]).max())


def with_dtype(stage: Any, dtype: str) -> Any:
    """The stage with another dtype of the computation."""
    return dataclasses.replace(stage, network=dataclasses.replace(stage.network, dtype=dtype))


def network_difference(stage: Any, dtype: str) -> float:
    """Of one call of a stage's network with random weights, the attention each device has for itself."""
    network = StageNetwork(with_dtype(stage, dtype))
    n, size = 2, stage.size
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32)

    params = jax.tree.map(lambda leaf: 0.05 * normal(*leaf.shape).astype(leaf.dtype), network.abstract_params)
    mask = np.arange(stage.max_text_length)[None] < np.array([[3], [stage.max_text_length]])
    text = normal(n, stage.max_text_length, stage.network.text_width)
    given = [params, normal(n, *size, 3), np.float32([2.0, -3.0]), text, mask]
    if stage.low_resolution is not None:
        given += [normal(n, *size.over(stage.scale), 3), np.float32([1.0, 0.0])]

    def run(device: Any) -> Callable[..., Any]:
        def call(params: Any, x: Any, log_snr: Any, text: Any, mask: Any, *low: Any) -> Any:
            extra = dict(zip(("low_res", "aug_log_snr"), low))
            mesh = make_mesh(MeshConfig(), [device])
            return network.apply(params, x, log_snr, text, mask, mesh=mesh, **extra).prediction

        return call

    return difference(run, given)


def t5_difference() -> float:
    """Of an encoder's output."""
    config = T5Config(
        vocab_size=512, width=256, head_dim=64, num_heads=4, feed_forward_width=512, num_layers=4
    )
    generator = np.random.default_rng(0)
    params = {
        name: 0.05 * generator.standard_normal(leaf.shape, np.float32)
        for name, leaf in t5_shapes(config).items()
    }
    tokens = generator.integers(1, 512, (2, 16)).astype(np.int32)
    mask = np.arange(16)[None] < np.array([[5], [16]])
    return difference(lambda _: lambda *given: encode(config, *given), (params, tokens, mask))


def sampler_difference(stage: Any, kind: Sampler) -> float:
    """Of a guided batch from the same seeds."""
    sampling = dataclasses.replace(stage.sampling, sampler=SamplerConfig(kind=kind, steps=8))
    network = StageNetwork(with_dtype(stage, "float32"))
    generator = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: 0.02 * generator.standard_normal(leaf.shape, np.float32), network.abstract_params
    )

    def spec(device: Any) -> ProgramSpec:
        mesh = make_mesh(MeshConfig(), [device])
        return ProgramSpec(
            stage=network.config,
            sampling=sampling,
            batch=2,
            negative=sampling.guidance_weight != 1.0,
            mesh=mesh,
        )

    inputs = jax.tree.map(
        lambda leaf: (
            np.ones(leaf.shape, leaf.dtype)
            if leaf.dtype in (np.bool_, np.uint32)
            else generator.standard_normal(leaf.shape, np.float32)
        ),
        spec(jax.devices()[0]).arguments()[0],
    )
    return difference(lambda device: whole_way(spec(device), network), (params, inputs))


def measure(results: Results) -> None:
    """Adds every difference."""
    stages = {name: config_of(name, 2, tiny=True).stage for name in ("base64", "sr256")}
    stages["deepfloyd"] = load_config("deepfloyd/stage1.py:tiny", []).stage
    for name, stage in stages.items():
        for dtype in ("float32", "bfloat16"):
            results.add("numerics", {f"{name} {dtype}": network_difference(stage, dtype)})
    results.add("numerics", {"t5 float32": t5_difference()})
    for kind in (Sampler.DDPM, Sampler.DDIM, Sampler.DPMPP):
        results.add("numerics", {f"sampler {kind.value}": sampler_difference(stages["base64"], kind)})
    # Attention alone, with heads as the paper's networks have them: cuDNN's kernels against plain attention.
    if jax.default_backend() == "gpu":
        results.add("numerics", {"attention cudnn against xla": attention_difference()})


def attention_difference() -> float:
    """Of cuDNN's attention and plain attention, in bfloat16, with captions of all lengths."""
    from imagen_jax.models.attention import attend

    generator = np.random.default_rng(2)
    query, key, value = (
        jnp.asarray(generator.standard_normal((8, length, 1024)), jnp.bfloat16)
        for length in (1024, 1152, 1152)
    )
    mask = jnp.asarray(np.arange(1152)[None] < generator.integers(1025, 1153, (8, 1)))
    made = {}
    for kind in (Attention.CUDNN, Attention.XLA):
        with Execution(mesh=make_mesh(MeshConfig(), jax.devices()[:1])).active():
            made[kind] = np.asarray(
                jax.jit(lambda *qkv, kind=kind: attend(*qkv, mask, heads=16, kind=kind))(query, key, value),
                np.float32,
            )
    return float(
        np.abs(made[Attention.CUDNN] - made[Attention.XLA]).max() / np.abs(made[Attention.XLA]).max()
    )
