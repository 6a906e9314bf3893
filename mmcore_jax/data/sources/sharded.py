"""What sources of shards share: the records of one shard after those of another, and what stays open."""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import operator
import os
import threading
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from mmcore_jax import config
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.sources import files

_THREADS = 16  # that open shards: in a remote store each waits for a request
_TAIL = 1 << 16  # bytes


class Cache:
    """What threads have opened or decoded: the last used within `limit`. Pickled and forked copies start empty."""

    def __init__(
        self, make: Callable[[Any], Any], limit: float = float("inf"), size: Callable[[Any], int] | None = None
    ) -> None:
        """`make(key)` opens, `size(value)` is what one counts for (1 by default)."""
        self._make, self._limit, self._size = make, limit, size
        self._clear()

    def __getitem__(self, key: Hashable) -> Any:
        if self._process != os.getpid():
            self._clear()
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = self._make(key)  # outside the lock: at worst two threads do the same
        with self._lock:
            if key not in self._values:
                self._used += self._size_of(value)
            self._values[key] = value
            while self._used > self._limit and len(self._values) > 1:
                self._used -= self._size_of(self._values.popitem(last=False)[1])
        return value

    def _size_of(self, value: Any) -> int:
        return self._size(value) if self._size else 1

    def _clear(self) -> None:
        self._values: collections.OrderedDict = collections.OrderedDict()
        self._used, self._lock, self._process = 0, threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple:
        return Cache, (self._make, self._limit, self._size)


class Sharded:
    """A source of shards. A format says how many records a shard has (`_count`) and reads one (`_read`).

    A shard of which not even the number of records can be told is one bad record.
    """

    def __init__(self, name: str, settings: config.Source) -> None:
        """Finds the shards and counts their records; raises `UserError` as `open_source` does."""
        self.name, self._settings = name, settings
        self.shards = files.find(name, settings.shards)
        with concurrent.futures.ThreadPoolExecutor(min(_THREADS, len(self.shards))) as threads:
            counted = list(threads.map(self._try_to_count, range(len(self.shards))))
        self._unreadable = {shard: reason for shard, (_, reason) in enumerate(counted) if reason}
        self._ends = np.cumsum([count for count, _ in counted])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        """Returns an example; raises `BadExample` for a record that is not one."""
        shard, row = self._locate(index)
        if shard in self._unreadable:
            raise BadExample(self._unreadable[shard])
        return self._read(shard, row)

    def where(self, index: int) -> str:
        """The path of the shard, and the key or number of the record in it."""
        shard, row = self._locate(index)
        path = self.shards[shard].path
        return path if shard in self._unreadable else f"{path}, {self._label(shard, row)}"

    def fingerprint(self) -> str:
        """A hash of shard names (below their common directory), sizes, ends, and the settings that shape examples."""
        with concurrent.futures.ThreadPoolExecutor(min(_THREADS, len(self.shards))) as threads:
            tails = list(threads.map(_hash_tail, self.shards))
        sizes = [shard.size for shard in self.shards]
        return fingerprint(self._settings, [*zip(self._names, sizes, self._ends.tolist(), tails)])

    def _count(self, shard: int) -> int:
        raise NotImplementedError

    def _read(self, shard: int, row: int) -> Example:
        raise NotImplementedError

    def _label(self, shard: int, row: int) -> str:
        return f"record {row}"

    def _id(self, shard: int, row: int) -> str:
        """For records that name none."""
        return f"{self._names[shard].partition('.')[0]}/{row}"

    @functools.cached_property
    def _names(self) -> list[str]:
        return files.relative_names(shard.path for shard in self.shards)

    def _try_to_count(self, shard: int) -> tuple[int, str]:
        for _ in range(2):
            try:
                return self._count(shard), ""
            except BadExample as bad:
                problem = str(bad)
        return 1, problem

    def _locate(self, index: int) -> tuple[int, int]:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)


def _hash_tail(shard: files.Shard) -> str:
    """Of what tells files of one size apart: ArrayRecord pads to 64 KiB, and ends in the sizes of its records."""
    size = min(shard.size, _TAIL)
    for _ in range(2):  # a run whose shards have other tails is stopped: storage that refuses once is asked again
        with contextlib.suppress(BadExample):
            return hashlib.blake2b(files.read(shard.path, shard.size - size, size), digest_size=16).hexdigest()
    return ""


def fingerprint(settings: config.Source, content: Any) -> str:
    """A hash of what a source holds and of the settings that shape its examples."""
    mapping = [vars(column) for column in getattr(settings, "segments", None) or ()]
    shaped = [settings.kind, getattr(settings, "task", None), mapping, content]
    return hashlib.blake2b(json.dumps(shaped).encode(), digest_size=16).hexdigest()
