"""Several processes as one job: how they start, agree with each other, and stop at the same step.

The only module that knows JAX's coordination service. Everything but `start_processes` also works in a job of one
process, where it needs no service.
"""

import dataclasses
import itertools
import json
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import jax

from imagen_jax.errors import UserError
from imagen_jax.limits import MAX_PROCESSES, MAX_SIZE, shown
from imagen_jax.parallel.jax_internals import distributed, reached_preemption_sync_point

# Longer than anything that one process does while the others wait for its word; a process that dies is noticed
# by the heartbeats, much earlier.
_PATIENCE_MS = 3_600_000
# Exit code of a run that is not finished, because it was told to stop or a process died: the same command goes on.
EXIT_RESTART = 75
# The coordination service's own verdict kills without naming anybody. Its last sign of life may be half its time-out
# old when a process dies; even then the watchdog's verdict, and a farewell of some seconds, come first.
_BACKSTOP_SECONDS = 5

_numbers = itertools.count()
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """How a process finds the others of its job."""

    distributed: bool = False  # several processes, found by what TPU, GKE, Slurm or MPI say about them
    coordinator: str | None = None  # HOST:PORT of process 0, where nothing else tells; implies `distributed`
    num_processes: int | None = None  # together with `coordinator`
    process_id: int | None = None  # from 0; together with `coordinator`
    peer_timeout: float = 8.0  # seconds without a sign of life after which a process counts as dead

    def __post_init__(self) -> None:
        explicit = (self.coordinator, self.num_processes, self.process_id)
        if any(value is not None for value in explicit) and None in explicit:
            raise UserError(
                "--coordinator, --num_processes and --process_id belong together; "
                f"got {self.coordinator}, {self.num_processes} and {self.process_id}"
            )
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 0):
            raise UserError(
                f"--process_id={self.process_id} is not below --num_processes={self.num_processes}"
            )
        if self.num_processes is not None and self.num_processes > MAX_PROCESSES:
            raise UserError(f"--num_processes={shown(self.num_processes)}: must be at most {MAX_PROCESSES}")
        if not 0.0 < self.peer_timeout <= MAX_SIZE:
            raise UserError(
                f"--peer_timeout={self.peer_timeout}: must be above 0 and at most {MAX_SIZE:.0f} seconds"
            )
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            raise UserError(f"--coordinator must be HOST:PORT, got {self.coordinator!r}")
        if self.peer_timeout < 2.0:
            raise UserError(f"--peer_timeout must be at least 2 seconds, got {self.peer_timeout}")


def start_processes(config: ProcessConfig) -> None:
    """Connects this process with the others of its job; to be called before JAX makes its devices.

    Does nothing for a job of one process.

    Raises:
      UserError: `distributed` is set and nothing says which processes there are.
    """
    if not config.distributed and config.coordinator is None:
        return
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            heartbeat_timeout_seconds=2 * (round(config.peer_timeout) + _BACKSTOP_SECONDS),
        )
    except ValueError as error:
        raise UserError(
            f"--distributed: {error} Neither a TPU pod nor Slurm nor MPI shows in the environment; "
            "name --coordinator, --num_processes and --process_id"
        ) from error


def stop_processes() -> None:
    """Waits for the other processes and takes leave of them."""
    if distributed.global_state.client is not None:
        jax.distributed.shutdown()


def whoami() -> str:
    """Names the running process in messages: "process 3 (host tpu-w-3, pid 1234)"."""
    return f"process {jax.process_index()} (host {socket.gethostname()}, pid {os.getpid()})"


class KeyValueStore:
    """Small strings that all processes of the job see.

    Raises:
      RuntimeError: the job has one process only (on construction), or the service does not answer.
    """

    def __init__(self) -> None:
        client = distributed.global_state.client
        if client is None:
            raise RuntimeError("a job of one process has no key-value store")
        self._client = client

    def put(self, key: str, value: str) -> None:
        """Sets a value; an older one is replaced."""
        self._client.key_value_set(f"imagen_jax/{key}", value, allow_overwrite=True)

    def wait(self, key: str) -> str:
        """The value, as soon as there is one."""
        return self._client.blocking_key_value_get(f"imagen_jax/{key}", _PATIENCE_MS)

    def folder(self, key: str) -> dict[str, str]:
        """All values whose keys begin with `key` and a slash, by the last part of the key."""
        found = self._client.key_value_dir_get(f"imagen_jax/{key}/")
        return {name.rpartition("/")[2]: value for name, value in found}

    def barrier(self, key: str) -> None:
        """Waits until all processes are here; each key works once."""
        self._client.wait_at_barrier(f"imagen_jax/{key}", _PATIENCE_MS)


def gather(value: str) -> list[str]:
    """What every process says, by process; all have to call it, in the same order of calls."""
    if jax.process_count() == 1:
        return [value]
    store, key = KeyValueStore(), f"gather/{next(_numbers)}"
    store.put(f"{key}/{jax.process_index()}", value)
    store.barrier(key)
    said = store.folder(key)
    return [said[str(process)] for process in range(jax.process_count())]


def on_first(work: Callable[[], T]) -> T:
    """Runs `work` on process 0 only and gives every process its result, which must be plain JSON.

    All processes have to call it, in the same order of calls.

    Raises:
      UserError: on every process, if `work` raised it or an OSError.
    """
    if jax.process_count() == 1:
        return work()
    store, key = KeyValueStore(), f"first/{next(_numbers)}"
    if jax.process_index() == 0:
        try:
            result = work()
        except (UserError, OSError) as error:
            store.put(key, json.dumps({"error": str(error)}))
            raise
        store.put(key, json.dumps({"result": result}))
        return result
    said = json.loads(store.wait(key))
    if "error" in said:
        raise UserError(said["error"])
    return said["result"]


class StopRequest:
    """Turns SIGTERM into a stop between two steps, the same step on all processes.

    TPU VMs, Kubernetes, Slurm and people send SIGTERM some time before they kill.
    """

    def __init__(self) -> None:
        """Takes over SIGTERM; to be called in the main thread, early."""
        self._asked = False
        self._shared = False
        self._before = signal.signal(signal.SIGTERM, self._ask)

    def close(self) -> None:
        """Gives SIGTERM back its meaning; where it is shared JAX keeps it until the process ends."""
        if not self._shared:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def share(self) -> None:
        """To be called after `start_processes`: from now on a signal to any process stops all."""
        self._shared = distributed.global_state.client is not None
        if not self._shared:
            return
        # JAX has replaced the handler, and not seen a signal that came before.
        if self._asked:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; to be called after every step, on all processes."""
        if self._shared:
            return bool(reached_preemption_sync_point(step))
        return self._asked
