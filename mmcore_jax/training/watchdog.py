"""A watch over the loop: a process that hangs says where all its threads stand, and ends, to be started again."""

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator

import jax

from mmcore_jax.config import Watchdog
from mmcore_jax.training.goodput import Goodput

HUNG = 75  # the exit code: EX_TEMPFAIL of sysexits.h
_STEPPING = ("useful", "data_wait")


@contextlib.contextmanager
def watching(workdir: pathlib.Path, settings: Watchdog, goodput: Goodput) -> Iterator[None]:
    """Ends the process with `HUNG` if the same part of `goodput` goes on for too long; see `config.Watchdog`.

    The stacks go to stderr and to a file `WORKDIR/hang_TIME_PROCESS.txt`.
    """
    over = threading.Event()
    if settings.minutes:
        threading.Thread(target=_watch, args=(workdir, settings, goodput, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        faulthandler.cancel_dump_traceback_later()


def _watch(workdir: pathlib.Path, settings: Watchdog, goodput: Goodput, over: threading.Event) -> None:
    tick, quiet, changes = min(1.0, 6 * settings.minutes), 0.0, -1
    while not over.wait(tick):
        # In case something holds the interpreter, and this thread with it.
        faulthandler.dump_traceback_later(60 * (settings.minutes + settings.patience), exit=True, file=sys.__stderr__)
        # In ticks, not by a clock: a process that was itself stopped for a while does not hang.
        quiet = quiet + tick if goodput.changes == changes else 0.0
        changes = goodput.changes
        minutes = settings.minutes if goodput.part in _STEPPING else settings.patience
        if quiet > 60 * minutes:
            _end(workdir / f"hang_{int(time.time())}_{jax.process_index()}.txt", goodput.part, quiet)


def _end(path: pathlib.Path, part: str, seconds: float) -> None:
    line = f"error: the run hangs, {seconds / 60:.1f} minutes in {part!r} without a step: it ends, see {path}."
    print(line, file=sys.__stderr__, flush=True)
    faulthandler.dump_traceback(sys.__stderr__)
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)  # in case it is the workdir that hangs
    with path.open("w") as file:
        file.write(line + "\n")
        file.flush()
        faulthandler.dump_traceback(file)
    os._exit(HUNG)
