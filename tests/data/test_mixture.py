"""Mixtures: exact shares, no place given twice, an epoch at a time."""

import collections

import numpy as np
import pytest

from mmcore_jax.data import mixture


def drawn(windows, size, weights, lengths, seed=0):
    orders = [mixture.order(length, seed, source) for source, length in enumerate(lengths)]
    counts = [[mixture.counts_before(w, size, np.array(weights)) for w in (window, window + 1)] for window in windows]
    return [mixture.draws(*pair, orders, (seed, 1, window)) for window, pair in zip(windows, counts)]


@pytest.mark.parametrize("weights", [[1.0], [3.0, 1.0], [18.0, 4.0, 1.5, 1.5], [0.5, 0.0, 0.5]])
def test_shares_are_exact(weights):
    weights = np.array(weights)
    for window in (1, 2, 3, 7, 100):
        counts = mixture.counts_before(window, 100, weights)
        assert counts.sum() == 100 * window
        np.testing.assert_allclose(counts, 100 * window * weights / weights.sum(), atol=1)
    assert mixture.counts_before(0, 100, weights).tolist() == [0] * len(weights)


def test_shares_over_100_000_draws():
    weights = np.array([0.61, 0.2, 0.13, 0.05, 0.01])
    sources = [source for window in drawn(range(100), 1000, weights, [7919, 204_729, 13, 2, 5]) for source, _ in window]
    np.testing.assert_allclose(np.bincount(sources) / 100_000, weights, atol=1e-4)


def test_counts_never_go_back():
    """Largest remainders would take back a draw from a source that gets less than one a window."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        weights, size = rng.random(rng.integers(2, 8)) ** 3, int(rng.integers(1, 40))
        counts = np.array([mixture.counts_before(window, size, weights) for window in range(40)])
        assert (np.diff(counts, axis=0) >= 0).all()
        assert (np.diff(counts.sum(axis=1)) == size).all()
        assert np.abs(counts - size * np.arange(40)[:, None] * weights / weights.sum()).max() < 2


def test_every_epoch_gives_each_example_once():
    stream = [index for window in drawn(range(12), 10, [2.0, 3.0], [7, 100]) for source, index in window if source == 0]
    assert len(stream) == 48
    windows = drawn(range(7), 10, [1.0, 0.0], [10, 5])
    assert all(sorted(window) == [(0, i) for i in range(10)] for window in windows)
    assert len({tuple(window) for window in windows}) == 7  # another order every epoch
    counts = collections.Counter(stream[:49])
    assert set(counts) == set(range(7))
    assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("kept", [0, 1 << 17])
def test_epochs_and_sources_are_shuffled_apart(kept, monkeypatch):
    monkeypatch.setattr(mixture, "_KEPT", kept)
    first, second = (mixture.order(50, 0, source) for source in range(2))
    epochs = [[stream(place) for place in range(50 * i, 50 * i + 50)] for stream in (first, second) for i in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    assert [first(place) for place in (149, 0, 77)] == [epochs[2][49], epochs[0][0], epochs[1][27]]


def test_seeds_differ():
    assert drawn([3], 16, [1.0], [100], seed=0) != drawn([3], 16, [1.0], [100], seed=1)
