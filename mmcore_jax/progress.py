"""Progress of a long loop on stderr: a bar on a terminal, plain lines otherwise."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5.0

Progress = Callable[[Iterable, int, str], Iterable]
"""What `progress` is to those that are given it: `(items, total, label)` to the same items."""


def progress(items: Iterable, total: int, label: str) -> Iterable:
    """Passes `items` on, and shows how many of `total` are done."""
    if sys.stderr.isatty():
        return tqdm(items, label, total, mininterval=0.2, dynamic_ncols=True)
    return _plain_lines(items, total, label)


def _plain_lines(items: Iterable, total: int, label: str) -> Iterator:
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if done == total or time.monotonic() - last > SECONDS_BETWEEN_LINES:
            print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)
            last = time.monotonic()
