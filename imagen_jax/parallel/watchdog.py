"""Ends every process of a job as soon as one of them is gone or has stopped stepping, and says which.

Without it the others wait in a collective for ever. Every process posts a sign of life and its place in the loop
to the job's key-value store; process 0 judges by its own clock and posts the verdict, which all read: a second costs
each process two short calls, however many there are.
"""

import contextlib
import dataclasses
import enum
import json
import os
import sys
import threading
import time
from collections.abc import Iterator

import jax

from imagen_jax.errors import UserError
from imagen_jax.files import json_field, json_object, parse_json
from imagen_jax.parallel.processes import EXIT_RESTART, KeyValueStore, whoami

# What is named as long work (compilation, sample grids) may take this long, in seconds.
LONG_WORK_SECONDS = 3600.0
# For the other processes to read the verdict from process 0 before it takes the store with it.
_FAREWELL_SECONDS = 2.5


class Phase(enum.IntEnum):
    """What a process does in its current step, in this order."""

    DATA = 0
    STEP = 1
    LOG = 2
    LONG = 3  # compilation, a sample grid, the last save

    @property
    def shown(self) -> str:
        """For messages."""
        return {
            Phase.DATA: "waiting for data of",
            Phase.STEP: "starting",
            Phase.LOG: "waiting for the devices in",
            Phase.LONG: "at long work after",
        }[self]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Life:
    """What a process posts about itself."""

    beat: int  # counts up as long as the process lives at all
    step: int  # the step it is in
    phase: Phase
    who: str
    done: bool = False  # it has come to its end

    @property
    def place(self) -> tuple[int, int]:
        """Sorts processes by how far they are."""
        return self.step, int(self.phase)

    @classmethod
    def from_json(cls, text: str, where: str) -> "Life":
        """What a process has posted.

        Raises:
          UserError: it is something else, as of a process of another version.
        """
        content = json_object(parse_json(text, where), where)
        phase = json_field(content, "phase", int, where)
        if phase not in list(Phase):
            raise UserError(f"{where}: 'phase' must be one of {list(map(int, Phase))}, got {phase}")
        return cls(
            beat=json_field(content, "beat", int, where),
            step=json_field(content, "step", int, where),
            phase=Phase(phase),
            who=json_field(content, "who", str, where),
            done=json_field(content, "done", bool, where),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why the job ends."""

    message: str
    code: int  # exit code of all processes
    process: int  # whose fault it is; -1: unknown

    @classmethod
    def from_json(cls, text: str, where: str) -> "Verdict":
        """What a process has posted; raises as `Life.from_json`."""
        content = json_object(parse_json(text, where), where)
        return cls(
            message=json_field(content, "message", str, where),
            code=json_field(content, "code", int, where),
            process=json_field(content, "process", int, where),
        )


class Judge:
    """Finds the process that is gone or has stopped, from what all of them posted; process 0's part.

    Args:
      step_timeout: seconds without a step after which the job counts as stuck; 0: never.
      peer_timeout: seconds without a sign of life after which a process counts as dead.
      now: monotonic time of the start, seconds.
    """

    def __init__(self, *, processes: int, step_timeout: float, peer_timeout: float, now: float):
        self._step_timeout, self._peer_timeout = step_timeout, peer_timeout
        self._seen: dict[int, tuple[Life | None, float]] = dict.fromkeys(range(processes), (None, now))
        self._moved = now

    def look(self, lives: dict[int, Life], now: float) -> Verdict | None:
        """Takes notice of what the processes posted by `now`; gives a verdict once there is one."""
        for process, life in lives.items():
            before, _ = self._seen[process]
            if before is None or life.beat != before.beat:
                self._seen[process] = (life, now)
            if before is None or life.place != before.place:
                self._moved = now
        for process, (seen, when) in self._seen.items():
            if (seen is None or not seen.done) and now - when > self._peer_timeout:
                return self._dead(process, seen, now - when)
        return self._stuck(now)

    def _dead(self, process: int, life: Life | None, seconds: float) -> Verdict:
        who = f"process {process}" if life is None else life.who
        where = "" if life is None else f" (it was {life.phase.shown} step {life.step})"
        message = f"{who} has given no sign of life for {seconds:.0f} s{where}"
        return Verdict(message=message, code=EXIT_RESTART, process=process)

    def _stuck(self, now: float) -> Verdict | None:
        lives = {p: life for p, (life, _) in self._seen.items() if life is not None and not life.done}
        if not lives or not self._step_timeout:
            return None
        behind = min(lives, key=lambda process: lives[process].place)
        last = lives[behind]
        limit = self._step_timeout
        if last.phase is Phase.LONG:
            limit = max(limit, LONG_WORK_SECONDS)
        if now - self._moved <= limit:
            return None
        message = (
            f"{last.who} stopped stepping: {last.phase.shown} step {last.step} for {now - self._moved:.0f} s"
        )
        if len(lives) > 1 and all(life.place == last.place for life in lives.values()):
            message = f"all processes stopped stepping: {message}, and so do the others"
            return Verdict(message=message, code=EXIT_RESTART, process=-1)
        return Verdict(message=message, code=EXIT_RESTART, process=behind)


class Watchdog:
    """Watches over this process and, in a job of several, over the others.

    Until `start` is called it does nothing, so that a Python caller of the trainer is never ended by it.

    Args:
      step_timeout: seconds without a step after which all processes end; 0: never.
      peer_timeout: seconds without a sign of life of a process after which the others end.
      command: what to begin messages with.
    """

    def __init__(
        self, *, step_timeout: float = 0.0, peer_timeout: float = 8.0, command: str = "imagen-jax train"
    ):
        self._step_timeout, self._peer_timeout, self._command = step_timeout, peer_timeout, command
        self._period = min(1.0, peer_timeout / 4)
        self._place = (0, Phase.LONG)
        self._answered = time.monotonic()
        self._beats = 0
        self._store: KeyValueStore | None = None
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._main = threading.get_ident()

    def start(self) -> None:
        """Begins to watch; to be called in the main thread, when the processes are connected."""
        several = jax.process_count() > 1
        self._store = KeyValueStore() if several else None
        self._answered = time.monotonic()
        works = [self._watch, self._watch_answers] if several else [self._watch]
        self._threads = [threading.Thread(target=work, name="watchdog", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def at(self, step: int, phase: Phase) -> None:
        """Says that the loop begins `phase` of `step`."""
        self._place = (step, phase)

    @contextlib.contextmanager
    def long_work(self, step: int) -> Iterator[None]:
        """Something that may take much longer than a step, after `step`."""
        before = self._place
        self._place = (step, Phase.LONG)
        yield
        self._place = before

    def close(self) -> None:
        """Stops watching; the others know that this process has come to its end."""
        if not self._threads:
            return
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._store is not None:
            self._post(self._store, done=True)

    def give_up(self, message: str, code: int) -> None:
        """Ends this process, for a reason that it has printed, and tells the others to end; never returns."""
        if self._store is not None:
            said = f"{whoami()} gave up: {message}"
            self._put(self._store, Verdict(message=said, code=code, process=jax.process_index()))
        self._leave(code)

    def await_verdict(self) -> None:
        """Lets the watchdog say which process is gone, where a failed collective came before its verdict.

        Returns if it does not: then the failure has another reason.
        """
        if self._threads:
            time.sleep(self._peer_timeout + 3 * self._period)

    def _life(self, *, done: bool = False) -> Life:
        self._beats += 1
        step, phase = self._place
        return Life(beat=self._beats, step=step, phase=phase, who=whoami(), done=done)

    def _post(self, store: KeyValueStore, *, done: bool = False) -> None:
        store.put(f"life/{jax.process_index()}", json.dumps(dataclasses.asdict(self._life(done=done))))

    def _put(self, store: KeyValueStore, verdict: Verdict) -> None:
        store.put(f"verdict/{jax.process_index()}", json.dumps(dataclasses.asdict(verdict)))

    def _watch(self) -> None:
        judge = Judge(
            processes=jax.process_count() if self._store else 1,
            step_timeout=self._step_timeout,
            peer_timeout=self._peer_timeout,
            now=time.monotonic(),
        )
        while not self._ended.wait(self._period):
            if self._store is None:
                verdict = judge.look({0: self._life()}, time.monotonic())
            else:
                self._post(self._store)
                verdict = self._others(self._store, judge)
            self._answered = time.monotonic()
            if verdict is not None and not self._ended.is_set():
                self._end(verdict)

    def _others(self, store: KeyValueStore, judge: Judge) -> Verdict | None:
        """The verdict that somebody posted, or on process 0 its own."""
        try:
            for process, text in store.folder("verdict").items():
                return Verdict.from_json(text, f"the verdict of process {process}")
            if jax.process_index() != 0:
                return None
            lives = {
                int(process): Life.from_json(text, f"the sign of life of process {process}")
                for process, text in store.folder("life").items()
            }
        except UserError as error:
            message = f"{error}; all processes must run the same version of imagen_jax"
            return Verdict(message=message, code=1, process=-1)
        verdict = judge.look(lives, time.monotonic())
        if verdict is not None:
            self._put(store, verdict)
        return verdict

    def _watch_answers(self) -> None:
        """Notices that process 0, which keeps the store, does not answer: then `_watch` hangs in a call."""
        while not self._ended.wait(self._period):
            silent = time.monotonic() - self._answered
            if silent > self._peer_timeout + self._period:
                message = f"process 0 has given no sign of life for {silent:.0f} s"
                self._end(Verdict(message=message, code=EXIT_RESTART, process=0))

    def _end(self, verdict: Verdict) -> None:
        where = f"; it is {self._main_frame()}" if verdict.process == jax.process_index() else ""
        advice = "; start the job again to go on" if verdict.code == EXIT_RESTART else ""
        # Past sys.stderr, which the main thread may hold or have redirected.
        os.write(2, f"\n{self._command}: error: {verdict.message}{where}{advice}\n".encode())
        self._leave(verdict.code)

    def _main_frame(self) -> str:
        """Where the main thread is."""
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "at its end"
        code = frame.f_code
        return f"in {code.co_name} ({code.co_filename}, line {frame.f_lineno})"

    def _leave(self, code: int) -> None:
        if self._store is not None and jax.process_index() == 0:
            time.sleep(_FAREWELL_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        # Everything gentler waits for the processes that are gone.
        os._exit(code)
