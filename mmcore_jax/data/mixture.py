"""Which example comes when: sources mixed in exact proportions, each with its own epochs and shuffles."""

import functools
from collections.abc import Callable

import numpy as np

_KEPT = 1 << 17  # examples

Draw = tuple[int, int]
"""(source, index of the example in it)"""


def counts_before(window: int, size: int, weights: np.ndarray) -> np.ndarray:
    """How many examples each source has given before a window of `size` draws; sums to window * size.

    Draw j of a source is due at time (j + 1/2) / share, and draws come in the order of their times (Sainte-Lague). So a
    source never gives back a draw, which largest remainders would make it do.
    """
    shares, total = weights / weights.sum(), window * size
    counts = np.floor(max(total - len(weights), 0) * shares + 0.5).astype(np.int64)
    while counts.sum() < total:
        counts[np.argmax(shares / (counts + 0.5))] += 1
    return counts


def order(length: int, seed: int, source: int) -> Callable[[int], int]:
    """The endless stream of a source's examples by place: a new shuffle every epoch, any place reached at once.

    The permutation of a small source is kept; that of a large one is computed place by place, in no memory (which would
    be slow for a small one: it searches a space of at least 2**16 places).
    """
    if length > _KEPT:
        import grain  # late: it imports JAX

        stream = grain.MapDataset.range(length).seed(int(np.random.default_rng((seed, 0, source)).integers(2**31)))
        return stream.shuffle().repeat().__getitem__
    permutation = functools.lru_cache(2)(
        lambda epoch: np.random.default_rng((seed, 0, source, epoch)).permutation(length)
    )
    return lambda place: int(permutation(place // length)[place % length])


def draws(first: np.ndarray, last: np.ndarray, orders: list[Callable[[int], int]], seed: tuple[int, ...]) -> list[Draw]:
    """The examples that each source gives from place `first` to `last` of its stream, in shuffled order."""
    drawn = [(i, int(stream(place))) for i, stream in enumerate(orders) for place in range(first[i], last[i])]
    return [drawn[i] for i in np.random.default_rng(seed).permutation(len(drawn))]
