"""Signs of life of work that cannot say how far it is."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def elapsed(what: str, *, enabled: bool = True, least: float = 1.0) -> Iterator[None]:
    """Shows on stderr what is being waited for, and for how long so far.

    On a terminal one line that counts seconds, else a line every half minute; a last one when it is done.

    Args:
      what: as in "compiling base64".
      enabled: whether anything is shown.
      least: seconds; of what takes less nothing is said.
    """
    if not enabled:
        yield
        return
    done, terminal, start = threading.Event(), sys.stderr.isatty(), time.monotonic()

    def say(ending: str) -> None:
        beginning = "\r" if terminal else ""
        print(f"{beginning}{what}: {time.monotonic() - start:.0f} s", end=ending, file=sys.stderr, flush=True)

    def show() -> None:
        wait = max(1.0, least)
        while not done.wait(wait if terminal else 30.0):
            say("" if terminal else "\n")
            wait = 1.0

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if time.monotonic() - start >= least:
            say("\n")
