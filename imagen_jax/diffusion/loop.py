"""One loop from noise to data for all samplers, with hooks.

All randomness of image i comes from its own key, so that a picture does not depend on its batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from imagen_jax.diffusion.process import diffuse, renoise
from imagen_jax.diffusion.rules import Denoised, SamplerState, at_call, each_example
from imagen_jax.diffusion.samplers import SamplerConfig
from imagen_jax.diffusion.schedules import Schedule

# (x_t, log-SNR, number of the step from 0) → x̂0: guidance and thresholding included.
Denoiser = Callable[
    [Float[Array, "batch *shape"], Float[Array, ""], Int[Array, ""]], Float[Array, "batch *shape"] | Denoised
]

# Steps use the numbers from 0 up for their noise, and a stage the last one of int32 for its input's.
_HOOK_NOISE = 2**31 - 2
_WAY_BACK = 2**31 - 3  # and the way back from a step, with the number of the call


class Moment(NamedTuple):
    """When a hook is asked."""

    step: Int[Array, ""]  # number of the step, from 0
    log_snr: Float[Array, ""]  # level at which the network is called
    keys: Key[Array, " batch"]  # an image's own, of this call and this hook only


@runtime_checkable
class Hook(Protocol):
    """What changes pictures on their way. A tree of arrays (`jax.tree_util.register_dataclass`), or none.

    It is a function of what it is given, and remembers nothing: a loop that is cut in pieces asks it the same.
    """

    def before_call(self, x_t: Float[Array, "batch *shape"], moment: Moment) -> Float[Array, "batch *shape"]:
        """What the network is to see."""

    def after_x0(self, x0: Float[Array, "batch *shape"], moment: Moment) -> Float[Array, "batch *shape"]:
        """What x̂0 is to be."""


def image_noise(
    keys: Key[Array, " batch"], step: Array | int, shape: tuple[int, ...]
) -> Float[Array, "batch ..."]:
    """Unit Gaussian noise (batch, *shape) in float32, each image's from its own key and the step's number."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32))(keys)


def _moments(
    hooks: Sequence[Hook], number: Int[Array, ""], step: Array, log_snr: Array, keys: Key[Array, " batch"]
) -> list[Moment]:
    """The same moment for each hook, with keys of its own."""

    def keys_of_hook(index: int) -> Key[Array, " batch"]:
        def fold(key: Array) -> Array:
            for part in (_HOOK_NOISE, index, number):
                key = jax.random.fold_in(key, part)
            return key

        return jax.vmap(fold)(keys)

    return [Moment(step, log_snr, keys_of_hook(index)) for index in range(len(hooks))]


def start(
    keys: Key[Array, " batch"],
    shape: tuple[int, ...],
    config: SamplerConfig,
    *,
    picture: Float[Array, "batch *shape"] | None = None,
    schedule: Schedule | None = None,
) -> SamplerState:
    """Noise of each image's own key, before the first network call.

    Args:
      keys: one key an image.
      shape: of an image.
      config: sampler, grid and steps.
      picture: x0 that is noised to the level of the first step (SDEdit, arXiv 2108.01073); None: noise alone.
      schedule: noise level as a function of time, for a picture.
    """
    x_1 = image_noise(keys, 0, shape)
    if picture is not None and schedule is not None:
        x_1 = diffuse(picture, x_1, each_example(config.log_snrs(schedule)[0], picture))
    return SamplerState(x_1, jnp.zeros_like(x_1), config.rule.start(x_1))


def advance(
    denoiser: Denoiser,
    state: SamplerState,
    *,
    keys: Key[Array, " batch"],
    schedule: Schedule,
    config: SamplerConfig,
    hooks: Sequence[Hook] = (),
    first: Int[Array, ""] | int = 0,
    last: Int[Array, ""] | int | None = None,
) -> SamplerState:
    """Network calls `first` to `last` − 1 in one loop with one network call an iteration.

    Args:
      denoiser: gives x̂0 from x_t, its log-SNR and the step's number.
      state: after `first` calls.
      keys: one key an image; the image depends on its own key only.
      schedule: noise level as a function of time; it may end without any signal (a log-SNR of −100, say).
      config: sampler, grid and steps.
      hooks: asked in this order at each call.
      first: number of the first call, from 0.
      last: number of the call before which to stop; None: all `config.network_calls` are made.

    Returns:
      The state after `last` calls. After all of them its x0 is the sample: no noise is added after the last
      network call, and the last step is of first order whatever the sampler.
    """
    rule, log_snrs = config.rule, config.log_snrs(schedule)
    plan, walk = rule.plan(log_snrs), config.walk

    def way_back(number: Array, x: Array) -> Array:
        """From the step just reached to the one that the next call makes again; the same x where that follows."""
        places = jnp.asarray((*walk, walk[-1] + 1) if walk is not None else ())
        reached, following = places[number] + 1, places[number + 1]
        levels = (each_example(log_snrs[jnp.minimum(i, len(log_snrs) - 1)], x) for i in (reached, following))
        back = jax.vmap(lambda key: jax.random.fold_in(key, _WAY_BACK))(keys)
        noisier = renoise(x, image_noise(back, number, x.shape[1:]), *levels)
        return jnp.where(following < reached, noisier, x)

    def iterate(number: Array, state: SamplerState) -> SamplerState:
        call = at_call(plan, number if walk is None else jnp.asarray(walk)[number])
        moments = _moments(hooks, number, call.step, call.log_snr, keys)
        for hook, moment in zip(hooks, moments, strict=True):
            state = state._replace(x=hook.before_call(state.x, moment))
        denoised = denoiser(state.x, call.log_snr, call.step)
        if not isinstance(denoised, Denoised):
            denoised = Denoised(denoised, None)
        for hook, moment in zip(hooks, moments, strict=True):
            denoised = denoised._replace(x0=hook.after_x0(denoised.x0, moment))
        # A step that is made again takes other noise.
        own = call.step if walk is None else number
        noise = image_noise(keys, own + 1, state.x.shape[1:]) if rule.stochastic else None
        x, memory = rule.update(call, state, denoised, noise)
        if walk is not None:
            x = way_back(number, x)
        return SamplerState(x, denoised.x0, memory)

    return jax.lax.fori_loop(first, config.network_calls if last is None else last, iterate, state)


def sample(
    denoiser: Denoiser,
    *,
    keys: Key[Array, " batch"],
    shape: tuple[int, ...],
    schedule: Schedule,
    config: SamplerConfig,
    hooks: Sequence[Hook] = (),
    picture: Float[Array, "batch *shape"] | None = None,
) -> Float[Array, "batch *shape"]:
    """Draws a batch from noise, or from a picture with noise, to data.

    `start`, then all calls of `advance`, whose arguments these are.

    Returns:
      The last x̂0, float32, (batch, *shape).
    """
    state = start(keys, shape, config, picture=picture, schedule=schedule)
    return advance(denoiser, state, keys=keys, schedule=schedule, config=config, hooks=hooks).x0
