"""From shards to batches: a grain dataset whose element `step` is this process's slice of that step's global batch.

The order is a pure function of (seed, step) and does not depend on the number of processes. The whole data position is
the step.
"""

import collections
import functools
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import logging

from mmcore_jax.config import Config, UserError
from mmcore_jax.data import image as image_lib
from mmcore_jax.data import layout, mixture
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.layout import Interleaved, Pairs
from mmcore_jax.data.sources import open_source
from mmcore_jax.data.text import load_tokenizer

PREFETCH = 16  # batches
_CACHE_BYTES = 4 << 30  # of prepared examples kept in memory


class Batch(NamedTuple):
    """Arrays for the device, and the ids of the examples in each row."""

    arrays: Interleaved | Pairs
    ids: list[list[str]]


class Batches(grain.MapDataset):
    """Random access over the batches of a run."""

    def __init__(self, config: Config, process_index: int = 0, process_count: int = 1) -> None:
        """Opens the sources and reads through them once, for lengths and for records that cannot be used.

        Raises:
          UserError: for missing data, or if more than `config.data.bad_record_limit` of a source is bad.
        """
        super().__init__()
        self._config, self._data = config, config.data
        self._processes = (process_index, process_count)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self._sources = [open_source(name, settings) for name, settings in config.data.sources.items()]
        self._weights = np.array([source.weight for source in config.data.sources.values()], np.float64)
        self.bad_records: collections.Counter[tuple[str, str]] = collections.Counter()
        if config.data.layout == "interleaved":
            self._format = layout.ChatFormat(self.tokenizer)
            self._sizes = layout.geometry(config.model, config.data)
            self._user_text = bool(config.objectives.next_token and config.objectives.next_token.user_text)
        blank = jax.tree.leaves(layout.placeholder(config))
        self._prepared = functools.lru_cache(_CACHE_BYTES // sum(array.nbytes for array in blank))(self._prepare)
        self._lengths = [self._scan(number) for number in range(len(self._sources))]
        self._usable = [np.flatnonzero([taken is not None for taken in lengths]) for lengths in self._lengths]
        self._row_counts, self._row_counts_lock = [0], threading.Lock()
        self._rows_of_window = functools.lru_cache(8)(self._plan_window)

    def __len__(self) -> int:
        return self._config.total_steps

    def __getitem__(self, step: int | slice) -> Any:
        if isinstance(step, slice):
            return self.slice(step)
        index, count = self._processes
        size = self._config.batch_size // count
        first = step * self._config.batch_size + index * size
        rows = [self._row(first + offset) for offset in range(size)]
        ids = [[id_ for id_, *_ in row] for row in rows]
        return Batch(self._assemble(rows, index * size), ids)

    def iterate(self, first: int) -> Iterator[Batch]:
        """Yields the batches from step `first` on, prepared ahead by threads."""
        options = grain.ReadOptions(num_threads=self._data.threads, prefetch_buffer_size=PREFETCH)
        return iter(self[first:].to_iter_dataset(options))

    def examples(self, per_source: int) -> list[Example]:
        """A few usable examples of each source, evenly spaced."""
        chosen = [usable[:: max(1, len(usable) // per_source)][:per_source] for usable in self._usable]
        return [self._sources[number][int(index)] for number, indices in enumerate(chosen) for index in indices]

    def _scan(self, number: int) -> list[layout.Lengths | None]:
        source = self._sources[number]
        taken = []
        for index in range(len(source)):
            try:
                taken.append(self._prepared(number, index)[2])
            except BadExample as bad:
                taken.append(None)
                if not self.bad_records[source.name, str(bad)]:
                    logging.warning("data source %s: %s is skipped: %s", source.name, source.where(index), bad)
                self.bad_records[source.name, str(bad)] += 1
        bad = sum(length is None for length in taken)
        if bad > self._data.bad_record_limit * len(taken) or bad == len(taken):
            reason, count = max(
                ((why, n) for (name, why), n in self.bad_records.items() if name == source.name), key=lambda x: x[1]
            )
            raise UserError(
                f"data source {source.name!r} has {bad} bad records of {len(taken)}, more than "
                f"config.data.bad_record_limit {self._data.bad_record_limit:g} allows; most often ({count}): {reason}."
            )
        return taken

    def _prepare(self, number: int, index: int) -> tuple[str, Any, layout.Lengths, list]:
        """Reads, checks, tokenises and decodes one example."""
        example = self._sources[number][index]
        if self._data.layout == "pairs":
            encoded, tokens = layout.make_pair(
                example, self.tokenizer, self._config.model.vision_target.text.max_length
            )
            return (
                example["id"],
                tokens,
                layout.Lengths(0, 0, 0, 0, 1),
                [image_lib.decode(encoded, self._config.model.vision_target.vision.image_size)],
            )
        item = layout.make_item(example, self._format, self._sizes, self._user_text)
        taken = layout.lengths(item, self._sizes)
        too_long = layout.exceeded(taken, self._data.budgets)
        if too_long:
            raise BadExample(too_long)
        return item.id, item, taken, [layout.picture(frame, self._sizes) for frame in item.frames]

    def _plan_window(self, window: int) -> list[list[mixture.Draw]]:
        seed, lengths = self._config.seed, [len(usable) for usable in self._usable]
        drawn = mixture.draws(window, self._data.window, self._weights, lengths, seed)
        drawn = [(source, int(self._usable[source][position])) for source, position in drawn]
        if self._data.layout == "pairs":
            return [[draw] for draw in drawn]
        taken = [self._lengths[source][index] for source, index in drawn]
        rows = layout.plan(taken, self._data.budgets, np.random.default_rng((seed, 2, window)))
        return [[drawn[i] for i in row] for row in rows]

    def _row(self, number: int) -> list[tuple]:
        """Row `number` of the endless stream of all windows' rows, prepared."""
        with self._row_counts_lock:
            while self._row_counts[-1] <= number:
                self._row_counts.append(self._row_counts[-1] + len(self._rows_of_window(len(self._row_counts) - 1)))
        window = int(np.searchsorted(self._row_counts, number, side="right")) - 1
        row = self._rows_of_window(window)[number - self._row_counts[window]]
        return [self._prepared(source, index) for source, index in row]

    def _assemble(self, rows: list[list[tuple]], first: int) -> Interleaved | Pairs:
        if self._data.layout == "pairs":
            pairs = [(pixels[0], tokens) for ((_, tokens, _, pixels),) in rows]
            return layout.assemble_pairs(pairs, first, self._config.model.vision_target.text.max_length)
        packed = [[(item, pictures) for _, item, _, pictures in row] for row in rows]
        return layout.assemble(packed, first, self._data.budgets, self._sizes)
