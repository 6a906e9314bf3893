"""Goodput: the share of the wall time of a run that goes into steps which last.

The time since the run began, over all processes that have worked on it one after the other, is divided without rest:

  useful       steps, from when the device has something to do
  start        import, data, parameters, restore
  compile      of the step
  data_wait    the device has nothing to do, for want of a batch
  checkpoint   saving, as far as the run waits for it
  evaluation   gauges and pictures
  lost         steps that were taken again, after a restart or a rollback
  down         no process; of one that was killed, also what came after its last record
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax

from mmcore_jax.writing import write_text

PARTS = ("useful", "start", "compile", "data_wait", "checkpoint", "evaluation", "lost", "down")
_POLL = 0.005  # seconds


class Goodput:
    """Accounts for the wall time of a run, in `WORKDIR/goodput.json`: at any time it goes to one part."""

    def __init__(self, workdir: pathlib.Path) -> None:
        """Continues the account of the workdir. The time since this process began goes to "start" of its first run."""
        self._path, now = workdir / "goodput.json", time.time()
        self.seconds, began = dict.fromkeys(PARTS, 0.0), now - _age()
        if self._path.exists():
            known = json.loads(self._path.read_text())
            began = max(began, known["until"])
            self.seconds |= known["seconds"]
            self.seconds["down"] += began - known["until"]
        self._part, self._since, self.changes = "start", time.perf_counter() - (now - began), 0

    @property
    def part(self) -> str:
        """What the time goes to at present."""
        return self._part

    def enter(self, part: str) -> str:
        """From now on the time goes to `part`; returns what it went to before."""
        now, before = time.perf_counter(), self._part
        self.seconds[before] += now - self._since
        self._part, self._since = part, now
        self.changes += 1
        return before

    @contextlib.contextmanager
    def spent_on(self, part: str) -> Iterator[None]:
        """The time of a block goes to `part`."""
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def resume(self, useful: float) -> None:
        """Begins again at a checkpoint before which `useful` seconds of steps were taken; those after it are lost."""
        self.enter("start")
        lost = max(self.seconds["useful"] - useful, 0.0)
        self.seconds["useful"] -= lost
        self.seconds["lost"] += lost

    def batches(self, batches: Iterator, busy: Callable[[], bool]) -> Iterator[Any]:
        """Passes batches on. Waiting for one is "data_wait" from when the device is not `busy` any more."""
        with ThreadPoolExecutor(1, "batches") as thread:
            while True:
                coming = thread.submit(next, batches, None)
                while not coming.done() and busy():
                    wait([coming], _POLL)
                with self.spent_on("data_wait"):
                    batch = coming.result()
                if batch is None:
                    return
                yield batch

    def record(self) -> dict[str, float]:
        """Writes the account down; returns it as metrics: each part's share of the wall time, and that in seconds."""
        self.enter(self._part)
        if jax.process_index() == 0:
            write_text(self._path, json.dumps({"seconds": self.seconds, "until": time.time()}))
        total = sum(self.seconds.values())
        shares = {f"goodput/{part}": seconds / total for part, seconds in self.seconds.items()}
        return shares | {"goodput/wall_seconds": total}


_asked: list[float] = []


def _age() -> float:
    """Seconds since this process began, where Linux says: much was imported before its first run, 0 before others."""
    stat = pathlib.Path("/proc/self/stat")
    if _asked or not stat.exists():
        return 0.0
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # field 22 of proc(5)
    _asked.append(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return _asked[0]
