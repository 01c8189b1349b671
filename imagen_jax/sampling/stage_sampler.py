"""Sampling one stage: guidance, thresholding and the loop as one compiled program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from imagen_jax.diffusion.guidance import guide, rescale_guided
from imagen_jax.diffusion.loop import Denoiser, advance, image_noise, start
from imagen_jax.diffusion.process import to_x0_and_epsilon
from imagen_jax.diffusion.rules import Denoised, SamplerState
from imagen_jax.diffusion.thresholding import threshold
from imagen_jax.errors import UserError
from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.models.network import NetworkOutput, Params
from imagen_jax.models.stage import StageNetwork
from imagen_jax.parallel.jax_internals import process_allgather
from imagen_jax.parallel.mesh import batch_sharding
from imagen_jax.parallel.spatial import shard_pictures
from imagen_jax.sampling.inputs import StageInputs, not_finite, to_pixels, to_unit
from imagen_jax.sizes import Size

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
    mesh: Mesh | None = None,
) -> Denoiser:
    """x_t, log-SNR, step → thresholded x̂0, with classifier-free guidance in one call on the doubled batch.

    Args:
      network: the stage's network.
      params: its parameters.
      text: embeddings of the prompts.
      mask: True for their real tokens.
      negative: embeddings and mask of what guidance leads away from; None: where nothing is guided.
      low_res: for an SR stage, the augmented low-resolution pictures.
      config: guidance and thresholding. At steps that are not guided nothing is doubled.
      mesh: where `params` lie by the rules of `parallel.mesh`; None: they lie whole.
    """
    batch = text.shape[0]
    aug_log_snr = None
    if low_res is not None:
        aug_log_snr = network.config.augmentation.log_snr(jnp.full((batch,), config.aug_level))
    if negative is None:
        if config.guidance_weight != 1.0:
            raise ValueError(
                f"guidance_weight {config.guidance_weight} needs a negative: the null text, or another"
            )
        negative = text, mask  # nobody asks

    def call(
        x_t: Array, log_snr: Array, text: Array, mask: Array, low_res: Array | None, aug: Array | None
    ) -> NetworkOutput:
        levels = jnp.broadcast_to(log_snr, x_t.shape[:1])
        return network.apply(params, x_t, levels, text, mask, low_res=low_res, aug_log_snr=aug, mesh=mesh)

    def plain(x_t: Array, log_snr: Array) -> NetworkOutput:
        return call(x_t, log_snr, text, mask, low_res, aug_log_snr)

    def guided(x_t: Array, log_snr: Array) -> NetworkOutput:
        both = (x_t, low_res, aug_log_snr)
        x_twice, low_twice, aug_twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), both)
        texts, masks = jnp.concatenate([text, negative[0]]), jnp.concatenate([mask, negative[1]])
        output = call(x_twice, log_snr, texts, masks, low_twice, aug_twice)
        conditional, unconditional = output.prediction[:batch], output.prediction[batch:]
        prediction = guide(conditional, unconditional, config.guidance_weight)
        if (rescale := config.guidance.rescale) > 0.0:
            prediction = rescale_guided(prediction, conditional, rescale)
        # Guidance moves the mean; the spread stays that of the prompt's own prediction.
        variance = None if output.variance is None else output.variance[:batch]
        return NetworkOutput(prediction=prediction, variance=variance)

    def denoise(x_t: Array, log_snr: Array, step: Array) -> Array | Denoised:
        if config.guidance_weight == 1.0:
            output = plain(x_t, log_snr)
        elif config.guidance.at_every_step:
            output = guided(x_t, log_snr)
        else:
            output = jax.lax.cond(config.guidance.is_guided(log_snr, step), guided, plain, x_t, log_snr)
        levels = jnp.broadcast_to(log_snr, (batch,))
        prediction, variance = output.prediction, output.variance
        x0, _ = to_x0_and_epsilon(prediction, x_t=x_t, log_snr=levels, source=network.config.prediction)
        x0 = threshold(x0, config.threshold)
        return Denoised(x0, variance) if variance is not None and config.sampler.learned_variance else x0

    return denoise


def _augmented(
    stage: StageConfig, inputs: StageInputs, keys: Key[Array, " batch"], size: Size, config: SamplingConfig
) -> Float[Array, "batch low_height low_width channels"] | None:
    """The low-resolution pictures with the noise that an SR stage is told of; None for a base stage."""
    if inputs.low_res is None:
        return None
    low_res = stage.augmentation.prepare(inputs.low_res, size)
    noise = image_noise(keys, _AUG_NOISE, low_res.shape[1:])
    return stage.augmentation.apply(low_res, noise, jnp.full((len(low_res),), config.aug_level))


def sample_stage(
    network: StageNetwork,
    params: Params,
    inputs: StageInputs,
    state: SamplerState | None,
    first: Int[Array, ""] | int = 0,
    last: Int[Array, ""] | int | None = None,
    *,
    config: SamplingConfig,
    size: Size | None = None,
    mesh: Mesh | None = None,
) -> SamplerState:
    """The program of a stage: a batch from noise, or from pictures with noise, to pictures, or a part of that way.

    To be called under `jax.jit`. The picture is `x0` of the state after all network calls, in [−1, 1] but for
    what thresholding leaves; before, `x0` is what the network then takes the picture to be.

    Args:
      network: the stage's network.
      params: its parameters.
      inputs: what the batch is made from.
      state: after `first` calls; where `first` is 0 it is not looked at, and may be None if that is known when
        tracing.
      first: number of the first network call to make.
      last: number of the call before which to stop; None: the end.
      config: how to sample.
      size: of the pictures; None: the stage's own.
      mesh: over which the batch, and rows where it has such an axis, are split.
    """
    stage = network.config
    size = size or stage.size
    shape = (*size, stage.network.image_channels)
    # Another stream of numbers for each stage: the base's noise must not come again in the SR stages.
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), stage.resolution))(inputs.seeds)
    negative = None
    if inputs.negative_text is not None and inputs.negative_mask is not None:
        negative = inputs.negative_text, inputs.negative_mask
    denoise = guided_denoiser(
        network,
        params,
        inputs.text,
        inputs.mask,
        negative=negative,
        low_res=_augmented(stage, inputs, keys, size, config),
        config=config,
        mesh=mesh,
    )

    def sharded(x_t: Array, log_snr: Array, step: Array) -> Array | Denoised:
        denoised = denoise(shard_pictures(x_t, mesh), log_snr, step)
        return jax.tree.map(lambda x: shard_pictures(x, mesh), denoised)

    def begin() -> SamplerState:
        return start(keys, shape, config.sampler, picture=inputs.picture, schedule=stage.schedule)

    if state is None:
        state = begin()
    elif not isinstance(first, int):
        state = jax.lax.cond(first == 0, begin, lambda: state)
    return advance(
        sharded,
        state,
        keys=keys,
        schedule=stage.schedule,
        config=config.sampler,
        hooks=inputs.hooks,
        first=first,
        last=last,
    )


def check_low_res(stage: StageConfig, given: bool) -> None:
    """Raises ValueError if low_res is missing for an SR stage or given to a base stage."""
    if given != (stage.low_resolution is not None):
        raise ValueError(f"stage {stage.name!r}: low_resolution is {stage.low_resolution}, low_res {given}")


class StageSampler:
    """A stage that draws pictures; each batch shape and sampling config is compiled once.

    Without a mesh parameters may lie on devices in any way; with one, by the rules of `parallel.mesh`.
    `sampling.programs` keeps compiled stages from one run to the next.
    """

    def __init__(self, network: StageNetwork, mesh: Mesh | None = None):
        self.network = network
        self._mesh = mesh
        self._run = jax.jit(self._draw, static_argnames=("config", "size"))

    def _draw(self, params: Params, inputs: StageInputs, *, config: SamplingConfig, size: Size) -> Array:
        if self._mesh is not None:
            shard = partial(jax.lax.with_sharding_constraint, shardings=batch_sharding(self._mesh))
            inputs = jax.tree.map(shard, inputs)
        return sample_stage(self.network, params, inputs, None, config=config, size=size, mesh=self._mesh).x0

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
        size: Size | None = None,
    ) -> UInt8[np.ndarray, "batch height width channels"]:
        """Draws one picture a seed.

        Args:
          params: the stage's parameters.
          seeds: uint32 (batch,); with the text, and the low-resolution picture, it determines the picture.
          text: float32 (batch, length, width).
          mask: bool (batch, length), True for real tokens.
          negative: text and mask, of the same shapes, that guidance leads away from: the null text, or of other
            prompts. Without guidance they have no say and may be None.
          low_res: uint8 (batch, low height, low width, 3) for an SR stage.
          config: how to sample; None: the stage's defaults.
          size: of the pictures; None: the stage's own.

        Raises:
          ValueError: if low_res is missing for an SR stage or given to a base stage, or guidance has no negative.
          UserError: pictures are not finite; names the stage and their seeds.
        """
        check_low_res(self.network.config, low_res is not None)
        inputs = StageInputs(
            seeds=np.asarray(seeds, np.uint32),
            text=np.asarray(text, np.float32),
            mask=np.asarray(mask),
            low_res=None if low_res is None else to_unit(low_res),
            negative_text=None if negative is None else np.asarray(negative[0], np.float32),
            negative_mask=None if negative is None else np.asarray(negative[1]),
        )
        count = len(inputs.seeds)
        parts = 1 if self._mesh is None else self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        filled = (
            np.arange(-(-count // parts) * parts) % count
        )  # from the front, so that devices share it equally
        inputs = jax.tree.map(lambda array: array[filled], inputs)
        stage = self.network.config
        x0 = self._run(params, inputs, config=config or stage.sampling, size=size or stage.size)
        if not x0.is_fully_addressable and not x0.is_fully_replicated:
            # Every process gets all pictures, wherever the compiler has put them.
            x0 = process_allgather(x0, tiled=True)
        pictures = np.asarray(x0)[:count]
        if (bad := not_finite(pictures)).any():
            which = ", ".join(map(str, np.asarray(seeds)[bad][:3]))
            raise UserError(
                f"stage {self.network.config.name!r}: {bad.sum()} of {len(bad)} pictures are not finite (seeds {which}"
                f"{', …' if bad.sum() > 3 else ''})"
            )
        return to_pixels(pictures)
