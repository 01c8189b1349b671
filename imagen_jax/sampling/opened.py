"""Stages that are ready to draw: their programs and weights, opened when they are wanted or ahead of that."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from imagen_jax.models.configs import Params
from imagen_jax.sampling.model_folder import ModelFolder
from imagen_jax.sampling.programs import (
    ProgramSpec,
    StageProgram,
    load_program,
    prepare,
    program_file,
    stored_params,
)


class OpenStages:
    """Programs and weights of a model folder's stages; the weights can be freed."""

    def __init__(self, folder: ModelFolder, cache: Path | None):
        """`cache` is the folder of `imagen_jax.cache`; None: programs are not remembered."""
        self._folder, self._cache = folder, cache
        self._programs: dict[ProgramSpec, StageProgram] = {}
        self._params: dict[str, Params] = {}
        self._coming_programs: dict[ProgramSpec, Future[StageProgram | None]] = {}
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
        coming = self._coming_programs.pop(spec, None)
        if coming is not None and (loaded := coming.result()) is not None:
            self._programs[spec] = loaded
        if spec not in self._programs:
            self._programs[spec] = prepare(spec, program_file(spec, self._cache))
        program = self._programs[spec]
        if name in self._coming_params:
            self._params[name] = self._coming_params.pop(name).result()
        if name not in self._params:
            place = program.parameter_shardings
            self._params[name] = self._folder.params(name, program.abstract_params, place)
        return program, self._params[name]

    def free(self, name: str) -> None:
        """Lets a stage's weights leave memory."""
        self._params.pop(name, None)
