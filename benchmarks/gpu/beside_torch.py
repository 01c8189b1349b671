"""The same networks in PyTorch, turn by turn on the same device: DeepFloyd's stage I and T5's encoder."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from common import Results, kernels, mfu, peak_gib, seconds

from imagen_jax.convert.deepfloyd.network import diffusers_config, unet_sources
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.t5 import T5Config, encode
from imagen_jax.models.t5_weights import t5_shapes, t5_sources
from imagen_jax.models.weights import TensorSource
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.plan.flops import forward_flops
from imagen_jax.training.config import load_config

ROUNDS = 5


class TorchReader:
    """A network's tensors, read as those of a file."""

    def __init__(self, module: torch.nn.Module):
        self._tensors = module.state_dict()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """A part of a tensor."""
        tensor = self._tensors[name][tuple(index)].detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.float().numpy()


def read_params(shapes: dict[str, Any], sources: dict[str, TensorSource], module: torch.nn.Module) -> Any:
    """Our parameters with the values of PyTorch's."""
    reader: Any = TorchReader(module)

    def read(name: str, leaf: Any) -> jax.Array:
        whole = (slice(None),) * len(leaf.shape)
        return jax.device_put(sources[name].read(reader, whole, leaf.dtype), jax.devices()[0])

    return {name: read(name, leaf) for name, leaf in shapes.items()}


def device() -> str:
    """PyTorch's name of the device that JAX runs on."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def wait_for_torch(_: Any) -> None:
    """Until PyTorch's device has done all it was given."""
    if device() == "cuda":
        torch.cuda.synchronize()


def turn_by_turn(ours: Callable[[], Any], theirs: Callable[[], Any], *, rounds: int) -> dict[str, float]:
    """Median milliseconds of both and the median of theirs / ours over the rounds."""
    pairs = [(seconds(ours, 5), seconds(theirs, 5, wait_for_torch)) for _ in range(rounds)]
    return {
        "ours_ms": 1e3 * float(np.median([a for a, _ in pairs])),
        "torch_ms": 1e3 * float(np.median([b for _, b in pairs])),
        "times_as_fast": float(np.median([b / a for a, b in pairs])),
    }


def measure_deepfloyd(results: Results) -> None:
    """A guided step (a call on twice the pictures) and a gradient of stage I, with equal weights on both sides."""
    from diffusers import UNet2DConditionModel

    batch = 1 if results.tiny else 8
    overrides = [f"--config.stage.network.{name}=bfloat16" for name in ("dtype", "param_dtype")]
    stage = load_config(f"deepfloyd/stage1.py{':tiny' if results.tiny else ''}", overrides).stage
    network = StageNetwork(stage)
    torch.manual_seed(0)
    with torch.device(device()):
        torch.set_default_dtype(torch.bfloat16)
        theirs = UNet2DConditionModel.from_config(diffusers_config(stage.network, stage.resolution)).eval()
        torch.set_default_dtype(torch.float32)
    theirs.to(torch.bfloat16)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = read_params(network.abstract_params, unet_sources(network.abstract_params), theirs)
    n, length = 2 * batch, stage.max_text_length
    generator = np.random.default_rng(0)
    x = generator.standard_normal((n, *stage.size, 3), np.float32)
    text = generator.standard_normal((n, length, stage.network.text_width), np.float32)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    log_snr, time_ = condition(stage, n)
    given = jax.device_put((x, log_snr, text, np.ones((n, length), bool)), place)
    call = jax.jit(lambda params, *given: network.apply(params, *given, mesh=mesh))
    x_torch = torch.from_numpy(x).permute(0, 3, 1, 2).to(device(), torch.bfloat16)
    text_torch = torch.from_numpy(text).to(device(), torch.bfloat16)
    time_torch = torch.from_numpy(time_).to(device())
    compiled = theirs if results.tiny else torch.compile(theirs)

    def run_torch() -> Any:
        with torch.inference_mode():
            return compiled(x_torch, time_torch, text_torch).sample

    made = np.asarray(call(params, *given).prediction, np.float32)
    expected = run_torch().permute(0, 2, 3, 1)[..., :3].float().cpu().numpy()
    error = float(np.abs(made - expected).max() / np.abs(expected).max())
    flops = forward_flops(network) * n
    results.add("deepfloyd", {"parameters": network.parameter_count(), "step difference": error})
    times = turn_by_turn(lambda: call(params, *given), run_torch, rounds=2 if results.tiny else ROUNDS)
    results.add("deepfloyd", {f"guided step {name}": value for name, value in times.items()})
    results.add(
        "deepfloyd",
        {
            "guided step mfu": mfu(flops, times["ours_ms"] / 1e3),
            "peak_gib": peak_gib(),
            "kernels": kernels(lambda: call(params, *given)),
        },
    )
    half = jax.tree.map(lambda array: array[:batch], given)
    gradient = jax.jit(
        jax.grad(
            lambda params, *given: jnp.square(network.apply(params, *given, mesh=mesh).prediction).mean()
        )
    )
    theirs.train()

    def torch_gradient() -> Any:
        theirs.zero_grad(set_to_none=True)
        output = compiled(x_torch[:batch], time_torch[:batch], text_torch[:batch]).sample[:, :3]
        output.float().square().mean().backward()

    jax.block_until_ready(gradient(params, *half))
    torch_gradient()
    times = turn_by_turn(
        lambda: gradient(params, *half), torch_gradient, rounds=2 if results.tiny else ROUNDS
    )
    results.add("deepfloyd", {f"gradient {name}": value for name, value in times.items()})


