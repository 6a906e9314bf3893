"""Intervals of a few seeds, against SciPy's tests where they agree, and what they say."""

import numpy as np
import pytest
from scipy import stats

from mmcore_jax.ablation.statistics import Interval, differences, verdict

TRIANGLE = [("a", "b"), ("b", "c"), ("a", "c")]
STAR = [(name, "control") for name in "abcdef"]


def test_two_runs_are_students_paired_test():
    values = {"a": [1.0, 2.0, 4.0], "b": [0.5, 2.5, 2.0]}
    found = differences(by_seed(values), [("a", "b")])["a", "b"]
    assert found.n == 3
    result = stats.ttest_rel(values["a"], values["b"]).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), result)


def test_a_seed_without_both_sides_counts_in_the_spread_alone():
    values = {**by_seed({"a": [1.0, 2.0], "b": [5.0, 7.0], "c": [3.0, 4.5]}), ("c", 2): 9.0}
    found = differences(values, TRIANGLE)
    assert {one.n for one in found.values()} == {2}
    assert found["b", "c"].mean == pytest.approx(2.25)
    without = differences({key: value for key, value in values.items() if key[1] < 2}, TRIANGLE)
    np.testing.assert_allclose(found["b", "c"], without["b", "c"])


@pytest.mark.parametrize("runs", [{"a": [1.0], "b": [2.0]}, {"a": [1.0], "b": [2.0, 3.0], "c": [2.5, 3.1]}])
def test_a_single_seed_says_nothing(runs):
    assert differences(by_seed(runs), [("a", "b")])["a", "b"] == Interval(-1.0, -np.inf, np.inf, 1)


def test_what_has_no_seed_in_common_is_not_compared():
    assert differences({("a", 0): 1.0, ("b", 1): 2.0}, [("a", "b"), ("a", "c")]) == {}
    assert differences({}, [("a", "b")]) == {}


@pytest.mark.parametrize("pairs", [TRIANGLE, STAR])
@pytest.mark.parametrize("seeds", [2, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(pairs, seeds):
    """Of runs that several differences share; what a seed adds to all of them is no noise."""
    rng, names = np.random.default_rng(0), sorted({name for pair in pairs for name in pair})
    truth, inside = {name: float(number) for number, name in enumerate(names)}, []
    for _ in range(1000):
        shift = rng.normal(0.0, 5.0, seeds)
        found = differences(by_seed({name: truth[name] + shift + rng.normal(0, 1.0, seeds) for name in names}), pairs)
        inside += [one.low <= truth[a] - truth[b] <= one.high for (a, b), one in found.items()]
    assert 0.935 < np.mean(inside) < 0.965


def by_seed(runs):
    return {(run, seed): float(value) for run, values in runs.items() for seed, value in enumerate(values)}


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
