"""Rows are full, within every budget, and a function of the seed."""

import dataclasses

import numpy as np
import pytest

from mmcore_jax.config import Budgets
from mmcore_jax.data import layout, packing
from tests.rows import BUDGETS


def random_lengths(number, budgets):
    rng = np.random.default_rng(number)
    limits = dataclasses.astuple(budgets)
    return [layout.Lengths(*(int(rng.integers(0, limit // 2 + 1)) for limit in limits)) for _ in range(200)]


@pytest.mark.parametrize("budgets", [BUDGETS, Budgets(80, 128, 0, 0, 3)])
def test_plan_packs_everything_once_within_budgets(budgets):
    taken = random_lengths(0, budgets)
    packed = packing.plan(taken, budgets, np.random.default_rng(3))
    assert sorted(number for row in packed for number in row) == list(range(200))
    for row in packed:
        assert (np.sum([taken[number] for number in row], axis=0) <= dataclasses.astuple(budgets)).all()
    assert len(packed) < 150


def realistic_lengths(count, rng):
    """Half text-to-image, a third edits, the rest understanding: 512-pixel images, captions and answers log-normal."""
    kind = rng.choice(3, count, p=[0.5, 0.3, 0.2])
    caption = np.clip(rng.lognormal(np.log(45), 0.8, count), 5, 400).astype(int)
    answer = np.clip(rng.lognormal(np.log(120), 0.9, count), 10, 1200).astype(int)
    image = rng.integers(100, 257, count)  # VLM tokens
    vlm = np.select([kind == 0, kind == 1], [caption + 96, caption + image + 98], answer + image + 32)
    patches, context = np.where(kind == 0, 0, 4 * image), np.where(kind == 2, 0, caption + 64)
    latents, images = np.array([1024, 2048, 0])[kind], np.array([1, 2, 1])[kind]
    return np.stack([vlm, patches, context, latents, images], axis=1)


def next_fit(taken, budgets):
    """What a stream packs that looks at one row only."""
    rows, limits = [[]], np.array(dataclasses.astuple(budgets))
    for number in range(len(taken)):
        if (taken[[*rows[-1], number]].sum(axis=0) > limits).any():
            rows.append([])
        rows[-1].append(number)
    return rows


def test_rows_are_full():
    """Both token budgets that cost compute, in proportion to what the mixture needs of each."""
    taken, budgets = realistic_lengths(4096, np.random.default_rng(1)), Budgets(3736, 6000, 1800, 16_384, 24)
    used = {
        name: np.mean([taken[row].sum(axis=0) for row in rows], axis=0)[[0, 3]] / (3736, 16_384)
        for name, rows in (
            ("plan", packing.plan(taken, budgets, np.random.default_rng(0))),
            ("next fit", next_fit(taken, budgets)),
        )
    }
    assert (used["plan"] > 0.97).all(), used
    assert (used["next fit"] < 0.9).all(), used


def test_plan_is_a_function_of_its_seed():
    taken = random_lengths(1, BUDGETS)
    plans = [packing.plan(taken, BUDGETS, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert plans[0] == plans[1] != plans[2]
    assert sorted(map(tuple, plans[0])) == sorted(map(tuple, plans[2]))
