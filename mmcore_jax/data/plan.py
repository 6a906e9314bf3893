"""Which examples stand in which row of the endless stream of rows: a pure function of (config, scans).

`window` examples at a time are drawn from the mixture, packed into rows, and shuffled. A window has as many rows as the
packing gives, so where one begins follows from those before it; a `Position` says it in a few integers, and whoever has
one continues there without planning the past again.

Where the examples of a batch have to share a bucket (`geometry.one_bucket`), those of each bucket are packed into whole
batches, and the batches of a window are shuffled.
"""

import bisect
import functools
import sys
import threading
from typing import NamedTuple

import numpy as np

from mmcore_jax.config import Config, Source, UserError
from mmcore_jax.data import geometry, mixture, packing
from mmcore_jax.data.mixture import Draw
from mmcore_jax.data.scan import Scan


class Position(NamedTuple):
    """Where a window begins. Weights change by phases (`Source.schedule`); each counts its draws anew."""

    window: int  # of the run
    row: int  # the first of the window
    phase_window: int  # of the phase
    drawn: tuple[int, ...]  # of each source, before the phase

    @classmethod
    def from_json(cls, values: dict) -> "Position":
        return cls(**{**values, "drawn": tuple(values["drawn"])})


class Planner:
    """Random access over the rows of a run, from `start` on."""

    def __init__(self, config: Config, scans: list[Scan], start: Position | None = None) -> None:
        """Checks the mixture.

        Raises:
          UserError: if all weights are 0 at some step, or a required source does not reach every batch.
        """
        self._config, self._scans = config, scans
        self._sources, self._one_bucket = config.data.sources, geometry.one_bucket(config)
        self._usable = [scan.usable for scan in scans]
        self._orders = [mixture.order(len(usable), config.seed, i) for i, usable in enumerate(self._usable)]
        self._changes = sorted({step for source in self._sources.values() for step, _ in source.schedule})
        self.start = start or Position(0, 0, 0, (0,) * len(scans))
        self._starts, self._lock = [self.start], threading.Lock()
        self._rows = functools.lru_cache(8)(self._plan)
        for step in (0, *self._changes):
            if not self.weights(step).sum() > 0:
                raise UserError(f"config.data.sources: all weights are 0 from step {step} on.")
        self._check_required()

    def __reduce__(self) -> tuple:
        return Planner, (self._config, self._scans, self.start)

    def weights(self, step: int) -> np.ndarray:
        """The weight of each source in the batch that step `step` + 1 takes."""
        return np.array([_weight(source, step) for source in self._sources.values()], np.float64)

    def row(self, number: int) -> list[Draw]:
        """The examples of a row, as (source, index)."""
        start = self.position(number)
        return self._rows(start)[number - start.row]

    def position(self, row: int) -> Position:
        """Where the window of a row begins.

        Raises:
          IndexError: for a row before that which the planner starts from.
        """
        with self._lock:
            while (start := self._starts[-1]).row + len(self._rows(start)) <= row:
                self._starts.append(self.after(start))
        number = bisect.bisect_right(self._starts, row, key=lambda start: start.row) - 1
        if number < 0:
            raise IndexError(f"row {row} is before the start of the plan, {self._starts[0].row}")
        return self._starts[number]

    def _plan(self, start: Position) -> list[list[Draw]]:
        first, last = (self._drawn(start, start.phase_window + i) for i in range(2))
        draws = mixture.draws(first, last, self._orders, (self._config.seed, 1, start.window))
        draws = [(source, int(self._usable[source][index])) for source, index in draws]
        rng = np.random.default_rng((self._config.seed, 2, start.window))
        if self._config.data.layout == "pairs":
            rows = self._place([[draw] for draw in draws])
        elif self._one_bucket:
            rows = self._shuffle([self._pack(part, rng) for part in self._by_bucket(draws)], rng)
        else:
            rows = self._pack(draws, rng)
        return rows[: self._phase_end(start) - start.row]

    def _pack(self, draws: list[Draw], rng: np.random.Generator) -> list[list[Draw]]:
        """Rows of draws; where a batch has one bucket, as many as fill whole batches."""
        taken = np.array([self._scans[source].table["lengths"][index] for source, index in draws])
        multiple = self._config.batch_size if self._one_bucket else 1
        packed = packing.plan(taken, self._config.data.budgets, rng, multiple)
        return self._place([[draws[i] for i in row] for row in packed])

    def _place(self, rows: list[list[Draw]]) -> list[list[Draw]]:
        """The rows, those that hold an example of a required source at even distances."""
        for number, source in enumerate(self._sources.values()):
            if source.required:
                rows = _spread(rows, [any(draw[0] == number for draw in row) for row in rows])
        return rows

    def _by_bucket(self, draws: list[Draw]) -> list[list[Draw]]:
        """The draws of each bucket. One that generates nothing fits them all, and goes where that before it goes."""
        numbers = np.array([self._scans[source].table["bucket"][index] for source, index in draws])
        numbers[0] = numbers[0] or numbers.max()
        numbers = numbers[np.maximum.accumulate(np.arange(len(draws)) * (numbers > 0))]
        return [[draws[i] for i in np.flatnonzero(numbers == number)] for number in np.unique(numbers)]

    def _shuffle(self, parts: list[list], rng: np.random.Generator) -> list:
        """The rows of all parts, whole batches in random order."""
        rows, size = [row for part in parts for row in part], self._config.batch_size
        return [row for i in rng.permutation(len(rows) // size) for row in rows[i * size : (i + 1) * size]]

    def after(self, start: Position) -> Position:
        """Where the window after another begins."""
        row = start.row + len(self._rows(start))
        if row < self._phase_end(start):
            return Position(start.window + 1, row, start.phase_window + 1, start.drawn)
        return Position(start.window + 1, row, 0, tuple(self._drawn(start, start.phase_window + 1).tolist()))

    def _drawn(self, start: Position, phase_window: int) -> np.ndarray:
        """How many examples each source has given before a window of the phase."""
        weights = self.weights(start.row // self._config.batch_size)
        return start.drawn + mixture.counts_before(phase_window, self._config.data.window, weights)

    def _phase_end(self, start: Position) -> int:
        """The row from which other weights hold; what is left of the window then waits for the next epoch."""
        ends = [step * self._config.batch_size for step in self._changes]
        return min((end for end in ends if end > start.row), default=sys.maxsize)

    def _check_required(self) -> None:
        rows = self._rows(self.start)
        for number, (name, source) in enumerate(self._sources.items()):
            holding = [i for i, row in enumerate(rows) if any(draw[0] == number for draw in row)]
            if source.required and not self._are_in_every_batch(holding, len(rows)):
                raise UserError(
                    f"data source {name!r} is required in every batch, but stands in {len(holding)} of {len(rows)} "
                    f"rows: raise its weight, or config.batch_size {self._config.batch_size}."
                )

    def _are_in_every_batch(self, holding: list[int], count: int) -> bool:
        """Whether rows `holding` of the `count` of a window are, wherever in a batch the window begins."""
        size = self._config.batch_size
        if self._one_bucket:  # it begins a batch
            return len({i // size for i in holding}) * size == count
        return max(np.diff([-1, *holding, count])) <= size


def _weight(source: Source, step: int) -> float:
    return max((entry for entry in source.schedule if entry[0] <= step), default=(0, source.weight))[1]


def _spread(rows: list, holds: list[bool]) -> list:
    """The rows in the same order, but those that hold something at even distances."""
    count = sum(holds)
    places = {(2 * i + 1) * len(rows) // (2 * count): i for i in range(count)} if count else {}
    holding, others = ([row for row, held in zip(rows, holds) if held == wanted] for wanted in (True, False))
    others = iter(others)
    return [holding[places[i]] if i in places else next(others) for i in range(len(rows))]
