"""Draws what is asked for, one request at a time, and keeps the pictures."""

import collections
import dataclasses
import enum
import itertools
import math
import secrets
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.sampling.batches import Preview
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.drawing import Drawing
from imagen_jax.sampling.output import Place, find_place, save_picture
from imagen_jax.sampling.overrides import SamplingOverrides
from imagen_jax.sampling.record import PictureRecord, read_record
from imagen_jax.serving.request import Limits, PictureRequest

T = TypeVar("T")
MAX_JOBS = 128  # that wait or are drawn
MAX_CLIENT_JOBS = 32  # of these, of one client
MAX_SHOWN = 500  # pictures in the gallery, and in a folder that the server made for itself
_OVERVIEWS = ("grid.png", "preview.png")  # that `imagen-jax sample` writes beside pictures


class JobState(enum.Enum):
    """How far a request has come."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self not in (JobState.WAITING, JobState.RUNNING)


class _Stopped(BaseException):
    """Leaves the sampling loop; no error, so that nothing on the way takes it for one."""


class Job:
    """A request on its way. Fields are written by the thread that draws and read by the pages."""

    def __init__(self, number: int, request: PictureRequest, total_calls: int, client: str = ""):
        self.number, self.request, self.client = number, request, client
        self._state = JobState.WAITING
        self.message = ""  # one line, where it failed
        self.warnings: list[str] = []  # lines: what of its prompts the stages do not see
        self.names: list[str] = []  # files of its pictures, as they come
        self.preview: Preview | None = None
        self._total, self._finished = total_calls, 0  # network calls; those of completed runs of a stage
        self._stop = threading.Event()
        self._watchers: set[object] = set()
        self._future: Future[None] | None = None
        self._started: float | None = None
        self._ended: float | None = None

    @property
    def state(self) -> JobState:
        """How far it is. One that was stopped is over at once, though the compiler, which nothing ends, may go on."""
        state = self._state
        return JobState.STOPPED if self._stop.is_set() and not state.over else state

    @property
    def fraction(self) -> float:
        """Share of the network calls that are made."""
        if self.state is JobState.DONE:
            return 1.0
        preview = self.preview
        call = 0 if preview is None else preview.call
        return min(1.0, (self._finished + call) / max(1, self._total))

    @property
    def seconds(self) -> float:
        """Since drawing began, without the time in the queue."""
        if self._started is None:
            return 0.0
        return (self._ended or time.monotonic()) - self._started

    def queued(self, future: "Future[None]") -> None:
        """It waits for its turn as `future`."""
        self._future = future

    def stop(self) -> None:
        """Takes it out of the queue; where it is being drawn it ends before the next network call."""
        if self.state.over:
            return
        self._ended = time.monotonic()
        self._stop.set()
        if self._future is not None:
            self._future.cancel()  # does nothing to what runs

    def join(self, watcher: object) -> None:
        """Somebody waits for it."""
        self._watchers.add(watcher)

    def leave(self, watcher: object) -> None:
        """Somebody waits no more; when nobody is left, it stops."""
        self._watchers.discard(watcher)
        if not self._watchers:
            self.stop()

    def start(self) -> None:
        """Its turn has come."""
        if self._stop.is_set():
            raise _Stopped
        self._started, self._state = time.monotonic(), JobState.RUNNING

    def watch(self, preview: Preview) -> None:
        """Called by the sampling loop."""
        if self._stop.is_set():
            raise _Stopped
        last = self.preview
        # Stages and batches follow each other in an order of the cascade's own: a new one begins with a low call.
        if last is not None and (preview.stage != last.stage or preview.call <= last.call):
            self._finished += last.calls
        self.preview = preview

    def finish(self, future: "Future[None]") -> None:
        """Says how it ended; an error that is no user's also goes to the terminal with its traceback."""
        self._ended = self._ended or time.monotonic()
        self.preview = None  # nobody looks at it now, and it may be large
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, _Stopped):
            self.message = _one_line(error)
        # A stop that came after the last picture, or before a failure, stays one.
        if future.cancelled() or self._stop.is_set():
            self._state = JobState.STOPPED
        elif error is None:
            self._state = JobState.DONE
        else:
            self._state = JobState.FAILED


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    if "RESOURCE_EXHAUSTED" in first:
        return "the device's memory is too small for this: ask for fewer pictures, or start with a smaller --batch_size"
    if isinstance(error, (UserError, OSError)):
        return first
    traceback.print_exception(error)
    return f"{type(error).__name__}: {first} (the terminal shows more)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture of the gallery."""

    name: str  # of its file
    record: PictureRecord
    again: PictureRequest | None  # what makes it again on the page; None: made with settings the page lacks
    series: int  # pictures that were asked for together have the same, later ones a higher one


