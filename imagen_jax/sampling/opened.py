"""Stages that are ready to draw: their programs and weights, opened when they are wanted."""

import collections
from pathlib import Path

from imagen_jax.cache import trim
from imagen_jax.models.network import Params
from imagen_jax.progress import elapsed
from imagen_jax.sampling.model_folder import ModelFolder
from imagen_jax.sampling.programs import ProgramSpec, StageProgram, prepare

MAX_PROGRAMS = (
    16  # in memory; those that were used longest ago leave it. All settings and batch shapes have their own
)


class OpenStages:
    """Programs and weights of a model folder's stages; the weights can be freed."""

    def __init__(self, folder: ModelFolder, cache: Path | None = None):
        """`cache` is the folder of `imagen_jax.cache`, which is kept within its bounds; None: there is none."""
        self._folder, self._cache = folder, cache
        self._most = max(MAX_PROGRAMS, len(folder.stages))
        # The one that was used longest ago comes first.
        self._programs: collections.OrderedDict[ProgramSpec, StageProgram] = collections.OrderedDict()
        self._params: dict[str, Params] = {}

    def get(self, spec: ProgramSpec, *, progress: bool = False) -> tuple[StageProgram, Params]:
        """A stage's program and weights.

        Args:
          spec: of the program.
          progress: whether to say how long it compiles.

        Raises:
          UserError: the weights are missing, or of another network.
        """
        name, program = spec.stage.name, self._program(spec, progress)
        if name not in self._params:
            place = program.parameter_shardings
            self._params[name] = self._folder.params(name, program.abstract_params, place)
        return program, self._params[name]

    def _program(self, spec: ProgramSpec, progress: bool) -> StageProgram:
        if spec not in self._programs:
            with elapsed(f"compiling {spec.stage.name}", enabled=progress):
                self._programs[spec] = prepare(spec)
            trim(self._cache)
        self._programs.move_to_end(spec)
        while len(self._programs) > self._most:
            self._programs.popitem(last=False)
        return self._programs[spec]

    def free(self, name: str) -> None:
        """Lets a stage's weights leave memory."""
        self._params.pop(name, None)
