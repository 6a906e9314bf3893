"""Intervals of a few seeds, against SciPy's tests where they agree, and what they say."""

import numpy as np
import pytest
from scipy import stats

from mmcore_jax.ablation.statistics import Interval, intervals, verdict


def test_one_row_is_students_interval():
    values = [1.0, 2.0, 4.0]
    found = intervals({"a": values})["a"]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found.mean, found.n) == (np.mean(values), 3)
    np.testing.assert_allclose((found.low, found.high), expected)


def test_rows_share_their_spread():
    """Of two rows with equal spread, as in the pooled two-sample test; a row of one seed has an interval too."""
    rows = {"a": [1.0, 2.0], "b": [5.0, 6.0], "c": [9.0], "none": []}
    found = intervals(rows)
    assert set(found) == {"a", "b", "c"}
    half = stats.t.ppf(0.975, 2) * np.sqrt(0.5)
    for name, values in (("a", 2), ("b", 2), ("c", 1)):
        assert found[name].high - found[name].mean == pytest.approx(half / np.sqrt(values))


def test_a_single_seed_says_nothing():
    assert intervals({"a": [1.0], "b": [2.0]})["a"] == Interval(1.0, -np.inf, np.inf, 1)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(500):
        found = intervals({str(row): rng.normal(row, 1.0, 2) for row in range(6)})
        inside += [one.low <= row <= one.high for row, one in enumerate(found.values())]
    assert 0.93 < np.mean(inside) < 0.97


@pytest.mark.parametrize(
    ("mean", "half", "more_is_better", "paper", "said"),
    [
        (1.0, 2.0, True, "better", "not resolved"),
        (1.0, np.inf, True, "better", "not resolved"),
        (1.0, 0.5, True, "better", "agrees"),
        (1.0, 0.5, True, "worse", "contradicts"),
        (1.0, 0.5, False, "worse", "agrees"),
        (-1.0, 0.5, False, "better", "agrees"),
        (-1.0, 0.5, True, "better", "contradicts"),
        (-1.0, 0.5, False, "not reported", "better"),
        (1.0, 0.5, False, "not reported", "worse"),
    ],
)
def test_verdicts(mean, half, more_is_better, paper, said):
    assert verdict(Interval(mean, mean - half, mean + half, 3), more_is_better, paper) == said
