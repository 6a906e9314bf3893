"""Which example comes when: sources mixed in exact proportions, each with its own epochs and shuffles.

Everything is a pure function of (seed, weights, lengths, window): any position is reached without replaying the ones
before it.
"""

import numpy as np

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


def draws(window: int, size: int, weights: np.ndarray, lengths: list[int], seed: int) -> list[Draw]:
    """The examples of a window, in shuffled order."""
    first, last = (counts_before(w, size, weights) for w in (window, window + 1))
    drawn = [
        (source, _shuffled(seed, source, position, lengths[source]))
        for source in range(len(lengths))
        for position in range(first[source], last[source])
    ]
    order = np.random.default_rng((seed, 1, window)).permutation(len(drawn))
    return [drawn[i] for i in order]


def _shuffled(seed: int, source: int, position: int, length: int) -> int:
    """Entry `position` of a source's endless stream: a new permutation every epoch."""
    epoch, offset = divmod(position, length)
    return int(_permutation(seed, source, epoch, length)[offset])


_CACHE: dict[tuple, np.ndarray] = {}


def _permutation(seed: int, source: int, epoch: int, length: int) -> np.ndarray:
    key = (seed, source, length)
    cached = _CACHE.get(key)
    if cached is None or cached[0] != epoch:
        cached = (epoch, np.random.default_rng((seed, 0, source, epoch)).permutation(length))
        _CACHE[key] = cached
    return cached[1]
