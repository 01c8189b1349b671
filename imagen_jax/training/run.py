"""A run as one object: its objective, roles, optimizers and state, for whoever trains, resumes, plans or exports."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from imagen_jax.models.network import Params
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.text_form import Text
from imagen_jax.parallel.mesh import state_shardings, with_shardings
from imagen_jax.training.config import TrainConfig
from imagen_jax.training.objectives import Batch, DiffusionObjective, Losses, Objective, example_keys
from imagen_jax.training.roles import DENOISER, Role, Roles, Weights
from imagen_jax.training.state import TrainState, average_of, make_optimizer, start_ema


class Run:
    """What a config trains on a mesh. Nothing of it is computed until it is asked for.

    Attributes:
      config: the run.
      mesh: where it runs.
      objective: what it learns.
      roles: who takes part.
      optimizers: of the roles that learn.
    """

    def __init__(
        self, config: TrainConfig, mesh: Mesh, objective: Objective, roles: Mapping[str, Role] | None = None
    ):
        self.config, self.mesh, self.objective = config, mesh, objective
        self.roles = Roles(roles or objective.roles(), mesh)
        self.optimizers: Mapping[str, optax.GradientTransformation] = {
            name: make_optimizer(role.optimizer, config.train.steps)
            for name, role in self.roles.items()
            if role.optimizer is not None
        }

    @classmethod
    def of(cls, config: TrainConfig, mesh: Mesh, objective: Objective | None = None) -> "Run":
        """The run of a config; `objective` None: diffusion."""
        return cls(config, mesh, objective or DiffusionObjective(config))

    def on(self, mesh: Mesh) -> "Run":
        """The same run on another mesh."""
        return Run(self.config, mesh, self.objective, self.roles)

    @property
    def network(self) -> StageNetwork:
        """The stage's network."""
        return self.roles[DENOISER].network

    def evaluating(self) -> "Run":
        """The same run as it looks at held-out examples."""
        return Run(self.config, self.mesh, self.objective.evaluating(), self.roles)

    def losses(self, params: Weights, batch: Batch, null: Text) -> Mapping[str, Losses]:
        """Of a batch's examples, by role; each example's randomness is of the seed and its index.

        Args:
          params: by role.
          batch: of examples.
          null: the null text.
        """
        whole = {**batch, "null_text": null.embeddings, "null_mask": null.mask}
        return self.objective.losses(
            self.roles, params, whole, example_keys(self.config.seed, batch["index"])
        )

    def _fresh(self, key: jax.Array) -> dict[str, Params]:
        """Parameters of all roles; those of the first by the seed alone."""
        keys = [key, *(jax.random.fold_in(key, number) for number in range(1, len(self.roles)))]
        return {
            name: role.network.init(role_key)
            for role_key, (name, role) in zip(keys, self.roles.items(), strict=True)
        }

    def _state(self, params: Weights) -> TrainState:
        """Step 0 of a run with these parameters."""
        decays = self.config.train.ema_decays
        learning = {name: params[name] for name in self.roles.learning}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=dict(params),
            # Copies: the training step reuses the memory of each of the state's arrays.
            ema={
                name: jax.tree.map(jnp.copy, start_ema(weights, decays))
                for name, weights in learning.items()
                if self.roles[name].averaged
            },
            opt_state={name: self.optimizers[name].init(weights) for name, weights in learning.items()},
        )

    def init(self) -> TrainState:
        """A fresh state, made shard by shard where it will live."""

        def init(key: jax.Array) -> TrainState:
            return self._state(self._fresh(key))

        return jax.jit(init, out_shardings=self.shardings)(jax.random.key(self.config.seed))

    def start_from(self, params: Params) -> TrainState:
        """The state of step 0 with given parameters of the denoiser, from which it averages; other roles are fresh."""

        def init(params: Params, key: jax.Array) -> TrainState:
            return self._state(self._fresh(key) | {DENOISER: jax.tree.map(jnp.copy, params)})

        return jax.jit(init, out_shardings=self.shardings)(params, jax.random.key(self.config.seed))

    @functools.cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(
            self._state, {name: role.network.abstract_params for name, role in self.roles.items()}
        )

    @functools.cached_property
    def shardings(self) -> TrainState:
        """Where the state's arrays lie."""
        return state_shardings(self._shapes, self.mesh)

    @functools.cached_property
    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, for restoring onto this mesh."""
        return with_shardings(self._shapes, self.shardings)

    def averages(self, state: TrainState, decay: float | None = None) -> dict[str, Params]:
        """Parameters by role, averaged where the role has averages.

        Args:
          state: of the run.
          decay: `train.ema_decay` (or None for it), one of `train.ema_decays`, or 0 for the parameters as they are.

        Raises:
          ValueError: the run keeps no such average.
        """
        loop = self.config.train
        return {
            name: average_of(weights, state.ema[name], loop, decay) if name in state.ema else weights
            for name, weights in state.params.items()
        }

    def average(self, state: TrainState, decay: float | None = None) -> Params:
        """The denoiser's averaged parameters, as they are used; arguments and errors as of `averages`."""
        return self.roles.weights(DENOISER, self.averages(state, decay))
