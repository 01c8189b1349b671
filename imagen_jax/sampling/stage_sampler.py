"""Sampling one stage: guidance, thresholding and the loop as one compiled program."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key, UInt8

from imagen_jax.diffusion.guidance import guide, rescale_guided
from imagen_jax.diffusion.process import to_x0_and_epsilon
from imagen_jax.diffusion.samplers import Denoiser, Sampler, image_noise, sample
from imagen_jax.diffusion.thresholding import threshold
from imagen_jax.models.stage import Params, SamplingConfig, StageNetwork, drop_text, unit_pictures
from imagen_jax.parallel.mesh import batch_sharding

# Steps use the numbers from 0 up for their noise; the low-resolution input's noise has this one.
_AUG_NOISE = 2**31 - 1


def guided_denoiser(
    network: StageNetwork,
    params: Params,
    text: Float[Array, "batch length width"],
    mask: Bool[Array, "batch length"],
    *,
    negative: tuple[Float[Array, "batch length width"], Bool[Array, "batch length"]] | None = None,
    low_res: Float[Array, "batch low_height low_width channels"] | None,
    config: SamplingConfig,
) -> Denoiser:
    """x_t, log-SNR, step → thresholded x̂0, with classifier-free guidance in one call on the doubled batch.

    Args:
      network: the stage's network.
      params: its parameters.
      text: embeddings of the prompts.
      mask: True for their real tokens.
      negative: embeddings and mask of what guidance leads away from; None: the null text.
      low_res: for an SR stage, the augmented low-resolution pictures.
      config: guidance and thresholding. At steps that are not guided nothing is doubled.
    """
    batch = text.shape[0]
    aug_log_snr = None
    if low_res is not None:
        aug_log_snr = network.config.augmentation.log_snr(jnp.full((batch,), config.aug_level))
    if negative is None:
        negative = drop_text(text, mask, jnp.ones((batch,), bool))

    def call(
        x_t: Array, log_snr: Array, text: Array, mask: Array, low_res: Array | None, aug: Array | None
    ) -> Array:
        levels = jnp.broadcast_to(log_snr, x_t.shape[:1])
        return network.apply(params, x_t, levels, text, mask, low_res=low_res, aug_log_snr=aug)

    def plain(x_t: Array, log_snr: Array) -> Array:
        return call(x_t, log_snr, text, mask, low_res, aug_log_snr).astype(jnp.float32)

    def guided(x_t: Array, log_snr: Array) -> Array:
        both = (x_t, low_res, aug_log_snr)
        x_twice, low_twice, aug_twice = jax.tree.map(lambda each: jnp.concatenate([each, each]), both)
        texts, masks = jnp.concatenate([text, negative[0]]), jnp.concatenate([mask, negative[1]])
        output = call(x_twice, log_snr, texts, masks, low_twice, aug_twice).astype(jnp.float32)
        conditional = output[:batch]
        made = guide(conditional, output[batch:], config.guidance_weight)
        rescale = config.guidance.rescale
        return rescale_guided(made, conditional, rescale) if rescale > 0.0 else made

    def denoise(x_t: Array, log_snr: Array, step: Array) -> Array:
        if config.guidance_weight == 1.0:
            output = plain(x_t, log_snr)
        elif config.guidance.at_every_step:
            output = guided(x_t, log_snr)
        else:
            output = jax.lax.cond(config.guidance.is_guided(log_snr, step), guided, plain, x_t, log_snr)
        levels = jnp.broadcast_to(log_snr, (batch,))
        x0, _ = to_x0_and_epsilon(output, x_t=x_t, log_snr=levels, source=network.config.prediction)
        return threshold(x0, config.threshold)

    return denoise


class StageSampler:
    """A stage that draws pictures; each batch shape and sampling config is compiled once."""

    def __init__(self, network: StageNetwork, mesh: Mesh | None = None):
        self.network = network
        self._mesh = mesh
        self._run = jax.jit(self._sample, static_argnames="config")

    def _sample(
        self,
        params: Params,
        keys: Key[Array, " batch"],
        text: Float[Array, "batch length text_width"],
        mask: Bool[Array, "batch length"],
        low_res: UInt8[Array, "batch low_height low_width channels"] | None,
        negative: tuple[Float[Array, "batch length text_width"], Bool[Array, "batch length"]] | None,
        *,
        config: SamplingConfig,
    ) -> UInt8[Array, "batch height width channels"]:
        stage = self.network.config
        if self._mesh is not None:
            shard = partial(jax.lax.with_sharding_constraint, shardings=batch_sharding(self._mesh))
            keys, text, mask, low_res, negative = jax.tree.map(shard, (keys, text, mask, low_res, negative))
        augmented = None
        if low_res is not None:
            augmented = unit_pictures(low_res)
            noise = image_noise(keys, _AUG_NOISE, augmented.shape[1:])
            level = jnp.full((len(low_res),), config.aug_level)
            augmented = stage.augmentation.apply(augmented, noise, level)
        x0 = sample(
            guided_denoiser(
                self.network, params, text, mask, negative=negative, low_res=augmented, config=config
            ),
            keys=keys,
            shape=(stage.resolution, stage.resolution, stage.network.image_channels),
            schedule=stage.schedule,
            config=config.sampler,
        )
        return jnp.clip(jnp.round((x0 + 1.0) * 127.5), 0, 255).astype(jnp.uint8)

    def __call__(
        self,
        params: Params,
        *,
        seeds: np.ndarray,
        text: np.ndarray,
        mask: np.ndarray,
        negative: tuple[np.ndarray, np.ndarray] | None = None,
        low_res: np.ndarray | None = None,
        config: SamplingConfig | None = None,
    ) -> UInt8[np.ndarray, "batch resolution resolution channels"]:
        """Draws one picture a seed.

        Args:
          params: the stage's parameters.
          seeds: uint32 (batch,); with the text, and the low-resolution picture, it determines the picture.
          text: float32 (batch, length, width).
          mask: bool (batch, length), True for real tokens.
          negative: text and mask, of the same shapes, of the prompts that guidance leads away from; None: the
            null text. Without guidance they have no say.
          low_res: uint8 (batch, r, r, 3) for an SR stage.
          config: how to sample; None: the stage's defaults.

        Raises:
          ValueError: if low_res is missing for an SR stage or given to a base stage.
        """
        stage = self.network.config
        if (low_res is None) != (stage.low_resolution is None):
            raise ValueError(
                f"stage {stage.name!r}: low_resolution is {stage.low_resolution}, low_res {low_res is not None}"
            )
        # Another stream of numbers for each stage: the base's noise must not come again in the SR stages.
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), stage.resolution))(
            jnp.asarray(seeds, jnp.uint32)
        )
        if negative is not None:
            negative = (np.asarray(negative[0], np.float32), np.asarray(negative[1]))
        images = self._run(
            params,
            keys,
            jnp.asarray(text, jnp.float32),
            mask,
            low_res,
            negative,
            config=config or stage.sampling,
        )
        if not images.is_fully_addressable and not images.is_fully_replicated:
            # Every process gets all pictures, wherever the compiler has put them.
            images = multihost_utils.process_allgather(images, tiled=True)
        return np.asarray(images)


def override_sampling(
    config: SamplingConfig,
    *,
    steps: int | None = None,
    guidance_weight: float | None = None,
    sampler: str | None = None,
) -> SamplingConfig:
    """The sampling config with the given parts replaced; None keeps the stage's own.

    Args:
      config: the stage's own.
      steps: network steps; see `SamplerConfig.network_calls` for the calls that they make.
      guidance_weight: w, 1 is off.
      sampler: name of a `Sampler`.

    Raises:
      ValueError: for a value out of range or an unknown sampler.
    """
    stepping = config.sampler
    if steps is not None:
        stepping = dataclasses.replace(stepping, steps=steps)
    if sampler is not None:
        stepping = dataclasses.replace(stepping, kind=Sampler(sampler))
    config = dataclasses.replace(config, sampler=stepping)
    return config if guidance_weight is None else dataclasses.replace(config, guidance_weight=guidance_weight)
