"""What somebody asks the page for, as a form and as a link."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode

from imagen_jax.config import nearest
from imagen_jax.errors import UserError
from imagen_jax.limits import MAX_SEED
from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.sampling.drawing import Drawing
from imagen_jax.sampling.overrides import SamplingOverrides, override_all, parse_overrides
from imagen_jax.sampling.prompts import check_prompt

# Of a request: a slip of the finger must not keep the machine busy for a day. A server may set less, see `Limits`.
MAX_IMAGES = 64
MAX_STEPS = 5000  # of a stage, where they are not its own
MAX_PROMPT = 4000  # characters
MAX_QUERY = 100_000  # bytes of a link: two prompts of the longest characters, as links spell them

# Flag of `imagen-jax sample`, and parameter of a link → field of the overrides. These are what the form has.
STAGE_FLAGS = {"steps": "steps", "guidance": "guidance_weight", "sampler": "sampler"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server draws for one request at most.

    Raises:
      UserError: naming the flag of `imagen-jax serve`.
    """

    pictures: int = MAX_IMAGES
    steps: int = 1000  # of a stage, where they are not its own

    def __post_init__(self) -> None:
        for name, most in (("pictures", MAX_IMAGES), ("steps", MAX_STEPS)):
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"--max_{name} {getattr(self, name)}: must be 1 to {most}")

    def steps_of(self, stage: StageConfig) -> int:
        """Of a stage: its own number is allowed in any case."""
        return max(self.steps, stage.sampling.sampler.steps)

    def check(self, request: "PictureRequest", stages: Sequence[StageConfig]) -> None:
        """Raises UserError for a request beyond them."""
        if request.num_images > self.pictures:
            raise UserError(f"the number of pictures must be 1 to {self.pictures}, got {request.num_images}")
        for stage, each in zip(stages, request.overrides, strict=True):
            if each.steps is not None and each.steps > (most := self.steps_of(stage)):
                raise UserError(f"{stage.name} takes at most {most} steps here, got {each.steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """Pictures of one prompt; image j has seed + j."""

    prompt: str
    negative_prompt: str | None = None  # None: the null text
    seed: int = 0
    num_images: int = 1
    overrides: tuple[SamplingOverrides, ...]  # of each stage, base first; None in them: the stage's own

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt or "")):
            check_prompt(text, name)
            if len(text) > MAX_PROMPT:
                raise UserError(f"the {name} has {len(text)} characters; at most {MAX_PROMPT} are read")
        if not self.prompt.strip():
            raise UserError("the prompt is empty: say what the picture shows")
        if not 1 <= self.num_images <= MAX_IMAGES:
            raise UserError(f"the number of pictures must be 1 to {MAX_IMAGES}, got {self.num_images}")
        if self.seed < 0 or self.seed + self.num_images - 1 > MAX_SEED:
            raise UserError(f"seeds must lie in 0 … {MAX_SEED}, got {self.seed}")
        for each in self.overrides:
            if each.steps is not None and each.steps > MAX_STEPS:
                raise UserError(f"a stage takes at most {MAX_STEPS} steps here, got {each.steps}")

    def wanted(self) -> list[tuple[str, int]]:
        """(prompt, seed) of each picture."""
        return [(self.prompt, self.seed + j) for j in range(self.num_images)]

    def sampling(self, stages: tuple[StageConfig, ...]) -> dict[str, SamplingConfig]:
        """How to sample each stage, by its name.

        Raises:
          UserError: for a value out of range.
        """
        made = override_all([stage.sampling for stage in stages], self.overrides)
        return {stage.name: config for stage, config in zip(stages, made, strict=True)}

    def drawing(self, stages: tuple[StageConfig, ...]) -> Drawing:
        """What the cascade is asked for; raises as `sampling`."""
        return Drawing(
            wanted=tuple(self.wanted()),
            negative_prompt=self.negative_prompt,
            sampling=self.sampling(stages),
        )

    def query(self) -> str:
        """The request as the query of a link, spelt as the flags of `imagen-jax sample` are."""
        values: dict[str, str] = {"prompt": self.prompt, "seed": str(self.seed)}
        if self.negative_prompt is not None:
            values["negative_prompt"] = self.negative_prompt
        if self.num_images != 1:
            values["num_images"] = str(self.num_images)
        for flag, field in STAGE_FLAGS.items():
            chosen = [getattr(each, field) for each in self.overrides]
            if any(each is not None for each in chosen):
                values[flag] = ",".join("" if each is None else str(each) for each in chosen)
        return urlencode(values)

    @classmethod
    def from_query(cls, values: Mapping[str, str], stages: int) -> "PictureRequest":
        """The request of a link.

        Args:
          values: parameters of the query.
          stages: how many the model has.

        Raises:
          UserError: for an unknown parameter or a value that does not fit, naming it.
        """
        known = ("prompt", "negative_prompt", "seed", "num_images", *STAGE_FLAGS)
        for name in values:
            if name not in known:
                raise UserError(f"the link has an unknown parameter {name!r}{nearest(name, known)}")
        return cls(
            prompt=values.get("prompt", ""),
            negative_prompt=values.get("negative_prompt") or None,
            seed=whole_number(values.get("seed", "0"), "seed"),
            num_images=whole_number(values.get("num_images", "1"), "number of pictures"),
            overrides=tuple(parse_overrides({flag: values.get(flag) for flag in STAGE_FLAGS}, stages)),
        )


def read_query(query: bytes) -> dict[str, str]:
    """Parameters of a link, by name.

    Args:
      query: what follows the question mark, as it came.

    Raises:
      UserError: it is too long, is not UTF-8, or names a parameter twice.
    """
    if len(query) > MAX_QUERY:
        raise UserError(f"the link has {len(query)} bytes; at most {MAX_QUERY} are read")
    try:
        pairs = parse_qsl(query.decode("utf-8"), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise UserError("the link is not UTF-8 text") from None
    values: dict[str, str] = {}
    for name, value in pairs:
        if name in values:
            raise UserError(f"the link has the parameter {name!r} twice")
        values[name] = value
    return values


def whole_number(value: Any, name: str) -> int:
    """A field of the form or a parameter of a link as a whole number.

    Raises:
      UserError: if it is none, naming it.
    """
    return _number(value, name, int, "a whole number")


def real_number(value: Any, name: str) -> float:
    """Like `whole_number`, for any finite number."""
    return _number(value, name, float, "a number")


def _number(value: Any, name: str, kind: Callable[[Any], Any], meaning: str) -> Any:
    try:
        number = kind(value)
        # int(1.5) is 1, which nobody asked for.
        if not math.isfinite(number) or (not isinstance(value, str) and number != value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} {value!r:.60} is not {meaning}") from None
    return number
