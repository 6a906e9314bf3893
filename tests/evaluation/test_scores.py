"""Scores against values worked out by hand."""

import numpy as np
import pytest

from mmcore_jax.evaluation import scores
from mmcore_jax.evaluation.scores import Score
from mmcore_jax.evaluation.sheet import sheet


def _gray(*levels):
    """Images of 2 by 2 pixels, each of one level."""
    return np.stack([np.full((2, 2, 3), level, np.uint8) for level in levels])


def test_wilson_interval_agrees_with_the_textbook():
    # Newcombe (1998), method 3: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611.
    score = scores.proportion(np.arange(263) < 81)
    assert score == pytest.approx((81 / 263, 0.2553, 0.3662, 263), abs=5e-5)
    assert scores.proportion(np.zeros(20, bool)) == pytest.approx((0, 0, 0.1611, 20), abs=5e-5)
    assert scores.proportion(np.ones(20, bool)) == pytest.approx((1, 1 - 0.1611, 1, 20), abs=5e-5)


def test_bootstrap_interval_of_a_mean_is_about_two_standard_errors():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    score = scores.mean(values)
    error = values.std() / 20
    assert score.value == pytest.approx(values.mean())
    assert (score.low, score.high) == pytest.approx((score.value - 1.96 * error, score.value + 1.96 * error), abs=0.03)


def test_cases_of_one_group_tell_as_much_as_one():
    right, values = np.arange(200) % 3 == 0, np.random.default_rng(1).normal(3.0, 2.0, 200)
    names = [f"{number:03}" for number in range(200)]
    five = np.repeat(names, 5)
    assert scores.proportion(right, names) == scores.proportion(right)
    assert scores.proportion(np.repeat(right, 5), five)[:3] == pytest.approx(scores.proportion(right)[:3], abs=2e-3)
    assert scores.mean(np.repeat(values, 5), five)[:3] == pytest.approx(scores.mean(values)[:3], abs=0.02)
    # Groups whose cases differ as much as all do lose little.
    mixed = scores.proportion(right, [str(n // 3) for n in range(200)])
    assert mixed[:3] == pytest.approx(scores.proportion(right)[:3], abs=2e-3)
    assert mixed.low < scores.proportion(right).low


def test_few_groups_tell_little():
    shapes = ["circle"] * 84 + ["diamond"] * 6 + ["bird"] * 5 + ["mark"] * 5
    right, all_right = np.arange(100) % 10 != 0, np.ones(100, bool)
    apart, together = scores.proportion(right), scores.proportion(right, shapes)
    assert (together.value, together.n) == (apart.value, 100)
    assert together.high - together.low > 1.2 * (apart.high - apart.low)
    assert scores.proportion(all_right, shapes).low < scores.proportion(all_right).low
    assert scores.proportion(np.arange(100) > 0, shapes).low < scores.proportion(all_right, shapes).low
    assert scores.proportion(right, ["circle"] * 100).low < 0.3
    assert np.isnan(scores.mean(right, ["circle"] * 100)[1:3]).all()


def test_a_ratio_over_groups_is_that_of_survey_samples():
    """Cochran (1977): of clusters, by how their totals differ from the ratio of all times theirs."""
    above, below, groups = np.array([3.0, 1, 2, 6, 4, 2]), np.array([4.0, 2, 2, 6, 8, 2]), list("aabbcc")
    value = above.sum() / below.sum()
    left = np.array([4 - value * 6, 8 - value * 8, 6 - value * 10])
    half = 4.302653 * np.sqrt(3 / 2 * np.sum(left**2)) / 24
    assert scores.ratio(above, below, groups) == pytest.approx((value, value - half, value + half, 6), rel=1e-5)


def test_ratio_is_of_the_means_and_resamples_pairs():
    score = scores.ratio(np.array([1.0, 3.0]), np.array([2.0, 6.0]))
    assert score == pytest.approx((0.5, 0.5, 0.5, 2))  # a mean of ratios, or unpaired draws, would have an interval
    assert scores.ratio(np.array([1.0, 1.0]), np.array([1.0, 3.0])).value == pytest.approx(0.5)


def test_squared_errors_are_on_the_scale_of_white_and_do_not_wrap():
    assert scores.squared_errors(_gray(0, 255), _gray(255, 204)) == pytest.approx([1.0, 0.04])


def test_masked_errors_split_the_error_by_region():
    image, other = _gray(0)[0], _gray(0)[0].copy()
    other[0, 0] = 255
    other[1, 1] = 51
    mask = np.array([[True, True], [False, False]])
    assert scores.masked_errors(image, other, mask) == pytest.approx(0.5)
    assert scores.masked_errors(image, other, ~mask) == pytest.approx(0.02)
    assert scores.masked_errors(image, other, np.zeros((2, 2), bool)) == 0


def test_nearest_counts_twins_of_the_answer():
    errors = np.array([[0.1, 0.2, 0.3], [0.2, 0.2, 0.3], [0.1, 0.1, 0.3]])
    assert scores.is_nearest(errors, np.array([0, 1, 2])).tolist() == [True, True, False]


def test_cosines():
    x, y = np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([[2.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    assert scores.cosines(x, y) == pytest.approx(np.array([[1.0, 0.0, 0.0], [0.6, -0.8, 0.0]]))


def test_table_has_a_row_for_each_metric_and_a_column_for_each_way():
    metrics = {"both/accuracy": Score(0.5, 0.25, 0.75, 8), "chance/accuracy": scores.exact(0.1, 8)}
    lines = scores.table({"edits": {"tone": metrics | {"both/error": Score(2.0, 1.0, 3.0, 8)}}}).splitlines()
    assert lines[0] == "edits: tone"
    assert lines[1].split() == ["both", "chance", "n"]
    assert lines[2].split() == ["accuracy", "0.5000", "[0.2500,", "0.7500]", "0.1000", "8"]
    assert lines[3].split() == ["error", "2.0000", "[1.0000,", "3.0000]", "8"]


def test_json_keeps_the_scores():
    nested = {"edits": {"tone": {"both/accuracy": Score(0.5, 0.25, 0.75, 8)}}}
    stored = scores.to_json(nested)
    assert stored["edits"]["tone"]["both/accuracy"] == {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    assert scores.from_json(stored) == nested


def test_sheet_places_every_image_at_its_scale_above_its_caption():
    colours = {"a": (255, 0, 0), "": (0, 255, 0), "two words": (0, 0, 255)}
    cells = [(np.full((2, 2, 3), colour, np.uint8), caption) for caption, colour in colours.items()]
    page = np.asarray(sheet([cells[:2], cells[2:]], scale=10))
    corners = {}
    for caption, colour in colours.items():
        rows, columns = np.nonzero((page == colour).all(axis=-1))
        corners[caption] = rows.min(), columns.min()
        assert len(rows) == 400
        assert (np.ptp(rows), np.ptp(columns)) == (19, 19)
    (first, left), (second, right), (third, below) = corners.values()
    assert first == second < third
    assert left == below < right
    is_ink = (page.max(axis=-1) < 128).any(axis=1)
    assert is_ink[first + 20 : third].any()
    assert is_ink[third + 20 : third + 33].any()
    assert is_ink[third + 33 :].any()  # the second word, wrapped
