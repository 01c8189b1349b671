"""Sampling settings of each stage with some of them replaced."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imagen_jax.diffusion.grids import NAMED_COUNTS, Grid, GridConfig
from imagen_jax.diffusion.samplers import Sampler
from imagen_jax.diffusion.thresholding import Threshold
from imagen_jax.errors import UserError
from imagen_jax.limits import shown
from imagen_jax.models.configs import SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOverrides:
    """What is to be different in a stage's sampling; None keeps the stage's own."""

    steps: int | None = None  # network steps; see `SamplerConfig.network_calls` for the calls that they make
    sampler: Sampler | None = None
    grid: Grid | None = None  # one that is named for its timesteps brings its number of steps
    eta: float | None = None  # of ddim, in [0, 1]
    churn: float | None = None  # of heun
    guidance_weight: float | None = None  # w, 1 is off
    guidance_interval: tuple[float | None, float | None] | None = (
        None  # log-SNR in nats; (None, None): always
    )
    oscillate_after: int | None = None  # steps; negative: never
    rescale: float | None = None  # φ in [0, 1]
    threshold: Threshold | None = None
    percentile: float | None = None  # percent, of dynamic thresholding
    aug_level: float | None = None  # in [0, 1], of SR stages

    def apply(self, config: SamplingConfig) -> SamplingConfig:
        """The config with these parts replaced.

        Raises:
          ValueError: for a value out of range.
        """
        grid, steps = config.sampler.grid, self.steps
        if self.grid is not None:
            grid = _replace(grid or GridConfig(), kind=self.grid)
            steps = grid.own_steps if steps is None else steps
        elif self.sampler is not None and self.sampler is not config.sampler.kind:
            grid = None  # it belonged to the other sampler
        # All at once: a grid that is named for its timesteps goes with its own number of steps only.
        sampler = _replace(
            dataclasses.replace(config.sampler, grid=None),
            steps=steps,
            kind=self.sampler,
            eta=self.eta,
            churn=self.churn,
            grid=grid,
        )
        guidance = _replace(config.guidance, rescale=self.rescale)
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            guidance = dataclasses.replace(guidance, log_snr_min=low, log_snr_max=high)
        if self.oscillate_after is not None:
            after = None if self.oscillate_after < 0 else self.oscillate_after
            guidance = dataclasses.replace(guidance, oscillate_after=after)
        threshold = _replace(config.threshold, kind=self.threshold, percentile=self.percentile)
        config = dataclasses.replace(config, sampler=sampler, guidance=guidance, threshold=threshold)
        return _replace(config, guidance_weight=self.guidance_weight, aug_level=self.aug_level)


def _replace(config: Any, **values: Any) -> Any:
    """`dataclasses.replace` of what is not None."""
    return dataclasses.replace(config, **{name: value for name, value in values.items() if value is not None})


def _number(text: str) -> float:
    """A finite number: no setting of sampling means another."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _interval(text: str) -> tuple[float | None, float | None]:
    if text in ("none", "off"):
        return None, None
    low, separator, high = text.partition(":")
    if not separator:
        raise ValueError(text)
    return (_number(low) if low else None), (_number(high) if high else None)


def _oscillation(text: str) -> int:
    return -1 if text in ("none", "off") else int(text)


# Flag → field, how a value is read, and what it is called where it cannot be.
FLAGS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "steps": ("steps", int, "a whole number"),
    "sampler": ("sampler", Sampler, ", ".join(Sampler)),
    "grid": ("grid", Grid, ", ".join(Grid)),
    "timesteps": ("grid", Grid, ", ".join((Grid.LEADING, *NAMED_COUNTS))),
    "eta": ("eta", _number, "a number"),
    "churn": ("churn", _number, "a number"),
    "guidance": ("guidance_weight", _number, "a number"),
    "guidance_interval": ("guidance_interval", _interval, 'LOW:HIGH in nats of log-SNR, or "none"'),
    "guidance_oscillate": ("oscillate_after", _oscillation, 'a number of steps, or "none"'),
    "guidance_rescale": ("rescale", _number, "a number"),
    "threshold": ("threshold", Threshold, ", ".join(Threshold)),
    "percentile": ("percentile", _number, "a number, in percent"),
    "aug_level": ("aug_level", _number, "a number"),
}


def parse_overrides(flags: dict[str, str | None], stages: int) -> list[SamplingOverrides]:
    """Overrides of each stage, base first, from texts "a" (all stages) or "a,b,…" (one a stage, "" its own).

    Args:
      flags: by name in `FLAGS`, None where not given.
      stages: how many.

    Raises:
      UserError: for a number of values or a value that does not fit, naming the flag.
    """
    found: list[dict[str, Any]] = [{} for _ in range(stages)]
    for flag, text in flags.items():
        if text is None:
            continue
        field, read, meaning = FLAGS[flag]
        parts = text.split(",")
        if len(parts) not in (1, stages):
            raise UserError(f"--{flag} {text:.80}: give one value, or one for each of the {stages} stages")
        for number, part in enumerate(parts * stages if len(parts) == 1 else parts):
            part = part.strip()
            if not part and len(parts) > 1:
                continue
            try:
                found[number][field] = read(part)
            except ValueError:
                raise UserError(f"--{flag} {text[:80]}: {shown(part)} is not {meaning}") from None
    return [SamplingOverrides(**fields) for fields in found]


def override_all(
    configs: Sequence[SamplingConfig], overrides: Sequence[SamplingOverrides]
) -> list[SamplingConfig]:
    """Each stage's config with its overrides.

    Raises:
      UserError: for a value out of range.
    """
    try:
        return [each.apply(config) for config, each in zip(configs, overrides, strict=True)]
    except ValueError as error:
        raise UserError(f"sampling settings: {error}") from error


RESAMPLINGS = 4  # of stretches around a known region, where nothing else is asked for


def resampled(configs: Mapping[str, SamplingConfig], times: int | None = None) -> dict[str, SamplingConfig]:
    """Configs that walk stretches of steps several times, so that what is painted fits what is known.

    Args:
      configs: by stage name.
      times: how often; None: `RESAMPLINGS`, and once where the sampler remembers what it did.

    Raises:
      UserError: so many are none, or a sampler remembers what it did.
    """
    made = {}
    for name, config in configs.items():
        sampler = config.sampler
        if times is None:
            memoryless = sampler.kind in (Sampler.DDPM, Sampler.DDIM)
            sampler = dataclasses.replace(sampler, resamplings=RESAMPLINGS if memoryless else 1)
        else:
            try:
                sampler = dataclasses.replace(sampler, resamplings=times)
            except ValueError as error:
                raise UserError(f"--resamplings {times}: {error}") from error
        made[name] = dataclasses.replace(config, sampler=sampler)
    return made
