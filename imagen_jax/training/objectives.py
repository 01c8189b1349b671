"""What is made small: an objective maps weights and a batch to losses by role. Diffusion is one."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from imagen_jax.diffusion.losses import diffusion_loss
from imagen_jax.diffusion.process import diffuse
from imagen_jax.models.stage import StageNetwork, unit_pictures
from imagen_jax.models.text_form import Text, replace_text
from imagen_jax.training.config import TrainConfig
from imagen_jax.training.roles import DENOISER, Role, Roles, Weights

Batch = Mapping[str, Array]
Keys = Key[Array, " batch"]  # of each example: all that is random about it


class Losses(NamedTuple):
    """Of each example of a batch."""

    loss: Float[Array, " batch"]  # weighted as trained
    log_snr: Float[Array, " batch"]  # noise level at which it was measured


@runtime_checkable
class Objective(Protocol):
    """What a run learns."""

    def roles(self) -> Mapping[str, Role]:
        """Who takes part, the role first that the run's metrics are about."""

    def losses(self, roles: Roles, params: Weights, batch: Batch, keys: Keys) -> Mapping[str, Losses]:
        """Losses of every role that learns.

        A role's gradient is that of the mean of its own losses by its own parameters; what the others' say does not
        reach it. Randomness comes from the keys: an example is the same in whatever batch it is.

        Args:
          roles: of the run; `roles.weights` gives parameters as they are used.
          params: by role.
          batch: see `DiffusionObjective.losses`.
          keys: of its examples.
        """

    def evaluating(self) -> "Objective":
        """The same for held-out examples: whole captions."""


def example_keys(seed: int, index: UInt32[Array, "batch 2"]) -> Keys:
    """Keys of the examples of the given indices (low and high 32 bits): of the seed and the index only."""
    key = jax.random.key(seed)
    return jax.vmap(lambda parts: jax.random.fold_in(jax.random.fold_in(key, parts[0]), parts[1]))(index)


class RandomNumbers(NamedTuple):
    """The random numbers of a batch; each example's depend on its key only."""

    time: Float[Array, " batch"]  # in [0, 1]; becomes the noise level
    noise: Float[Array, "batch height width channels"]
    drop: Float[Array, " batch"]  # in [0, 1]; the text is dropped below the dropout probability
    aug_level: Float[Array, " batch"]  # in [0, 1]
    aug_noise: Float[Array, "batch low_height low_width channels"]


def random_numbers(keys: Keys, shape: tuple[int, ...], low_shape: tuple[int, ...]) -> RandomNumbers:
    """RandomNumbers for the examples of the given keys."""

    def one(key: Array) -> RandomNumbers:
        time, noise, drop, level, aug_noise = jax.random.split(key, 5)
        return RandomNumbers(
            jax.random.uniform(time),
            jax.random.normal(noise, shape),
            jax.random.uniform(drop),
            jax.random.uniform(level),
            jax.random.normal(aug_noise, low_shape),
        )

    return jax.vmap(one)(keys)


@dataclasses.dataclass(frozen=True)
class DiffusionObjective:
    """The stage's network learns to denoise (arXiv 2205.11487, section 2.1)."""

    config: TrainConfig

    def roles(self) -> Mapping[str, Role]:
        """The denoiser alone."""
        return {DENOISER: Role(network=StageNetwork(self.config.stage), optimizer=self.config.optimizer)}

    def evaluating(self) -> "DiffusionObjective":
        """Without text dropout."""
        loop = dataclasses.replace(self.config.train, text_dropout=0.0)
        return DiffusionObjective(dataclasses.replace(self.config, train=loop))

    def losses(self, roles: Roles, params: Weights, batch: Batch, keys: Keys) -> Mapping[str, Losses]:
        """The denoiser's, by the role that learns for it.

        Args:
          roles: of the run.
          params: by role.
          batch: `image` uint8 (N, R, R, 3); `text` (N, L, D) and `text_mask` (N, L); `index` uint32 (N, 2); and for
            an SR stage `low_res` uint8 (N, r, r, 3); and for all of them `null_text` (L, D) and `null_mask` (L,).
          keys: of its examples.
        """
        config, stage = self.config, self.config.stage
        x0 = unit_pictures(batch["image"])
        low_res = unit_pictures(batch["low_res"]) if stage.low_resolution else None
        if low_res is not None:
            low_res = stage.augmentation.prepare(low_res, x0.shape[1:3])
        low_shape = (0, 0, 3) if low_res is None else low_res.shape[1:]
        numbers = random_numbers(keys, x0.shape[1:], low_shape)
        log_snr = config.noise_levels.log_snr(stage.schedule, numbers.time)
        x_t = diffuse(x0, numbers.noise, log_snr)
        dropped = numbers.drop < config.train.text_dropout
        text = Text(batch["text"].astype(jnp.float32), batch["text_mask"])
        text = replace_text(text, dropped, Text(batch["null_text"], batch["null_mask"]))
        aug_log_snr = None
        if low_res is not None:
            level = numbers.aug_level * stage.augmentation.max_level
            low_res = stage.augmentation.apply(low_res, numbers.aug_noise, level)
            aug_log_snr = stage.augmentation.log_snr(level)
        output = roles[DENOISER].network.apply(
            roles.weights(DENOISER, params),
            x_t,
            log_snr,
            *text,
            low_res=low_res,
            aug_log_snr=aug_log_snr,
            mesh=roles.mesh,
        )
        losses = diffusion_loss(
            output.prediction,
            x0=x0,
            x_t=x_t,
            log_snr=log_snr,
            prediction=stage.prediction,
            config=config.loss,
        )
        return {roles.learner(DENOISER): Losses(losses, log_snr)}