class Studio:
    """A model, the queue before it and the folder of its pictures."""

    def __init__(
        self,
        model: Imagen,
        folder: epath.Path,
        *,
        batch_size: int = 4,
        temporary: bool = False,
        limits: Limits | None = None,
    ):
        """Takes up the newest pictures that lie in `folder`.

        Args:
          model: draws.
          folder: gets the pictures, as `imagen-jax sample` writes them.
          batch_size: pictures drawn together.
          temporary: whether pictures are removed when they leave the gallery.
          limits: of a request; None: the usual ones.

        Raises:
          UserError: if batch_size is out of range.
        """
        model.check(Drawing(wanted=()), batch_size=batch_size)
        self.model, self.folder, self._batch_size, self._temporary = model, folder, batch_size, temporary
        self.limits = limits or Limits()
        # A page remembers a number over a restart of the server, and must not find another's request by it.
        self._numbers, self._series = itertools.count(1 + secrets.randbelow(2**48)), itertools.count(1)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="studio")
        self._waiting: collections.OrderedDict[int, Job] = collections.OrderedDict()
        self._over: collections.deque[Job] = collections.deque(maxlen=MAX_JOBS)
        self._shown: dict[str, Shown] = {}  # oldest first
        self._lock = threading.Lock()
        self.passed_over: list[str] = []  # what files of the folder are no part of the gallery, and why
        self._take_up()

    def _take_up(self) -> None:
        paths = [path for path in self.folder.glob("*.png") if path.name not in _OVERVIEWS and path.is_file()]
        records: list[tuple[str, PictureRecord]] = []
        for path in sorted(paths, key=lambda path: (path.stat().mtime, path.name), reverse=True):
            if len(records) == MAX_SHOWN:
                break
            try:
                records.append((path.name, read_record(path, flag="--out")))
            except UserError as error:
                self.passed_over.append(str(error).removeprefix("--out "))
        last: PictureRecord | None = None
        series = next(self._series)
        for name, record in reversed(records):
            if last is not None and (record.prompt, record.seed) != (last.prompt, last.seed + 1):
                series = next(self._series)
            self._show(name, record, series)
            last = record

    def _sampling_calls(self, request: PictureRequest) -> int:
        batches = math.ceil(request.num_images / self._batch_size)
        configs = request.sampling(self.model.stages).values()
        return batches * sum(config.sampler.network_calls for config in configs)

    def submit(self, request: PictureRequest, client: str = "") -> Job:
        """Puts a request at the end of the queue.

        Args:
          request: what to draw.
          client: address of who asks; empty: of nobody in particular, whose requests are not counted.

        Raises:
          UserError: if it cannot be drawn, or too many wait.
        """
        self.limits.check(request, self.model.stages)
        drawing = request.drawing(self.model.stages)
        self.model.check(drawing)
        warnings = self.model.text_warnings(drawing)
        with self._lock:
            if len(self._waiting) >= MAX_JOBS:
                raise UserError(f"{len(self._waiting)} requests wait already: try again later")
            others = sum(job.client == client for job in self._waiting.values()) if client else 0
            if others >= MAX_CLIENT_JOBS:
                raise UserError(f"{others} requests from your address wait already: try again later")
            job = Job(next(self._numbers), request, self._sampling_calls(request), client)
            job.warnings = [str(each) for each in warnings]
            self._waiting[job.number] = job
            future = self._worker.submit(self._draw, job)
            job.queued(future)
        future.add_done_callback(lambda done: self._end(job, done))
        return job

    def _end(self, job: Job, future: "Future[None]") -> None:
        job.finish(future)
        with self._lock:
            self._over.append(self._waiting.pop(job.number))

    def job(self, number: int) -> Job | None:
        """A request that waits, is drawn or was over not long ago, by its number."""
        with self._lock:
            return next((job for job in (*self._waiting.values(), *self._over) if job.number == number), None)

    def before(self, job: Job) -> int:
        """How many requests come before this one."""
        with self._lock:
            return sum(number < job.number for number in self._waiting)

    def _draw(self, job: Job) -> None:
        job.start()
        series = next(self._series)
        drawing = job.request.drawing(self.model.stages)
        records = [self.model.record(drawing, number) for number in range(len(drawing.wanted))]
        places = [find_place(self.folder, 0, record) for record in records]
        for place in places:
            if place.there:  # asked for before: the same picture would come out
                self._done(job, place, series)
        missing = [number for number, place in enumerate(places) if not place.there]
        pictures = self.model.draw(drawing.part(missing), batch_size=self._batch_size, preview=job.watch)
        for picture in pictures:
            place = places[missing[picture.index]]
            save_picture(place, picture.pixels)
            self._done(job, place, series)

    def _done(self, job: Job, place: Place, series: int) -> None:
        self._show(place.path.name, place.record, series)
        job.names.append(place.path.name)

    def _show(self, name: str, record: PictureRecord, series: int) -> None:
        shown = Shown(name=name, record=record, again=self._request_of(record), series=series)
        with self._lock:
            self._shown.pop(name, None)  # asked for again: to the front
            self._shown[name] = shown
            last = None if len(self._shown) <= MAX_SHOWN else next(iter(self._shown))
            if last is not None:
                del self._shown[last]
        if last is not None and self._temporary:
            (self.folder / last).unlink(missing_ok=True)

    def _request_of(self, record: PictureRecord) -> PictureRequest | None:
        """The request that makes a picture again; None if the page or this model cannot."""
        if [each.name for each in record.stages] != [stage.name for stage in self.model.stages]:
            return None
        overrides = tuple(
            SamplingOverrides(
                steps=_unless(each.sampling.sampler.steps, stage.sampling.sampler.steps),
                sampler=_unless(each.sampling.sampler.kind, stage.sampling.sampler.kind),
                guidance_weight=_unless(each.sampling.guidance_weight, stage.sampling.guidance_weight),
            )
            for each, stage in zip(record.stages, self.model.stages)
        )
        try:
            request = PictureRequest(
                prompt=record.prompt,
                negative_prompt=record.negative_prompt,
                seed=record.seed,
                overrides=overrides,
            )
            again = self.model.record(request.drawing(self.model.stages))
        except UserError:
            return None
        return request if again.same_picture(record.to_metadata()) else None

    def gallery(self) -> Sequence[Shown]:
        """The pictures: what was asked for last comes first, and of that the lowest seed."""
        with self._lock:
            return sorted(self._shown.values(), key=lambda shown: (-shown.series, shown.record.seed))

    def find(self, name: str) -> Shown | None:
        """A picture of the gallery by its file's name."""
        with self._lock:
            return self._shown.get(name)

    def close(self) -> None:
        """Ends what is being drawn and what waits."""
        with self._lock:
            jobs = list(self._waiting.values())
        for job in jobs:
            job.stop()
        self._worker.shutdown(wait=True, cancel_futures=True)


def _unless(value: T, own: T) -> T | None:
    """None for the stage's own value."""
    return None if value == own else value