def condition(stage: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-SNR of a middling step, and the time in [0, 1000] that the network is told of it."""
    from imagen_jax.models.stage import level_condition

    log_snr = np.full((n,), -1.0, np.float32)
    return log_snr, np.asarray(level_condition(stage.schedule, jnp.asarray(log_snr)))


def measure_t5(results: Results) -> None:
    """Tokens a second of T5-XXL's encoder, captions of 64 tokens, against transformers, with equal weights."""
    import transformers

    shape = {"d_model": 64, "num_layers": 2} if results.tiny else {"d_model": 4096, "num_layers": 24}
    heads, wide = (2, 128) if results.tiny else (64, 10240)
    theirs_config = transformers.T5Config(
        vocab_size=32128, d_kv=64, d_ff=wide, num_heads=heads, feed_forward_proj="gated-gelu", **shape
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device()):
        theirs = transformers.T5EncoderModel(theirs_config).eval()
    torch.set_default_dtype(torch.float32)
    config = T5Config.from_dict({"architectures": ["T5EncoderModel"], **theirs_config.to_dict()})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    names = frozenset(theirs.state_dict())
    params = read_params(t5_shapes(config, jnp.bfloat16), t5_sources(config, names), theirs)
    rows, length = (4, 16) if results.tiny else (128, 64)
    tokens = np.random.default_rng(0).integers(2, 32000, (rows, length)).astype(np.int32)
    given = jax.device_put((tokens, np.ones((rows, length), bool)), place)
    call = jax.jit(lambda params, *given: encode(config, params, *given, dtype=jnp.bfloat16))
    ids = torch.from_numpy(tokens.astype(np.int64)).to(device())
    compiled = theirs if results.tiny else torch.compile(theirs)

    def run_torch() -> Any:
        with torch.inference_mode():
            return compiled(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state

    made, expected = np.asarray(call(params, *given), np.float32), run_torch().float().cpu().numpy()
    results.add("t5", {"difference": float(np.abs(made - expected).max() / np.abs(expected).max())})
    times = turn_by_turn(lambda: call(params, *given), run_torch, rounds=2 if results.tiny else ROUNDS)
    weights = sum(leaf.size for name, leaf in params.items() if leaf.ndim > 1 and "embedding" not in name)
    results.add("t5", times)
    results.add(
        "t5",
        {
            "tokens_per_s": rows * length / (times["ours_ms"] / 1e3),
            "mfu": mfu(2.0 * weights * rows * length, times["ours_ms"] / 1e3),
            "peak_gib": peak_gib(),
            "kernels": kernels(lambda: call(params, *given)),
        },
    )
