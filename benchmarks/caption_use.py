"""Which parts of its captions a base stage uses, at which noise: its loss with a part exchanged for another.

python benchmarks/caption_use.py --model=MODEL

For each log-SNR and kind of scene: mean squared error of x̂0 with the right caption, and the ratio to it with another
shape, another colour, or the two objects of a pair in the other order. A ratio of 1 says that the part is not used. It
shows within minutes of training what pictures show after hours. Model of the embedded data's rich world.
"""

import argparse
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.data.shapes import Colour, Scene, SceneObject, Shape
from imagen_jax.data.shapes_render import render
from imagen_jax.data.shapes_world import Jitter, Kind, world_scene
from imagen_jax.diffusion.process import to_x0_and_epsilon
from imagen_jax.models.stage import StageNetwork
from imagen_jax.sampling.cascade import Imagen

LOG_SNR = (-8.0, -5.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
FIRST = 10**6  # number of the first scene: beyond those that are trained on


def other_shape(item: SceneObject) -> SceneObject:
    """The object with the next shape."""
    shapes = list(Shape)
    return dataclasses.replace(item, shape=shapes[(shapes.index(item.shape) + 1) % len(shapes)])


def other_colour(item: SceneObject, ground: Colour) -> SceneObject:
    """The object with the next colour that is not the background's."""
    colours = [colour for colour in Colour if colour is not ground]
    return dataclasses.replace(item, colour=colours[(colours.index(item.colour) + 1) % len(colours)])


def exchanged(scene: Scene) -> dict[str, str]:
    """Captions of the scene, and of it with a part exchanged."""
    shapes = tuple(map(other_shape, scene.objects))
    colours = tuple(other_colour(item, scene.background) for item in scene.objects)
    captions = {"right": scene, "shape": dataclasses.replace(scene, objects=shapes)}
    captions["colour"] = dataclasses.replace(scene, objects=colours)
    if scene.relation is not None:
        captions["order"] = dataclasses.replace(scene, objects=scene.objects[::-1])
    return {name: each.caption for name, each in captions.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model folder; its first stage is looked at")
    parser.add_argument("--count", type=int, default=128, help="scenes of a kind (%(default)s)")
    args = parser.parse_args()
    model = Imagen.load(args.model)
    stage = model.stages[0]
    network = StageNetwork(stage)
    params = model.folder.params(stage.name, network.abstract_params)

    @jax.jit
    def error(x0, x_t, log_snr, text, mask):
        output = network.apply(params, x_t, log_snr, text, mask)
        found, _ = to_x0_and_epsilon(output.prediction, x_t=x_t, log_snr=log_snr, source=stage.prediction)
        return jnp.square(found - x0).mean()

    for kind in Kind:
        scenes = [world_scene(FIRST + i, kind=kind, jitter=Jitter.WIDE) for i in range(args.count)]
        x0 = np.stack([render(scene, stage.resolution) for scene in scenes]).astype(np.float32) / 127.5 - 1
        epsilon = np.random.default_rng(0).standard_normal(x0.shape).astype(np.float32)
        captions = [exchanged(scene) for scene in scenes]
        texts = {
            name: model.encode([each[name] for each in captions], stage.text_form) for name in captions[0]
        }
        for log_snr in LOG_SNR:
            alpha, sigma = (math.sqrt(1 / (1 + math.exp(sign * log_snr))) for sign in (-1, 1))
            x_t, levels = (
                np.float32(alpha) * x0 + np.float32(sigma) * epsilon,
                np.full(len(x0), log_snr, np.float32),
            )
            found = {name: float(error(x0, x_t, levels, *text)) for name, text in texts.items()}
            right = found.pop("right")
            ratios = "  ".join(f"{name} {value / right:.2f}" for name, value in found.items())
            print(f"{kind.value:>5} objects, log-SNR {log_snr:4.0f}: {right:.4f}  {ratios}", flush=True)


if __name__ == "__main__":
    main()
