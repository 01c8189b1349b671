"""What is asked of a cascade, checked once, whoever asks: a command, Python, the page or a picture's own record."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from imagen_jax.config import nearest
from imagen_jax.diffusion.editing import KnownRegion
from imagen_jax.diffusion.loop import Hook
from imagen_jax.errors import UserError
from imagen_jax.limits import MAX_PICTURES, MAX_SEED, shown
from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.sampling.given import GivenPicture
from imagen_jax.sampling.prompts import check_prompt
from imagen_jax.sizes import Size

_MOST_PICTURES = 4  # of a stage's own size, in one picture that is edited at the size it has


def nearest_size(size: Size, stages: Sequence[StageConfig]) -> Size:
    """The size of about the last stage's own area, and of about the shape of `size`, that all stages draw.

    `size` itself where they draw it and it is not larger than a few of the last stage's own pictures.

    Args:
      size: of a picture.
      stages: all that are drawn, base first.
    """
    last = stages[-1]
    least = max(stage.network.side_multiple * last.resolution // stage.resolution for stage in stages)
    own = last.resolution**2
    if not any(side % least for side in size) and size.height * size.width <= _MOST_PICTURES * own:
        return size
    factor = (own / (size.height * size.width)) ** 0.5
    return Size(*(max(least, round(side * factor / least) * least) for side in size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage's part in a drawing."""

    stage: StageConfig
    sampling: SamplingConfig
    size: Size  # of its pictures
    hooks: tuple[Hook, ...] = ()  # arrays have an axis over the pictures first
    given: tuple[GivenPicture, ...] = ()  # one a picture, or none

    @property
    def begins_with_picture(self) -> bool:
        """Whether the way begins with the given pictures, and not with noise alone."""
        return bool(self.given) and self.sampling.sampler.first_step > 0

    def pictures(self, chosen: Int[np.ndarray, " batch"]) -> Float[np.ndarray, "batch height width 3"]:
        """Some of the given pictures at the stage's size, in [−1, 1]."""
        return self._stacked(chosen, lambda picture: picture.at(self.size))

    def _stacked(
        self, chosen: Int[np.ndarray, " batch"], of: Callable[[GivenPicture], np.ndarray]
    ) -> np.ndarray:
        """What is made of some of the given pictures; once of one that is given for several."""
        pictures = [self.given[i] for i in chosen]
        made = {picture: of(picture) for picture in set(pictures)}
        return np.stack([made[picture] for picture in pictures])

    def batch_hooks(self, chosen: Int[np.ndarray, " batch"]) -> tuple[Hook, ...]:
        """The hooks of some of the pictures. What is known of given ones comes last: no other hook changes it."""
        hooks = jax.tree.map(lambda array: np.asarray(array)[chosen], self.hooks)
        if not self.given or self.given[0].mask is None:
            return hooks
        mask = self._stacked(chosen, lambda picture: picture.mask_at(self.size))
        return (*hooks, KnownRegion(picture=self.pictures(chosen), mask=mask))


