"""Which checkpoints of a run stay, and the metric by which the best are told."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from imagen_jax.training.checksums import json_checksum
from imagen_jax.training.config import Best


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay: those that any of the rules names, and always the newest."""

    newest: int | None = None  # so many of the newest; None: all
    every: int | None = None  # those whose step is a multiple of this; None: no such rule
    best: int = 0  # so many of those with the best metric
    best_is: Best = Best.LOWEST  # which values of the metric are good

    def options(self) -> ocp.CheckpointManagerOptions:
        """The rules as orbax takes them."""
        rules: list[Any] = [policies.LatestN(self.newest)]
        if self.every:
            rules.append(policies.EveryNSteps(self.every))
        if self.best:
            rules.append(
                policies.BestN(get_metric_fn=score, n=self.best, keep_checkpoints_without_metrics=False)
            )
        return ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(rules),
            best_fn=score if self.best else None,
            cleanup_tmp_directories=True,
        )


def score(metrics: Mapping[str, float]) -> float:
    """Higher is better, whatever the metric."""
    return metrics["score"]


def damaged_metrics(folder: epath.Path) -> list[epath.Path]:
    """Files of the complete checkpoints' metrics that are not as they were written."""
    if not folder.exists():
        return []
    paths = [step / "metrics" / "metrics" for step in folder.iterdir() if step.name.isdigit()]
    return [path for path in paths if path.exists() and not _intact_metrics(path)]


def _intact_metrics(path: epath.Path) -> bool:
    try:
        values = json.loads(path.read_text())
        checksum = values.pop("crc32c", None)  # older versions wrote none
        return values.keys() == {"value", "score"} and checksum in (None, json_checksum(values))
    except (ValueError, AttributeError):
        return False
