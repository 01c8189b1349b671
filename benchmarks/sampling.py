"""Guided sampling against imagen-pytorch 2.1.0 on PyTorch, at equal FLOPs a network call, on the CPU.

pip install -e '.[benchmark-sampling]'
python benchmarks/sampling.py

Theirs is a U-Net of 64 channels, multiples 1, 2, 4, two blocks a level, attention at the second and third one, on
32×32 pictures with 32 tokens of width 512; ours an ADM-style U-Net of the same levels and channels whose blocks make
its forward pass cost as much (the ratio is reported), on a device a core, as `imagen-jax sample` runs it. Both draw a
batch of 8 with classifier-free guidance, in float32, with the same number of threads, turn by turn, so that a busy
machine slows both alike:
  step     one guided step: theirs `p_sample`, thresholding included; ours a step of the compiled stage
  batch    a finished batch: our 16 steps of DPM-Solver++, their 256 (so many times the measured step, or
           --whole: really all of them)
The last line is one JSON object: medians over the rounds, the ratios ours / theirs, and the least and the greatest
ratio of a round, in which their step is timed before and after ours.
"""

import argparse
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.unet import UNetConfig
from imagen_jax.parallel.mesh import MeshConfig, make_mesh, use_cpu_devices
from imagen_jax.sampling.inputs import StageInputs
from imagen_jax.sampling.programs import ProgramSpec, StageProgram, prepare

BATCH, SIDE, TOKENS, WIDTH, GUIDANCE = 8, 32, 32, 512, 3.0
OUR_STEPS, THEIR_STEPS = 16, 256
# Of 1 to 3 blocks a level those whose forward pass costs most nearly as many FLOPs as theirs: 0.976 times as many.
CHANNELS, BLOCKS = (64, 128, 256), (1, 2, 1)


def our_stage() -> StageConfig:
    network = UNetConfig(
        channels=CHANNELS,
        num_res_blocks=BLOCKS,
        self_attention=(False, True, True),
        text_attention=(False, True, True),
        text_width=WIDTH,
        head_channels=64,
        embedding_width=256,
    )
    sampling = SamplingConfig(
        sampler=SamplerConfig(kind=Sampler.DPMPP, steps=OUR_STEPS), guidance_weight=GUIDANCE
    )
    return StageConfig(
        name="base32", resolution=SIDE, network=network, max_text_length=TOKENS, sampling=sampling
    )


def our_forward_flops(stage: StageConfig) -> float:
    """Of one picture's forward pass, as XLA counts them."""
    network = StageNetwork(stage)
    n = 2

    def shape(*sizes: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    lowered = jax.jit(network.apply).lower(
        network.abstract_params,
        shape(n, SIDE, SIDE, 3),
        shape(n),
        shape(n, TOKENS, WIDTH),
        shape(n, TOKENS, dtype=np.bool_),
    )
    return float(lowered.cost_analysis()["flops"]) / n


class Ours:
    """The compiled stage with random weights."""

    def __init__(self) -> None:
        stage = our_stage()
        mesh = make_mesh(MeshConfig()) if jax.device_count() > 1 else None
        spec = ProgramSpec(
            stage=stage, sampling=stage.sampling, batch=BATCH, negative=GUIDANCE != 1.0, mesh=mesh
        )
        self.program: StageProgram = prepare(spec)
        generator = np.random.default_rng(0)
        params = {}
        for name, leaf in self.program.abstract_params.items():
            scale = int(np.prod(leaf.shape[:-1])) ** -0.5 if name.endswith("kernel") else 0.1
            params[name] = (generator.standard_normal(leaf.shape) * scale + name.endswith("scale")).astype(
                np.float32
            )
        self.params = jax.device_put(params, self.program.parameter_shardings)
        self.inputs = self.program.place(
            StageInputs(
                seeds=np.arange(BATCH, dtype=np.uint32),
                text=generator.standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32),
                mask=np.ones((BATCH, TOKENS), bool),
                negative_text=np.zeros((BATCH, TOKENS, WIDTH), np.float32),
                negative_mask=np.arange(TOKENS) < np.ones((BATCH, 1)),
            )
        )

    def steps(self, count: int) -> np.ndarray:
        """The first steps of a batch, as pictures so far."""
        state = self.program(self.params, self.inputs, self.program.empty_state(), 0, count)
        return np.asarray(state.x0)


def _without_their_text_encoder() -> None:
    """Their package asks the model hub for a T5 when it is imported; sampling from embeddings needs none."""
    module = types.ModuleType("imagen_pytorch.t5")
    module.t5_encode_text = lambda *_, **__: None  # type: ignore[attr-defined]
    module.get_encoded_dim = lambda _: WIDTH  # type: ignore[attr-defined]
    module.DEFAULT_T5_NAME = "none"  # type: ignore[attr-defined]
    sys.modules["imagen_pytorch.t5"] = module


