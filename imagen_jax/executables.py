"""Compiled programs as files: what the compiler made, run again without tracing or lowering anything.

JAX's own compilation cache finds a program by what tracing and lowering make of it, which needs the network's code and
takes longer than all else before a first step. Here a program is found by its description. The files hold XLA's own
serialisation, no pickle, and only what `cache.program_key` takes for the same machine and code is ever loaded.
"""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from imagen_jax.cache import load_program, no_compilation_cache, program_key, save_program
from imagen_jax.errors import UserError
from imagen_jax.files import parse_json

_LOG = logging.getLogger(__name__)
_LENGTH_BYTES = 8  # of the number that says how long the note is


class Program:
    """A compiled function of trees of arrays, to be called as the function was."""

    def __init__(self, executable: Any, devices: Sequence[jax.Device], results: Any):
        """`executable` is XLA's; `results` are shapes with shardings, a tree as the function returns."""
        self._executable, self._devices = executable, tuple(devices)
        self._results, self._tree = jax.tree.flatten(results)

    def __call__(self, *arguments: Any) -> Any:
        """Runs it. Arrays that are on the devices already must lie there as the program was compiled for."""
        leaves = [
            each if isinstance(each, jax.Array) else self._place(each) for each in jax.tree.leaves(arguments)
        ]
        made = self._executable.execute_sharded(leaves).disassemble_into_single_device_arrays()
        if len(self._devices) == 1:
            return jax.tree.unflatten(self._tree, [parts[0] for parts in made])
        whole = [
            jax.make_array_from_single_device_arrays(result.shape, result.sharding, parts)
            for result, parts in zip(self._results, made, strict=True)
        ]
        return jax.tree.unflatten(self._tree, whole)

    def _place(self, value: Any) -> jax.Array:
        """A number or a small array on every device."""
        if len(self._devices) == 1:
            return jax.device_put(value, self._devices[0])
        mesh = self._results[0].sharding.mesh
        return jax.device_put(value, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramFile:
    """Where a program is kept."""

    folder: Path  # of `cache.cache_folder`
    description: Any  # in JSON types: all that decides the program, beside what `cache.program_key` adds
    devices: tuple[jax.Device, ...]  # in the order of the mesh
    results: Any  # tree of `jax.ShapeDtypeStruct` with shardings

    @functools.cached_property
    def key(self) -> str:
        """Its name in the folder."""
        return program_key(self.description, self.devices)

    @functools.cached_property
    def _content(self) -> tuple[Any, bytes] | None:
        content = load_program(self.folder, self.key)
        if content is None:
            return None
        end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
        try:
            return parse_json(content[_LENGTH_BYTES:end], f"the note of {self.key}"), content[end:]
        except UserError as error:
            _LOG.warning("a stored program is compiled anew (%s)", error)
            return None

    @property
    def note(self) -> Any:
        """What was said of the program when it was kept; None if there is no such program."""
        return None if self._content is None else self._content[0]

    def load(self) -> Program | None:
        """The program; None if there is none, or this JAX cannot load it."""
        if self._content is None:
            return None
        client = self.devices[0].client
        try:
            found = client.deserialize_executable(self._content[1], executable_devices=self.devices)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            _LOG.warning("a stored program cannot be loaded and is compiled anew (%s)", error)
            return None
        return Program(found, self.devices, self.results)

    def make(self, compile_program: Callable[[], jax.stages.Compiled], arguments: Any, note: Any) -> Any:
        """Compiles a program and keeps it, unless JAX or the disk has no way to.

        Args:
          compile_program: compiles it; all its arguments are used (`jax.jit` with `keep_unused`).
          arguments: tree of what it takes.
          note: in JSON types, to be read without loading the program.

        Returns:
          What to call: the program as later processes run it where it was kept, else as it was compiled.
        """
        with no_compilation_cache():
            compiled = compile_program()
        try:
            executable: Any = compiled.runtime_executable()
            # Constants that JAX hands over as hidden arguments would be missing.
            if len(executable.get_parameter_layouts()) != len(jax.tree.leaves(arguments)):
                return compiled
            content = bytes(executable.serialize())
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return compiled
        text = json.dumps(note).encode()
        with contextlib.suppress(UserError):  # a full disk is no reason to draw no pictures
            save_program(self.folder, self.key, len(text).to_bytes(_LENGTH_BYTES, "little") + text + content)
        return Program(executable, self.devices, self.results)
