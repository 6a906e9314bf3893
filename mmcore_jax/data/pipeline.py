"""From sources to batches: element `step` of `Batches` is this process's slice of that step's global batch.

The order is a pure function of (seed, step), whatever the number of processes, workers and threads. A record that turns
out bad when it is read is left out of its row, which shifts no other; `Ledger` counts it.
"""

import collections
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from mmcore_jax.config import Config
from mmcore_jax.data import scan, workers
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.layout import Interleaved, Pairs
from mmcore_jax.data.mixture import Draw
from mmcore_jax.data.plan import Planner, Position
from mmcore_jax.data.reader import Prepared, Reader
from mmcore_jax.progress import progress

PREFETCH = 16  # batches


class Skipped(NamedTuple):
    """A record that could not be used, or, where `lost` is False, had to be shortened."""

    source: str
    reason: str
    where: str
    lost: bool = True


class Batch(NamedTuple):
    """Arrays for the device, and what the run is to know of them."""

    arrays: Interleaved | Pairs
    ids: list[list[str]]  # of the examples in each row of this process
    drawn: np.ndarray  # [sources], examples in the global batch
    skipped: list[Skipped]  # in the rows of this process
    position: Position  # from which the batch after this one can be planned


class _Planned(NamedTuple):
    """What is to stand in the rows of a batch. `first` is the place of the first row of this process in the batch."""

    rows: list[list[Draw]]
    first: int
    drawn: np.ndarray
    position: Position


class Batches:
    """Random access over the batches of a run, from that which `start` leads to."""

    def __init__(
        self, config: Config, process_index: int = 0, process_count: int = 1, start: Position | None = None
    ) -> None:
        """Opens the sources, and scans those that have not been scanned before.

        Raises:
          UserError: for missing data, if more than `config.data.bad_record_limit` of a source is bad, or if the mixture
            cannot be drawn.
        """
        self._config, self._processes = config, (process_index, process_count)
        self._reader = Reader(config)
        numbers = range(len(self._reader.sources))
        self.scans = [scan.load(config, self._reader, i, progress, config.data.workers) for i in numbers]
        self._planner = Planner(config, self.scans, start)

    @property
    def tokenizer(self) -> Any:
        return self._reader.tokenizer

    def __len__(self) -> int:
        return self._config.total_steps

    def __getitem__(self, step: int) -> Batch:
        return _make(self._reader, self._plan(step))

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    def _plan(self, step: int) -> _Planned:
        index, count = self._processes
        size, first = self._config.batch_size // count, step * self._config.batch_size
        planned = [self._planner.row(first + row) for row in range(self._config.batch_size)]
        sources = [source for source, _ in itertools.chain(*planned)]
        drawn = np.bincount(sources, minlength=len(self.scans))
        position = self._planner.position(first + self._config.batch_size)
        return _Planned(planned[index * size : (index + 1) * size], index * size, drawn, position)

    def iterate(self, first: int) -> Iterator[Batch]:
        """Yields the batches from step `first` on, prepared ahead by `config.data.workers` processes, or by threads.

        The processes start when this is called. A thread plans for them.
        """
        data, steps = self._config.data, range(first, len(self))
        if not data.workers:
            return workers.in_order(ThreadPoolExecutor(data.threads), self.__getitem__, steps, PREFETCH)
        ahead = -(-PREFETCH // data.workers)
        planned = workers.in_order(ThreadPoolExecutor(1), self._plan, steps, PREFETCH)
        return workers.stream(_make, self._reader, planned, data.workers, max(ahead, data.threads), data.threads)

    def examples(self, per_source: int) -> list[Example]:
        """A few usable examples of each source, evenly spaced."""
        usable = [scan.usable for scan in self.scans]
        chosen = [indices[:: max(1, len(indices) // per_source)][:per_source] for indices in usable]
        return [self._reader.read(number, int(index)) for number, indices in enumerate(chosen) for index in indices]


def _make(reader: Reader, planned: _Planned) -> Batch:
    """A batch of the examples that can be read."""
    skipped: list[Skipped] = []
    rows = [_prepare(reader, row, skipped) for row in planned.rows]
    ids = [[prepared.id for prepared in row] for row in rows]
    return Batch(reader.assemble(rows, planned.first), ids, planned.drawn, skipped, planned.position)


def _prepare(reader: Reader, row: list[Draw], skipped: list[Skipped]) -> list[Prepared]:
    """The examples of a row that can be read; adds to `skipped`."""
    prepared = []
    for number, index in row:
        source = reader.sources[number]
        try:
            prepared.append(reader.prepare(number, index))
        except BadExample as bad:
            skipped.append(Skipped(source.name, str(bad), source.where(index)))
            continue
        if prepared[-1].shortened:
            skipped.append(Skipped(source.name, prepared[-1].shortened, source.where(index), lost=False))
    return prepared


class Ledger:
    """What a run has seen of each source: examples drawn, and records that were bad or shortened, by reason."""

    def __init__(self, config: Config, process_count: int = 1, record: dict | None = None) -> None:
        """Continues the `record` of an interrupted run."""
        self._config, self._process_count, self._names = config, process_count, list(config.data.sources)
        record = record or {"drawn": [0] * len(self._names), "lost": [], "shortened": []}
        self._drawn = np.array(record["drawn"], np.int64)
        self._lost, self._shortened = (
            collections.Counter({(name, reason): count for name, reason, count in record[kind]})
            for kind in ("lost", "shortened")
        )

    def add(self, batch: Batch) -> None:
        """Counts a batch.

        Raises:
          UserError: if more than `config.data.bad_record_limit` of what was drawn of a source was bad.
        """
        self._drawn += batch.drawn
        for case in batch.skipped:
            counts = self._lost if case.lost else self._shortened
            counts[case.source, case.reason] += 1
            scan.log_case(counts[case.source, case.reason], case.source, case.reason, case.where)
        for name in {case.source for case in batch.skipped if case.lost}:
            bad = {reason: count for (source, reason), count in self._lost.items() if source == name}
            total = max(self._drawn[self._names.index(name)], self._config.data.window) // self._process_count
            scan.check_share(name, bad, int(total), self._config.data.bad_record_limit)

    def metrics(self) -> dict[str, float]:
        """The share that each source has had so far, and how many of its records were bad or shortened."""
        shares = dict(zip(self._names, self._drawn / max(self._drawn.sum(), 1)))
        metrics = {f"data/share/{name}": float(share) for name, share in shares.items()}
        for kind, counts in (("bad", self._lost), ("shortened", self._shortened)):
            for (name, _), count in counts.items():
                metrics[f"data/{kind}/{name}"] = metrics.get(f"data/{kind}/{name}", 0.0) + count
        return metrics

    def record(self) -> dict:
        """Itself as JSON values, for a checkpoint."""
        lost, shortened = ([[*key, n] for key, n in counts.items()] for counts in (self._lost, self._shortened))
        return {"drawn": self._drawn.tolist(), "lost": lost, "shortened": shortened}

    def lines(self) -> list[str]:
        """A line for every reason for which records were left out or shortened."""
        return [
            f"data source {name}: {count} {what}: {reason}"
            for what, counts in (("left out", self._lost), ("shortened", self._shortened))
            for (name, reason), count in counts.most_common()
        ]
