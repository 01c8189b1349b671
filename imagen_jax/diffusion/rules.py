"""What every sampler is: its levels, its update, and whatever it remembers between network calls."""

import abc
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagen_jax.diffusion.grids import Grid


class Denoised(NamedTuple):
    """What a network with a learned variance sees in x_t."""

    x0: Float[Array, "batch *shape"]
    # Takes the place of `SamplerConfig.variance_interpolation`, for each pixel and channel; None: it does not.
    variance_interpolation: Float[Array, "batch *shape"] | None


class SamplerState(NamedTuple):
    """Where a batch is on its way from noise to data, between two network calls."""

    x: Float[Array, "batch *shape"]  # what the network sees at the next call
    x0: Float[Array, "batch *shape"]  # x̂0 of the last call; zeros before the first
    memory: Any = ()  # what the sampler keeps beside: any tree of arrays


@runtime_checkable
class Call(Protocol):
    """What a loop needs to know of a network call; samplers add what their updates need."""

    @property
    def step(self) -> Int[Array, "..."]:
        """Number of the step, from 0."""

    @property
    def log_snr(self) -> Float[Array, "..."]:
        """Level at which the network is called."""


class Levels(NamedTuple):
    """Calls of a sampler that knows no more than where a step begins and ends."""

    step: Int[Array, "*calls"]
    log_snr: Float[Array, "*calls"]
    log_snr_next: Float[Array, "*calls"]  # level that the step reaches; of no use at the last call

    @classmethod
    def of(cls, log_snrs: Float[Array, " steps"]) -> "Levels":
        """One call a level."""
        following = jnp.concatenate([log_snrs[1:], log_snrs[-1:]])
        return cls(jnp.arange(len(log_snrs)), log_snrs, following)


def each_example(level: Float[Array, ""], x: Float[Array, "batch *shape"]) -> Float[Array, " batch"]:
    """A level as the formulas of `steps` take it."""
    return jnp.broadcast_to(level, x.shape[:1])


class Rule(abc.ABC):
    """A way from noise to data. After its last call x̂0 is the sample: no rule adds noise after that."""

    GRID: ClassVar[Grid]  # on which it was published

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise of their own, so that the first noise alone does not decide the picture."""
        return False

    def network_calls(self, steps: int) -> int:
        """Network calls of so many steps."""
        return steps

    @abc.abstractmethod
    def plan(self, log_snrs: Float[Array, " steps"]) -> Any:
        """All that is known of the network calls before the loop: a tree of arrays (calls,), each call a `Call`."""

    def start(self, x: Float[Array, "batch *shape"]) -> Any:
        """What is remembered before the first call."""
        del x
        return ()

    @abc.abstractmethod
    def update(
        self, call: Any, state: SamplerState, denoised: Denoised, noise: Float[Array, "batch *shape"] | None
    ) -> tuple[Float[Array, "batch *shape"], Any]:
        """What the network sees at the next call, and what is remembered then.

        Args:
          call: of `plan`, the one just made.
          state: before it; its x0 is that of the call before.
          denoised: what the network gave.
          noise: of unit variance where the rule is stochastic, else None.
        """


def needed(noise: Float[Array, "batch *shape"] | None) -> Float[Array, "batch *shape"]:
    """The noise of a stochastic rule."""
    if noise is None:
        raise ValueError("a stochastic rule was given no noise")
    return noise


def at_call(plan: Any, number: Int[Array, ""] | int) -> Any:
    """One call of a plan."""
    return jax.tree.map(lambda x: x[number], plan)
