"""How well a part of a picture is painted around a known one: a Gaussian mixture, whose conditional is exact.

python -m benchmarks.inpainting [--count=50000] [--steps=64]

By jump length and resamplings (arXiv 2201.09865), on average over which pixels are known: how far mean and covariance
are from the exact ones, in standard errors of as many exact samples, and the network calls. Denoiser and sampler are
exact but for the number of steps.
"""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.diffusion.editing import KnownRegion
from imagen_jax.diffusion.loop import sample
from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.diffusion.schedules import CosineSchedule
from tests.diffusion.mixtures import Mixture, column, conditional_moments

KNOWN = ([True, False, False], [False, True, True], [True, True, False])


def errors(mixture: Mixture, config: SamplerConfig, known: np.ndarray, count: int, seed: int) -> list[float]:
    """The largest error of the mean and of the covariance, in standard errors."""
    truth = mixture.draw(1, seed=seed)[0]
    picture = jnp.broadcast_to(
        jnp.asarray(truth.reshape(mixture.shape), jnp.float32), (count, *mixture.shape)
    )
    mask = jnp.broadcast_to(jnp.asarray(~known, jnp.float32).reshape(mixture.shape), picture.shape)
    hook = KnownRegion(picture=picture, mask=mask)
    keys = jax.vmap(jax.random.key)(jnp.arange(count, dtype=jnp.uint32))

    def run(keys: jax.Array, hook: KnownRegion) -> jax.Array:
        return sample(
            mixture.denoiser,
            keys=keys,
            shape=mixture.shape,
            schedule=CosineSchedule(),
            config=config,
            hooks=[hook],
        )

    drawn = np.asarray(jax.jit(run)(keys, hook), np.float64).reshape(count, -1)[:, ~known]
    mean, covariance = conditional_moments(mixture, truth, known)
    deviation = np.sqrt(np.diag(covariance))
    of_mean = np.abs(drawn.mean(axis=0) - mean) / deviation * np.sqrt(count)
    away = np.abs(np.atleast_2d(np.cov(drawn.T)) - covariance) / np.outer(deviation, deviation)
    return [float(of_mean.max()), float(away.max() * np.sqrt(count / 2))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3, help="known values a pattern (%(default)s)")
    args = parser.parse_args()
    mixture, table = column(), []
    plain = SamplerConfig(kind=Sampler.DDPM, steps=args.steps, variance_interpolation=0.0)
    print("jump  resamplings  calls  mean  covariance")
    for jump in (1, 4, 8, 16, args.steps):
        for resamplings in (1, 2, 4, 8, 16):
            config = dataclasses.replace(plain, jump=jump, resamplings=resamplings)
            found = [
                errors(mixture, config, np.array(known), args.count, seed)
                for known in KNOWN
                for seed in range(args.seeds)
            ]
            mean, covariance = np.mean(found, axis=0)
            table.append([jump, resamplings, config.network_calls, round(mean, 2), round(covariance, 2)])
            print(
                f"{jump:4d}  {resamplings:11d}  {config.network_calls:5d}  {mean:4.1f}  {covariance:10.1f}",
                flush=True,
            )
    print(json.dumps({"count": args.count, "steps": args.steps, "table": table}))


if __name__ == "__main__":
    main()
