"""Who takes part in a training: networks by role, each frozen or with an optimizer and averages of its own."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from imagen_jax.models.network import Params
from imagen_jax.training.config import OptimizerConfig

DENOISER = "denoiser"  # the stage's network, which is exported

Weights = Mapping[str, Params]  # by role


@runtime_checkable
class Trainable(Protocol):
    """What a role needs of its network: `models.stage.StageNetwork` is one."""

    abstract_params: Params  # shapes and dtypes, by flat names

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""


@runtime_checkable
class Adapter(Trainable, Protocol):
    """The network of a role whose parameters change those of another one."""

    def adapted(self, base: Params, adapter: Params) -> Params:
        """The other role's parameters as they are used, of the same names and shapes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """One part in a training."""

    network: Any  # a Trainable, or where `adapts` names a role an Adapter
    optimizer: OptimizerConfig | None = None  # None: frozen
    every: int = 1  # steps of the run between its updates
    averaged: bool = True  # whether a role that learns has averages of its parameters, by `train.ema_decay`
    adapts: str | None = None  # role whose parameters these change; None: none

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")

    @property
    def learns(self) -> bool:
        """Whether its parameters change."""
        return self.optimizer is not None


class Roles(Mapping[str, Role]):
    """The roles of a run, the one that its metrics are about first.

    Raises:
      ValueError: no role learns at every step, or one adapts a role that is not there.
    """

    def __init__(self, roles: Mapping[str, Role], mesh: Mesh | None = None):
        self._roles, self.mesh = dict(roles), mesh
        if not any(role.learns and role.every == 1 for role in self._roles.values()):
            raise ValueError(f"a role must learn at every step; of {', '.join(self._roles)} none does")
        for name, role in self._roles.items():
            if role.adapts is not None and role.adapts not in self._roles:
                raise ValueError(f"role {name!r} adapts {role.adapts!r}, which is no role")

    def __getitem__(self, name: str) -> Role:
        return self._roles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    @property
    def learning(self) -> tuple[str, ...]:
        """Names of those that learn, sorted as JAX sorts them."""
        return tuple(sorted(name for name, role in self._roles.items() if role.learns))

    @property
    def primary(self) -> str:
        """The first that learns at every step: its loss is the run's, its updates are counted."""
        return next(name for name, role in self._roles.items() if role.learns and role.every == 1)

    def weights(self, name: str, params: Weights) -> Params:
        """A role's parameters as its network uses them: changed by the roles that adapt it."""
        used = params[name]
        for other, role in self._roles.items():
            if role.adapts == name:
                used = role.network.adapted(used, params[other])
        return used

    def learner(self, name: str) -> str:
        """The role that learns for another one: itself, or what adapts it.

        Raises:
          ValueError: it is frozen, and nothing that learns adapts it.
        """
        for other, role in self._roles.items():
            if role.learns and (other == name or role.adapts == name):
                return other
        raise ValueError(f"role {name!r} is frozen, and nothing that learns adapts it")
