"""What the plan of rows needs of every example before training: its lengths and bucket, or why it cannot be used.

A scan reads every record once, but no image further than its header. It is kept in `config.data.index`, under a name
that stands for the records, the tokenizer and the sizes that it was made with, and serves every run that has the same.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from mmcore_jax.config import Config, UserError
from mmcore_jax.data import layout
from mmcore_jax.data.example import BadExample
from mmcore_jax.data.reader import Reader, over_source
from mmcore_jax.progress import Progress
from mmcore_jax.writing import whole, write_text

_RECORD = np.dtype([("lengths", np.int32, len(layout.Lengths._fields)), ("reason", np.uint8), ("bucket", np.uint16)])
_RULES = 2  # of `layout.make_item`; another number wherever those change lengths
_CHUNK = 2048  # records
_MOST_REASONS = 255
_CASES_LOGGED = 3
_OTHER = "another reason"


class Scan(NamedTuple):
    """The examples of a source: `table` holds lengths, 0 or 1 + the index of one of `reasons`, 0 or 1 + a bucket."""

    table: np.ndarray  # of _RECORD, [n]
    reasons: list[str]

    @property
    def usable(self) -> Sequence[int] | np.ndarray:
        """The indices of the examples that can be used, ascending: every process of a run holds them."""
        good = self.table["reason"] == 0
        return range(len(good)) if good.all() else np.flatnonzero(good).astype(np.uint32)

    def some(self, count: int, read: Callable[[int], Any]) -> list:
        """What `read` makes of up to `count` usable examples, evenly spaced; of the next one where one is bad to it."""
        usable, found, place = self.usable, [], 0
        step = max(1, len(usable) // count)
        while len(found) < count and place < len(usable):
            with contextlib.suppress(BadExample):
                found.append(read(int(usable[place])))
            place = max(place + 1, len(found) * step)
        return found

    @property
    def bad(self) -> dict[str, int]:
        """How many examples cannot be used, by reason."""
        counts = np.bincount(self.table["reason"], minlength=1 + len(self.reasons))[1:]
        return dict(zip(self.reasons, counts.tolist()))


def load(config: Config, reader: Reader, number: int, progress: Progress, workers: int = 1) -> Scan:
    """The scan of source `number`, made with `workers` processes unless it is there.

    Raises:
      UserError: if more than `config.data.bad_record_limit` of the source is bad.
    """
    source = reader.sources[number]
    stem = f"{source.name}-{_fingerprint(config, reader, number)}"
    table, reasons = (pathlib.Path(config.data.index) / (stem + suffix) for suffix in (".npy", ".json"))
    if not table.exists():
        _write(_make(reader, number, progress, workers), table, reasons)
    scan = Scan(np.load(table, mmap_mode="r"), json.loads(reasons.read_text()))
    bad = np.flatnonzero(scan.table["reason"])
    kinds = scan.table["reason"][bad]
    for kind, reason in enumerate(scan.reasons, 1):  # of a scan that was there too: this is what the run leaves out
        for count, index in enumerate(bad[kinds == kind][:_CASES_LOGGED].tolist(), 1):
            log_case(count, source.name, reason, source.where(index))
    check_share(source.name, scan.bad, len(scan.table), config.data.bad_record_limit)
    return scan


def log_case(count: int, source: str, reason: str, where: str) -> None:
    """Logs a record that is left out or shortened, the `count`-th of its kind, if it is among the first."""
    if count <= _CASES_LOGGED:
        logging.warning("data source %s, %s: %s", source, where, reason)


def check_share(name: str, bad: dict[str, int], total: int, limit: float) -> None:
    """Raises `UserError` if more than a share `limit` of `total` records is bad, or all are."""
    count = sum(bad.values())
    if count and (count > limit * total or count == total):
        reason = max(bad, key=bad.get)
        said = f"more than config.data.bad_record_limit {limit:g} allows" if count > limit * total else "which is all"
        raise UserError(
            f"data source {name!r} has {count} bad records of {total}, {said}; most often ({bad[reason]}): {reason}."
        )


def _fingerprint(config: Config, reader: Reader, number: int) -> str:
    """Stands for all that lengths follow from."""
    next_token = config.objectives.next_token
    given = [
        *reader.identities[number],
        config.data.layout,
        repr(reader.sizes),
        repr(config.data.budgets),
        list(config.data.sources.values())[number].too_long,
        bool(next_token and next_token.user_text),
        _RECORD.descr,
        _RULES,
    ]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]


def _make(reader: Reader, number: int, progress: Progress, workers: int) -> Scan:
    source = reader.sources[number]
    total = len(source)
    parts = over_source(_measure, _CHUNK, reader, number, progress, "scanning", workers)
    table = np.zeros(total, _RECORD)
    known: dict[str, int] = {}
    for first, (part, bad) in zip(range(0, total, _CHUNK), parts):
        table[first : first + _CHUNK] = part
        for index, reason in bad.items():
            reason = reason if reason in known or len(known) < _MOST_REASONS - 1 else _OTHER
            table["reason"][index] = known.setdefault(reason, len(known) + 1)
    return Scan(table, list(known))


def _measure(reader: Reader, number: int, first: int, last: int) -> tuple[np.ndarray, dict[int, str]]:
    """The part of a table `[last - first]` without reasons, and the reasons of the records that cannot be used."""
    table, bad = np.zeros(last - first, _RECORD), {}
    for index in range(first, last):
        try:
            table["lengths"][index - first], table["bucket"][index - first] = reader.measure(number, index)
        except BadExample as error:
            bad[index] = str(error)
    return table, bad


def _write(scan: Scan, table: pathlib.Path, reasons: pathlib.Path) -> None:
    """Writes both files whole or not at all, the table last: where it is, the reasons are."""
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        write_text(reasons, json.dumps(scan.reasons))
        with whole(table) as temporary, temporary.open("wb") as file:
            np.save(file, scan.table)
    except OSError as error:
        raise UserError(
            f"cannot write the index of the data to {table.parent}: {error.strerror}; name another place in "
            "config.data.index."
        ) from error
