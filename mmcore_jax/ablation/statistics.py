"""Means over a few seeds, with 95% intervals from a spread that all rows of a metric share.

Two or three seeds say little of the spread of one variant. That of seeds is taken to be the same in all rows of a
metric (as in an analysis of variance), estimated from all of them, and Student's t has the degrees of freedom of all.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean over `n` seeds; the bounds are infinite where no two seeds of any row tell the spread."""

    mean: float
    low: float
    high: float
    n: int


def intervals(rows: Mapping[str, Sequence[float]]) -> dict[str, Interval]:
    """The mean and interval of each row, of values by seed; empty rows are left out."""
    rows = {name: np.asarray(values, np.float64) for name, values in rows.items() if len(values)}
    freedom = sum(len(values) - 1 for values in rows.values())
    half = np.inf
    if freedom:
        variance = sum(np.square(values - values.mean()).sum() for values in rows.values()) / freedom
        half = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    return {
        name: Interval(
            values.mean(),
            values.mean() - half / len(values) ** 0.5,
            values.mean() + half / len(values) ** 0.5,
            len(values),
        )
        for name, values in rows.items()
    }


def verdict(difference: Interval, more_is_better: bool, paper: str) -> str:
    """What an interval of (variant - other) says of the paper's "better" or "worse": where it holds zero, nothing."""
    if difference.low <= 0 <= difference.high:
        return "not resolved"
    found = "better" if (difference.mean > 0) == more_is_better else "worse"
    return {"not reported": found, found: "agrees"}.get(paper, "contradicts")
