"""Scores with 95% intervals, and what they are computed from: masked errors and nearest neighbours.

`n` cases, M candidates, D feature width. Cases of one of the `groups`, `[n]` names, such as edits of one person, tell
less than as many independent ones; without groups each case is one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959964  # two-sided 95% of the standard normal
_RESAMPLES = 2000


class Score(NamedTuple):
    """A value with its 95% interval, over `n` cases."""

    value: float
    low: float
    high: float
    n: int


# Suite -> set -> "column/metric" -> score.
Scores = dict[str, dict[str, dict[str, Score]]]

# --- Intervals --------------------------------------------------------------------------------------------------------


def proportion(right: np.ndarray, groups: Sequence[str] | None = None) -> Score:
    """The share of `right`, bool `[n]`, with Wilson's interval (JASA 1927) for as many cases as they are worth."""
    share = float(np.mean(right))
    n = _worth(np.asarray(right), groups)
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return Score(share, min(share, centre - half), max(share, centre + half), len(right))


def _worth(right: np.ndarray, groups: Sequence[str] | None) -> float:
    """The number of independent cases whose share is as well known as that of these (Korn and Graubard 1998).

    It is `n` by the design effect, how much more the share varies as groups differ; less what few groups tell of that.
    """
    of_case, count = _numbered(groups, n := len(right))
    if count in (1, n):
        return count
    excess, effect = right - right.mean(), 1.0
    if excess.any():
        effect = np.sum(np.bincount(of_case, excess) ** 2) / np.sum(excess**2) * (count / (count - 1)) * ((n - 1) / n)
    return n / max(1.0, effect) * (_quantile(n - 1) / _quantile(count - 1)) ** 2


def mean(values: np.ndarray, groups: Sequence[str] | None = None) -> Score:
    """The mean of `values`, `[n]`, with an interval as that of `ratio`."""
    return ratio(values, np.ones(len(values)), groups)


def ratio(numerators: np.ndarray, denominators: np.ndarray, groups: Sequence[str] | None = None) -> Score:
    """The ratio of the means of two paired `[n]`, with a percentile bootstrap interval over the pairs.

    Of groups, which may be few, with Student's, from how their sums differ from what the ratio makes of them (Cochran
    1977, ratio estimator); not a number for one group.
    """
    numerators, denominators = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    n, value = len(numerators), float(numerators.sum() / denominators.sum())
    of_case, count = _numbered(groups, n)
    if count == n:
        drawn = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
        resampled = numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1)
        return Score(value, *map(float, np.percentile(resampled, [2.5, 97.5])), n)
    if count == 1:
        return Score(value, math.nan, math.nan, n)
    left = np.bincount(of_case, numerators - value * denominators)
    half = _quantile(count - 1) * math.sqrt(count / (count - 1) * np.sum(left**2)) / abs(denominators.sum())
    return Score(value, value - half, value + half, n)


def _numbered(groups: Sequence[str] | None, n: int) -> tuple[np.ndarray, int]:
    """The number of each case's group `[n]`, and how many there are."""
    if groups is None:
        return np.arange(n), n
    names, numbers = np.unique(groups, return_inverse=True)
    return numbers, len(names)


def _quantile(freedom: int) -> float:
    from scipy import stats  # takes a while, and training needs it not

    return float(stats.t.ppf(0.975, freedom))


def exact(value: float, n: int) -> Score:
    """What is known without sampling error, such as the share that guessing gets right."""
    return Score(value, value, value, n)


# --- Errors and neighbours --------------------------------------------------------------------------------------------


def squared_errors(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Mean squared errors of uint8 images `[..., S, S, 3]`, on the scale where white is 1: `[...]`."""
    return _squares(images, others).mean(axis=(-3, -2, -1))


def masked_errors(images: np.ndarray, others: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """As `squared_errors`, over the pixels where `mask`, bool `[..., S, S]`, is set; 0 where none is."""
    squares = _squares(images, others).mean(axis=-1)
    return (squares * mask).sum(axis=(-2, -1)) / np.maximum(mask.sum(axis=(-2, -1)), 1)


def _squares(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.square((images.astype(np.float32) - others) / 255)


def is_nearest(errors: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Whether none of the errors `[n, M]` is smaller than that of the answer `[n]`: bool `[n]`."""
    return errors[np.arange(len(errors)), answers] <= errors.min(axis=1)


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosines of every row of `[n, D]` with every row of `[M, D]`: `[n, M]`."""
    x, y = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (x, y))
    return x @ y.T


# --- Tables -----------------------------------------------------------------------------------------------------------


def table(scores: Scores) -> str:
    """Formats scores as one block for each set, a row for each metric and a column for each "column/"."""
    blocks = [f"{suite}: {name}\n{_block(metrics)}" for suite, sets in scores.items() for name, metrics in sets.items()]
    return "\n\n".join(blocks) + "\n"


def _block(metrics: dict[str, Score]) -> str:
    split = [key.partition("/") for key in metrics]
    columns = list(dict.fromkeys(column for column, _, _ in split))
    rows = list(dict.fromkeys(row for _, _, row in split))
    lines = [["", *columns, "n"]]
    for row in rows:
        present = {column: metrics[f"{column}/{row}"] for column in columns if f"{column}/{row}" in metrics}
        cells = [_cell(present[column]) if column in present else "" for column in columns]
        lines.append([row, *cells, str(max(score.n for score in present.values()))])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cell(score: Score) -> str:
    if score.low == score.high:
        return f"{score.value:.4f}"
    return f"{score.value:.4f} [{score.low:.4f}, {score.high:.4f}]"


def to_json(scores: Scores) -> dict:
    """Returns nested dicts, a score as {"value", "low", "high", "n"}."""
    return {
        suite: {name: {key: score._asdict() for key, score in metrics.items()} for name, metrics in sets.items()}
        for suite, sets in scores.items()
    }


def from_json(nested: dict) -> Scores:
    """Inverse of `to_json`."""
    return {
        suite: {name: {key: Score(**score) for key, score in metrics.items()} for name, metrics in sets.items()}
        for suite, sets in nested.items()
    }
