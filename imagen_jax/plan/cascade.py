"""A whole cascade's sampling on a slice: every stage's plan, and what a picture of the last stage takes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from imagen_jax.config import build, to_dict
from imagen_jax.errors import UserError
from imagen_jax.plan.chips import Topology
from imagen_jax.plan.compile import Program
from imagen_jax.plan.report import Plan, make_plan, to_json, to_text
from imagen_jax.sampling.drawing import Drawing
from imagen_jax.sampling.model_folder import ModelFolder, check_cascade
from imagen_jax.sizes import Size
from imagen_jax.training.config import TrainConfig, apply_overrides

_GIB = 2**30


def model_configs(model: str, overrides: Sequence[str]) -> list[TrainConfig]:
    """The stages of a model folder, as configs whose mesh and batch the overrides say.

    Raises:
      UserError: for no model folder, or an override that does not fit.
    """
    return [
        build(
            TrainConfig,
            apply_overrides(
                {"stage": to_dict(stage), "data": {"path": ""}, "train": {"steps": 1}}, overrides
            ),
            "config",
        )
        for stage in ModelFolder(epath.Path(model)).stages
    ]


def in_order(configs: Sequence[TrainConfig], size: Size | None = None) -> list[TrainConfig]:
    """The configs with the sizes of their pictures, checked to follow each other.

    Args:
      configs: of the stages, base first.
      size: of the last stage's pictures; None: its own.

    Raises:
      UserError: for stages that are no cascade, or a size that is none of theirs.
    """
    check_cascade([config.stage for config in configs])
    plans = Drawing.of(["a picture"], size=size).plan([config.stage for config in configs], "--config")
    return [
        dataclasses.replace(
            config, data=dataclasses.replace(config.data, size=(plan.size.width, plan.size.height))
        )
        for config, plan in zip(configs, plans)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CascadePlan:
    """What drawing a batch with all stages, one after the other, is predicted to need on a slice."""

    stages: tuple[Plan, ...]  # base first, of the same batch and slice

    @property
    def seconds(self) -> float | None:
        """Of a batch; None where a stage does not fit. The text encoder is not in it."""
        parts = [plan.estimate.seconds for plan in self.stages if plan.estimate is not None]
        return sum(parts) if len(parts) == len(self.stages) else None

    @property
    def device_seconds(self) -> float | None:
        """Of a picture: seconds of a batch, times chips, over pictures."""
        first = self.stages[0]
        return None if self.seconds is None else self.seconds * first.topology.count / first.batch_size

    @property
    def used(self) -> int:
        """Bytes on each chip at most: the largest stage at work, and the weights of the others beside it."""
        params = sum(plan.memory.params for plan in self.stages)
        return max(plan.memory.used + params - plan.memory.params for plan in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The plans' numbers and those of the whole."""
        return {
            "stages": [to_json(plan) for plan in self.stages],
            "predicted_batch_s": self.seconds,
            "predicted_device_s_per_image": self.device_seconds,
            "hbm_used_bytes": self.used,
            "hbm_bytes": self.stages[0].memory.available,
        }

    def to_text(self) -> str:
        """All plans for people, and a table of the stages."""
        first, parts = self.stages[0], [to_text(plan) for plan in self.stages]
        table = [f"{'cascade, ' + first.topology.name:<28}{'steps':>16}{'s a batch':>12}{'GiB a chip':>12}"]
        for plan in self.stages:
            seconds = "-" if plan.estimate is None else f"{plan.estimate.seconds:.3f}"
            table.append(
                f"  {plan.stage:<26}{plan.network_steps:>16}{seconds:>12}{plan.memory.used / _GIB:>12.2f}"
            )
        if self.seconds is not None and self.device_seconds is not None:
            table.append(f"{'predicted batch':<28}{self.seconds:>16.3f}  s, {first.batch_size} pictures")
            table.append(f"{'predicted device-seconds':<28}{self.device_seconds:>16.3f}  a picture")
        room = first.memory.available - self.used
        table.append(
            f"{'memory, all weights kept':<28}{self.used / _GIB:>16.2f}  GiB of {first.memory.available / _GIB:.2f}"
            + ("" if room >= 0 else ": sample keeps one stage's weights at a time")
        )
        return "\n\n".join([*parts, "\n".join(table)])


def make_cascade_plan(
    configs: Sequence[TrainConfig], topology: Topology, *, rows: int = 1, progress: bool = False
) -> CascadePlan:
    """Plans the sampling of every stage.

    Args:
      configs: as `in_order` gives them.
      topology: the slice.
      rows: devices over which the rows of a picture are split, in every stage.
      progress: whether to show on stderr how long compiling takes.

    Raises:
      UserError: for a mesh, rows or a batch that do not fit the slice, or batches that differ.
    """
    if len({config.data.batch_size for config in configs}) > 1:
        sizes = ", ".join(str(config.data.batch_size) for config in configs)
        raise UserError(f"--batch_size: needed, as the configs' data.batch_size differ: {sizes}")
    return CascadePlan(
        stages=tuple(
            make_plan(config, topology, Program.SAMPLE, rows=rows, progress=progress) for config in configs
        )
    )