def _with_torchvision() -> torch.library.Library:
    """Beside a CPU build of PyTorch, torchvision's own operators do not load: it is told their names, to be imported.

    imagen-pytorch uses none of them. What is given back has to stay alive.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


class Theirs:
    """imagen-pytorch's Imagen with one U-Net and random weights."""

    def __init__(self) -> None:
        _without_their_text_encoder()
        self._library = _with_torchvision()
        import imagen_pytorch

        torch.manual_seed(0)
        unet = imagen_pytorch.Unet(
            dim=64,
            text_embed_dim=WIDTH,
            cond_dim=None,
            dim_mults=(1, 2, 4),
            num_resnet_blocks=2,
            layer_attns=(False, True, True),
            layer_cross_attns=(False, True, True),
        )
        self.imagen = imagen_pytorch.Imagen(
            unets=(unet,),
            image_sizes=(SIDE,),
            text_embed_dim=WIDTH,
            timesteps=THEIR_STEPS,
            cond_drop_prob=0.1,
        ).eval()
        self.unet = self.imagen.unets[0]
        # Fresh zeros at the end of the network would be multiplied as fast, but draw nothing.
        torch.nn.init.normal_(self.unet.final_conv.weight, std=0.01)
        self.text = torch.randn(BATCH, TOKENS, WIDTH)
        self.mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
        self.noise = torch.randn(BATCH, 3, SIDE, SIDE)

    def step(self) -> torch.Tensor:
        """One guided step in the middle of the way."""
        schedule = self.imagen.noise_schedulers[0]
        time_from, time_to = (torch.full((BATCH,), each) for each in (0.5, 0.5 - 1.0 / THEIR_STEPS))
        with torch.inference_mode():
            made, _ = self.imagen.p_sample(
                self.unet,
                self.noise,
                time_from,
                t_next=time_to,
                noise_scheduler=schedule,
                text_embeds=self.text,
                text_mask=self.mask,
                cond_scale=GUIDANCE,
            )
        return made

    def batch(self) -> torch.Tensor:
        """All steps of a batch."""
        with torch.inference_mode():
            return self.imagen.sample(
                text_embeds=self.text, text_masks=self.mask, cond_scale=GUIDANCE, use_tqdm=False
            )

    def forward_flops(self) -> float:
        """Of one picture's forward pass, by PyTorch's own counter (multiplications and additions)."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            self.unet(self.noise, torch.full((BATCH,), 0.0), text_embeds=self.text, text_mask=self.mask)
        return counter.get_total_flops() / BATCH


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--whole", action="store_true", help="draw their 256 steps instead of multiplying one"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    use_cpu_devices(args.threads)
    ours, theirs = Ours(), Theirs()
    report: dict[str, Any] = {"threads": args.threads, "rounds": args.rounds}
    report["our_forward_gflop"] = our_forward_flops(our_stage()) / 1e9
    report["their_forward_gflop"] = theirs.forward_flops() / 1e9
    report["flops_ratio"] = report["our_forward_gflop"] / report["their_forward_gflop"]
    if not np.isfinite(ours.steps(OUR_STEPS)).all() or not torch.isfinite(theirs.step()).all():
        raise SystemExit("the pictures hold values that are not finite")
    found: dict[str, list[float]] = {"our_step_s": [], "their_step_s": [], "our_batch_s": []}
    for number in range(args.rounds):
        found["their_step_s"].append(seconds(theirs.step))
        found["our_batch_s"].append(seconds(lambda: ours.steps(OUR_STEPS)))
        found["our_step_s"].append(found["our_batch_s"][-1] / OUR_STEPS)
        found["their_step_s"].append(seconds(theirs.step))
        print(number, {name: round(values[-1], 3) for name, values in found.items()}, flush=True)
    report |= {name: round(statistics.median(values), 4) for name, values in found.items()}
    report["step_ratio"] = round(report["our_step_s"] / report["their_step_s"], 3)
    both = zip(found["our_step_s"], found["their_step_s"][::2], found["their_step_s"][1::2])
    ratios = [ours_s / statistics.mean((before, after)) for ours_s, before, after in both]
    report["step_ratio_of_rounds"] = [round(min(ratios), 3), round(max(ratios), 3)]
    whole = seconds(theirs.batch) if args.whole else THEIR_STEPS * report["their_step_s"]
    report |= {"their_batch_s": round(whole, 2), "their_batch_measured": args.whole}
    report["batch_ratio"] = round(report["our_batch_s"] / whole, 4)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
