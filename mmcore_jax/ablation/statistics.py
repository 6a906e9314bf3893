"""Differences of runs over a few seeds, with 95% intervals.

Two or three seeds say little of the spread of one difference. All runs of a question are taken together: what a run
gave is taken to be the run's own value, plus what its seed adds to every run, plus noise of one spread. What is left
of the values estimates that spread, with as many degrees of freedom as values are left over (analysis of variance in
two ways). Differences that share a run count it once.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean over `n` seeds; the bounds are infinite where nothing tells the spread, or there is one seed only."""

    mean: float
    low: float
    high: float
    n: int


Pair = tuple[Hashable, Hashable]


def differences(values: Mapping[tuple[Hashable, int], float], pairs: Sequence[Pair]) -> dict[Pair, Interval]:
    """The mean of (first - second) over the seeds that have both, for each of `pairs` that has such a seed.

    Args:
      values: by (run, seed), of all runs that share the spread.
      pairs: of runs.
    """
    deviation, freedom = _noise(values)
    found = {}
    for first, second in pairs:
        seeds = [seed for run, seed in values if run == first and (second, seed) in values]
        if not seeds:
            continue
        mean = float(np.mean([values[first, seed] - values[second, seed] for seed in seeds]))
        half = np.inf
        if freedom and len(seeds) > 1:
            half = stats.t.ppf(0.975, freedom) * deviation * (2 / len(seeds)) ** 0.5
        found[first, second] = Interval(mean, mean - half, mean + half, len(seeds))
    return found


def _noise(values: Mapping[tuple[Hashable, int], float]) -> tuple[float, int]:
    """The standard deviation of what neither the run nor the seed explains, and its degrees of freedom."""
    columns = list(dict.fromkeys(level for key in values for level in enumerate(key)))
    design = np.array([[level in [*enumerate(key)] for level in columns] for key in values], float)
    given = np.array([*values.values()], float)
    freedom = len(given) - int(np.linalg.matrix_rank(design)) if len(given) else 0
    if not freedom:
        return np.inf, 0
    left = given - design @ np.linalg.lstsq(design, given, rcond=None)[0]
    return float(np.sqrt(np.square(left).sum() / freedom)), freedom


def verdict(difference: Interval, more_is_better: bool, paper: str) -> str:
    """What an interval of (variant - other) says of the paper's "better" or "worse": where it holds zero, nothing."""
    if difference.low <= 0 <= difference.high:
        return "not resolved"
    found = "better" if (difference.mean > 0) == more_is_better else "worse"
    return {"not reported": found, found: "agrees"}.get(paper, "contradicts")