def wanted_pictures(prompts: Sequence[str], seed: int, num_images: int) -> tuple[tuple[str, int], ...]:
    """(prompt, seed) of every picture: all of the first prompt, then all of the second, and so on.

    Raises:
      UserError: if there is no prompt, or a number is out of range.
    """
    if isinstance(prompts, str):  # a sequence of letters, which nobody means
        raise UserError(f"prompts must be a list of captions, got the string {prompts!r}")
    if not prompts:
        raise UserError("there is no prompt to make a picture of")
    if num_images < 1:
        raise UserError(f"num_images must be at least 1, got {num_images}")
    if num_images * len(prompts) > MAX_PICTURES:
        raise UserError(
            f"num_images {shown(num_images)} of {len(prompts)} prompts: more than {MAX_PICTURES} pictures at once"
        )
    if seed < 0 or seed + num_images - 1 > MAX_SEED:
        raise UserError(
            f"seeds must lie in 0 … {MAX_SEED}, got {shown(seed)} … {shown(seed + num_images - 1)}"
        )
    return tuple((prompt, seed + j) for prompt in prompts for j in range(num_images))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """Pictures that are wanted, and how.

    Raises:
      UserError: a prompt is no text, or a seed is out of range.
    """

    wanted: tuple[tuple[str, int], ...]  # prompt and seed of each picture
    negative_prompt: str | None = None  # what guidance leads away from; None: the null text
    # By stage name, how to sample it; stages left out use their own settings.
    sampling: Mapping[str, SamplingConfig] = dataclasses.field(default_factory=dict)
    until: int | None = None  # nominal resolution of the stage to stop at; None: the last
    size: Size | None = None  # of the pictures of the last stage drawn; None: square, of its resolution
    # By stage name, what changes its pictures on their way; arrays have an axis over the pictures first.
    hooks: Mapping[str, tuple[Hook, ...]] = dataclasses.field(default_factory=dict)
    # What is edited: a picture for each one wanted, all with a mask or all without; none: all is drawn from noise.
    given: tuple[GivenPicture, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "wanted", tuple((prompt, seed) for prompt, seed in self.wanted))
        for prompt, seed in self.wanted:
            check_prompt(prompt)
            if not 0 <= seed <= MAX_SEED:
                raise UserError(f"seeds must lie in 0 … {MAX_SEED}, got {shown(seed)}")
        if self.negative_prompt is not None:
            check_prompt(self.negative_prompt, "negative prompt")
        if self.given and len(self.given) != len(self.wanted):
            raise UserError(f"{len(self.given)} pictures are given for {len(self.wanted)} wanted")
        if len({picture.mask is None for picture in self.given}) > 1:
            raise UserError("of the given pictures some have a mask and some have none")

    @classmethod
    def of(cls, prompts: Sequence[str], *, seed: int = 0, num_images: int = 1, **how: Any) -> "Drawing":
        """Pictures of prompts, `wanted_pictures`; the rest as the fields."""
        how = {name: value for name, value in how.items() if value is not None}
        return cls(wanted=wanted_pictures(prompts, seed, num_images), **how)

    def beginning_with(
        self, given: GivenPicture, known: Sequence[StageConfig], strength: Mapping[str, float]
    ) -> "Drawing":
        """The same pictures, made of a given one at a size that the stages draw, nearest to its own.

        Args:
          given: the picture, for all that are wanted.
          known: the model's stages, base first.
          strength: by stage name, the schedule's time at which the way begins with the picture, in (0, 1]; 1: with
            noise alone (SDEdit, arXiv 2108.01073, section 3.2). Stages left out begin where their sampling says.

        Raises:
          UserError: a strength is out of range or of no stage, or as `stages`.
        """
        sampling, stages = dict(self.sampling), {stage.name: stage for stage in known}
        for name, time in strength.items():
            if not 0.0 < time <= 1.0:  # nan too
                raise UserError(f"--strength {time}: must be above 0 and at most 1 (stage {name!r})")
            if name not in stages:
                raise UserError(f"there is no stage {name!r} to begin{nearest(name, stages)}")
            config = sampling.get(name, stages[name].sampling)
            first = config.sampler.step_at(time, stages[name].schedule)
            sampler = dataclasses.replace(config.sampler, first_step=first)
            sampling[name] = dataclasses.replace(config, sampler=sampler)
        size = self.size or nearest_size(given.size, self.stages(known))
        fitted = (given.fitted(size),) * len(self.wanted)
        return dataclasses.replace(self, given=fitted, size=size, sampling=sampling)

    @property
    def prompts(self) -> list[str]:
        """All texts, each once, the negative prompt last."""
        texts = dict.fromkeys(prompt for prompt, _ in self.wanted)
        return [*texts] if self.negative_prompt is None else [*texts, self.negative_prompt]

    def part(self, chosen: Sequence[int]) -> "Drawing":
        """Some of its pictures, by their numbers."""
        index = np.asarray(chosen, int)
        return dataclasses.replace(
            self,
            wanted=tuple(self.wanted[i] for i in index),
            given=tuple(self.given[i] for i in index) if self.given else (),
            hooks={
                name: jax.tree.map(lambda leaf: np.asarray(leaf)[index], hooks)
                for name, hooks in self.hooks.items()
            },
        )

    def stages(self, known: Sequence[StageConfig]) -> tuple[StageConfig, ...]:
        """The stages up to the one to stop at.

        Raises:
          UserError: there is none of that resolution.
        """
        sides = [stage.resolution for stage in known]
        if self.until is None:
            return tuple(known)
        if self.until not in sides:
            raise UserError(
                f"--until {self.until}: the stages make pictures of {', '.join(map(str, sides))} pixels"
            )
        return tuple(known[: sides.index(self.until) + 1])

    def plan(self, known: Sequence[StageConfig], model: str) -> tuple[StagePlan, ...]:
        """What each stage does.

        Args:
          known: the model's stages, base first.
          model: what to call it in messages.

        Raises:
          UserError: settings or hooks are for no stage, the size is none of the model's, or a negative prompt is
            given while no stage is guided.
        """
        names = [stage.name for stage in known]
        for name in (*self.sampling, *self.hooks):
            if name not in names:
                raise UserError(f"{model}: there is no stage {name!r} to sample{nearest(name, names)}")
        stages = self.stages(known)
        plans = tuple(
            StagePlan(
                stage=stage,
                sampling=self.sampling.get(stage.name, stage.sampling),
                size=self._stage_size(stage, stages[-1]),
                hooks=tuple(self.hooks.get(stage.name, ())),
                given=self.given,
            )
            for stage in stages
        )
        if self.negative_prompt is not None and all(plan.sampling.guidance_weight == 1.0 for plan in plans):
            raise UserError(
                f"negative_prompt {self.negative_prompt!r} needs guidance, but every stage's guidance weight is 1 (off)"
            )
        return plans

    def _stage_size(self, stage: StageConfig, last: StageConfig) -> Size:
        if self.size is None:
            return stage.size
        size = self.size.scaled(stage.resolution, last.resolution)
        multiple = stage.network.side_multiple
        if size is None or any(side < 1 or side % multiple for side in size):
            least = multiple * last.resolution // stage.resolution
            raise UserError(
                f"--size {self.size.width}x{self.size.height}: stage {stage.name!r} draws sides that are multiples of "
                f"{multiple} pixels, so that the last picture's must be multiples of {least}"
            )
        return size
