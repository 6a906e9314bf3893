"""From sources to batches: a grain dataset whose element `step` is this process's slice of that step's global batch.

The order is a pure function of (seed, step), whatever the number of processes, workers and threads. A record that turns
out bad when it is read is left out of its row, which shifts no other; `Ledger` counts it.
"""

import collections
import functools
import itertools
import os
import pickle
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from mmcore_jax.config import Config, UserError
from mmcore_jax.data import geometry, image, layout, packing, scan
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.geometry import Shape
from mmcore_jax.data.layout import Interleaved, Item, Pairs
from mmcore_jax.data.mixture import Draw
from mmcore_jax.data.plan import Planner, Position
from mmcore_jax.data.reader import Prepared, Reader
from mmcore_jax.progress import progress

PREFETCH = 16  # batches
_CACHE_BYTES = 1 << 30


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


class Batches(grain.MapDataset):
    """Random access over the batches of a run, from that which `start` leads to."""

    def __init__(
        self,
        config: Config,
        process_index: int = 0,
        process_count: int = 1,
        start: Position | None = None,
        weights: Mapping[str, str] | None = None,
        reader: Reader | None = None,
    ) -> None:
        """Opens the sources, and scans those that have not been scanned before.

        Args:
          config: of the run.
          process_index, process_count: whose slice of the global batch it is.
          start: where in the data.
          weights: for each kind of features that the batches bring along, what stands for the weights behind it.
          reader: of the sources, where they are open already.

        Raises:
          UserError: for missing data or features, if more than `config.data.bad_record_limit` of a source is bad, or
            if the mixture cannot be drawn.
        """
        super().__init__()
        self._config, self._processes = config, (process_index, process_count)
        self._reader = reader or Reader(config, weights)
        numbers = range(len(self._reader.sources))
        self.scans = [scan.load(config, self._reader, i, progress, config.data.workers) for i in numbers]
        self._planner = Planner(config, self.scans, start)
        self._one_bucket, self._read = geometry.one_bucket(config), self._reader.parse
        bytes_each = len(pickle.dumps(packing.placeholder(config)))
        # An epoch must fit, or nothing is there any more when it comes again.
        if bytes_each * sum(map(len, self._reader.sources)) <= _CACHE_BYTES:
            self._read = functools.cache(self._reader.prepare)

    def __reduce__(self) -> tuple:
        return Batches, (self._config, *self._processes, self._planner.start, None, self._reader)

    @property
    def tokenizer(self) -> Any:
        return self._reader.tokenizer

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """For each source, what stands for its records, and for those of them that are used: the order follows."""
        return {
            source.name: f"{identity}-{zlib.crc32(scan.table['reason'].tobytes()):08x}"
            for source, (identity, _), scan in zip(self._reader.sources, self._reader.identities, self.scans)
        }

    def __len__(self) -> int:
        return self._config.total_steps

    def __getitem__(self, step: int | slice) -> Any:
        if isinstance(step, slice):
            return self.slice(step)
        index, count = self._processes
        size, first = self._config.batch_size // count, step * self._config.batch_size
        planned = [self._planner.row(first + row) for row in range(self._config.batch_size)]
        skipped: list[Skipped] = []
        rows, ids = self._prepare(planned[index * size : (index + 1) * size], skipped)
        draws = [*itertools.chain(*planned)]
        return Batch(
            self._reader.assemble(rows, index * size, self._bucket(draws)),
            ids,
            np.bincount([source for source, _ in draws], minlength=len(self.scans)),
            skipped,
            self._planner.position(first + self._config.batch_size),
        )

    def iterate(self, first: int) -> Iterator[Batch]:
        """Yields the batches from step `first` on, prepared ahead by `config.data.workers` processes, or by threads."""
        data = self._config.data
        ahead = -(-PREFETCH // max(data.workers, 1))
        batches = self[first:].to_iter_dataset(grain.ReadOptions(data.threads, max(ahead, data.threads)))
        if data.workers:
            flags.FLAGS.mark_as_parsed()  # grain reads settings of its own there
            options = grain.MultiprocessingOptions(data.workers, ahead)
            batches = batches.mp_prefetch(options, functools.partial(_end_with, os.getpid()))
        return iter(batches)

    def examples(self, per_source: int) -> list[Example]:
        """A few usable examples of each source, evenly spaced; their images decode."""
        reads = [functools.partial(self._read_whole, number) for number in range(len(self.scans))]
        return [example for scan, read in zip(self.scans, reads) for example in scan.some(per_source, read)]

    def _read_whole(self, number: int, index: int) -> Example:
        """Returns an example as it is; raises `BadExample`, also for damage beyond the header of an image."""
        example = self._reader.read(number, index)
        image.check(example)
        return example

    def _prepare(self, rows: list[list[Draw]], skipped: list[Skipped]) -> tuple[list[Iterator[Prepared]], list]:
        """The examples of rows that can be read, and their ids, which are there when they have been taken.

        All are read and tokenised before the first is decoded: in turns, each is slower, from cold caches. Decoded,
        one is to be written before the next is: images are large.
        """
        read = [[*self._good(((draw, draw) for draw in row), self._parse, skipped)] for row in rows]
        ids: list[list[str]] = [[] for _ in rows]

        def decoded(row: list[tuple[Draw, Prepared]], names: list[str]) -> Iterator[Prepared]:
            for (number, index), prepared in self._good(row, Prepared.load, skipped):
                if prepared.shortened:
                    source = self._reader.sources[number]
                    skipped.append(Skipped(source.name, prepared.shortened, source.where(index), lost=False))
                names.append(prepared.id)
                yield prepared

        return [decoded(row, names) for row, names in zip(read, ids)], ids

    def _parse(self, draw: Draw) -> Prepared:
        """An example as it was measured; raises `BadExample`, also where it is another now, which may not fit."""
        prepared, (source, index) = self._read(*draw), draw
        if isinstance(prepared.content, Item):
            taken = layout.lengths(prepared.content, self._reader.sizes)
            if not np.array_equal(taken, self.scans[source].table["lengths"][index]):
                raise BadExample("other tokens or images than when it was measured")
        return prepared

    def _good(self, values: Iterable, make: Callable[[Any], Prepared], skipped: list[Skipped]) -> Iterator:
        """Yields (draw, `make(value)`) of each (draw, value) that is not bad; adds the others to `skipped`."""
        for (number, index), value in values:
            try:
                yield (number, index), make(value)
            except BadExample as bad:
                source = self._reader.sources[number]
                skipped.append(Skipped(source.name, str(bad), source.where(index)))

    def _bucket(self, draws: list[Draw]) -> Shape | None:
        """The bucket that the examples of a global batch share, if they do."""
        if not self._one_bucket:
            return None
        number = max(self.scans[source].table["bucket"][index] for source, index in draws)
        return self._reader.sizes.buckets[max(number, 1) - 1]


def _end_with(parent: int, *_: int) -> None:
    """Ends a worker process when its parent is gone: one that is killed cannot end it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_contents(contents: list[dict[str, str]], before: dict[str, str] | None) -> None:
    """Raises `UserError` where processes find other records than the first, or the run other ones than `before`."""
    for name, found in contents[0].items():
        others = [str(process) for process, theirs in enumerate(contents) if theirs[name] != found]
        if others:
            raise UserError(
                f"data source {name!r} is not the same everywhere: process {', '.join(others)} of {len(contents)} "
                "finds or can read other records than process 0; give it the same shards, and delete its "
                "config.data.index."
            )
        if before and before[name] != found:
            raise UserError(
                f"data source {name!r} has other records than this run has drawn from so far, so that their order "
                "would change: bring those back, or begin another run from a checkpoint (config.init, WORKDIR@STEP)."
            )


class Ledger:
    """What a run has seen of each source: examples drawn, and records that were bad or shortened, by reason."""

    def __init__(self, config: Config, gather: Callable[[Any], list] | None = None, record: dict | None = None) -> None:
        """Continues the `record` of an interrupted run; `gather` returns what each of several processes gives it."""
        self._config, self._gather, self._names = config, gather, list(config.data.sources)
        self._skipped: list[Skipped] = []
        record = record or {"drawn": [0] * len(self._names), "lost": [], "shortened": []}
        self._drawn = np.array(record["drawn"], np.int64)
        self._lost, self._shortened = (
            collections.Counter({(name, reason): count for name, reason, count in record[kind]})
            for kind in ("lost", "shortened")
        )

    def add(self, batch: Batch) -> None:
        """Counts a batch; of several processes, what they have left out is counted when they `share` it.

        Raises:
          UserError: as `share` does.
        """
        self._drawn += batch.drawn
        self._skipped += batch.skipped
        if self._gather is None:
            self.share()

    def share(self) -> None:
        """Counts what all processes have left out. They call it after the same steps.

        Raises:
          UserError: if more than `config.data.bad_record_limit` of what was drawn of a source was bad.
        """
        cases, self._skipped = self._skipped, []
        if self._gather:
            cases = [Skipped(*case) for case in itertools.chain(*self._gather(cases))]
        for case in cases:
            counts = self._lost if case.lost else self._shortened
            counts[case.source, case.reason] += 1
            scan.log_case(counts[case.source, case.reason], case.source, case.reason, case.where)
        for name in {case.source for case in cases if case.lost}:
            bad = {reason: count for (source, reason), count in self._lost.items() if source == name}
            total = max(self._drawn[self._names.index(name)], self._config.data.window)
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
