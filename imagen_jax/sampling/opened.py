"""Stages that are ready to draw: their programs and weights, opened when they are wanted or ahead of that."""

import collections
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from imagen_jax.models.network import Params
from imagen_jax.sampling.model_folder import ModelFolder
from imagen_jax.sampling.programs import (
    ProgramSpec,
    StageProgram,
    load_program,
    prepare,
    program_file,
    stored_params,
)

MAX_PROGRAMS = (
    16  # in memory; those that were used longest ago leave it. All settings and batch shapes have their own
)


class OpenStages:
    """Programs and weights of a model folder's stages; the weights can be freed."""

    def __init__(self, folder: ModelFolder, cache: Path | None):
        """`cache` is the folder of `imagen_jax.cache`; None: programs are not remembered."""
        self._folder, self._cache = folder, cache
        self._most = max(MAX_PROGRAMS, len(folder.stages))
        # The one that was used longest ago comes first.
        self._programs: collections.OrderedDict[ProgramSpec, StageProgram] = collections.OrderedDict()
        self._params: dict[str, Params] = {}
        # Of a request that is stopped they are never asked for: no more of them are kept than of the others.
        self._coming_programs: collections.OrderedDict[ProgramSpec, Future[StageProgram | None]]
        self._coming_programs = collections.OrderedDict()
        self._coming_params: dict[str, Future[Params]] = {}
        # One at a time: the stage that is wanted first is not to share the processor with those that come later.
        self._load_programs, self._read_params = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def ahead(self, spec: ProgramSpec) -> None:
        """Reads a stored program and its weights while something else goes on; nothing is compiled so."""
        name = spec.stage.name
        if spec in self._programs or spec in self._coming_programs:
            return
        file = program_file(spec, self._cache)
        if file is None or file.note is None:
            return
        self._coming_programs[spec] = self._load_programs.submit(load_program, spec, file)
        if len(self._coming_programs) > self._most:
            self._coming_programs.popitem(last=False)[1].cancel()
        if name not in self._params and name not in self._coming_params:
            abstract = stored_params(file)
            shardings = spec.shardings(abstract)
            place = None if shardings is None else shardings[0]
            self._coming_params[name] = self._read_params.submit(self._folder.params, name, abstract, place)

    def get(self, spec: ProgramSpec) -> tuple[StageProgram, Params]:
        """A stage's program and weights.

        Raises:
          UserError: the weights are missing, or of another network.
        """
        name = spec.stage.name
        program = self._program(spec)
        if name in self._coming_params:
            self._params[name] = self._coming_params.pop(name).result()
        if name not in self._params:
            place = program.parameter_shardings
            self._params[name] = self._folder.params(name, program.abstract_params, place)
        return program, self._params[name]

    def _program(self, spec: ProgramSpec) -> StageProgram:
        coming = self._coming_programs.pop(spec, None)
        if coming is not None and (loaded := coming.result()) is not None:
            self._programs[spec] = loaded
        if spec not in self._programs:
            self._programs[spec] = prepare(spec, program_file(spec, self._cache))
        self._programs.move_to_end(spec)
        while len(self._programs) > self._most:
            self._programs.popitem(last=False)
        return self._programs[spec]

    def free(self, name: str) -> None:
        """Lets a stage's weights leave memory."""
        self._params.pop(name, None)
