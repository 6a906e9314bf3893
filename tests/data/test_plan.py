"""The plan of rows: positions instead of replay, weights that change on the right step, sources in every batch."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from mmcore_jax import config as config_lib
from mmcore_jax.config import ArrayRecord, UserError
from mmcore_jax.data import layout, scan
from mmcore_jax.data.plan import Planner, Position
from tests import tiny

BATCH = 8
COUNTS = {"short": 301, "long": 97, "rare": 11}


def planner(start=None, window=64, **changes):
    """A plan over sources of examples that are a quarter and a half of a row long."""
    shipped = config_lib.load(str(tiny.REPOSITORY / "configs/stage2.py"))
    weights = {"short": 6.0, "long": 3.0, "rare": 1.0}
    sources = {name: ArrayRecord(kind="array_record", shards="", weight=weight) for name, weight in weights.items()}
    sources = {name: dataclasses.replace(source, **changes.get(name, {})) for name, source in sources.items()}
    data = dataclasses.replace(
        shipped.data, sources=sources, window=window, budgets=config_lib.Budgets(80, 80, 0, 0, 9)
    )
    config = dataclasses.replace(shipped, data=data, batch_size=BATCH)
    return Planner(config, list(map(scanned, COUNTS)), start)


def scanned(name):
    """Lengths of a source, of which every tenth example cannot be used."""
    rng = np.random.default_rng(COUNTS[name])
    table = np.zeros(COUNTS[name], scan._RECORD)
    most = 20 if name == "short" else 40
    table["lengths"] = rng.integers(most // 2, most, (COUNTS[name], len(layout.Lengths._fields)))
    table["lengths"][:, 2:] = [0, 0, 1]
    table["reason"][::10] = 1
    return scan.Scan(table, ["damaged"])


def rows(plan, first, count):
    return [plan.row(first + number) for number in range(count)]


def test_a_plan_holds_usable_examples_in_their_shares():
    """Over ten windows the shares are exact."""
    plan = planner()
    drawn = [draw for row in rows(plan, 0, plan.position(10**4).row) for draw in row]
    windows = plan.position(10**4).window
    assert len(drawn) == 64 * windows
    np.testing.assert_allclose(
        np.bincount([source for source, _ in drawn]), 64 * windows * np.array([0.6, 0.3, 0.1]), atol=1
    )
    assert all(index % 10 for _, index in drawn)


def test_a_position_stands_for_the_past():
    """A plan that begins at a position, as JSON keeps it, goes on as the one that came from the start."""
    whole = planner(short={"schedule": ((9, 1.0),)})
    for row in (3, 71, 72, 500, 1501):
        kept = Position.from_json(json.loads(json.dumps(whole.position(row)._asdict())))
        later = planner(kept, short={"schedule": ((9, 1.0),)})
        assert rows(later, row, 40) == rows(whole, row, 40)
        assert later.position(row + 100) == whole.position(row + 100)
    with pytest.raises(IndexError):
        later.row(kept.row - 1)


def test_a_plan_travels():
    plan = planner()
    assert rows(copy.deepcopy(plan), 0, 30) == rows(plan, 0, 30)


@pytest.mark.parametrize("step", [1, 5, 6, 40])
def test_weights_change_on_the_right_step(step):
    """Before the step one source is drawn from, after it the other."""
    nothing = {"weight": 0.0}
    plan = planner(short={"schedule": ((step, 0.0),)}, long={**nothing, "schedule": ((step, 1.0),)}, rare=nothing)
    found = [{source for source, _ in row} for row in rows(plan, 0, (step + 9) * BATCH)]
    assert found == [{0}] * (step * BATCH) + [{1}] * (9 * BATCH)


def test_nothing_is_drawn_twice_in_an_epoch_across_a_change():
    plan = planner(short={"schedule": ((2, 1.0), (4, 6.0))})
    drawn = [draw for row in rows(plan, 0, 100) for draw in row if draw[0] == 0]
    assert len(set(drawn[:150])) == 150


@pytest.mark.parametrize("window", [40, 64, 333])
def test_a_required_source_is_in_every_batch(window):
    batches = 200
    for required in (True, False):
        plan = planner(window=window, rare={"required": required})
        holding = [any(source == 2 for source, _ in row) for row in rows(plan, 0, batches * BATCH)]
        missing = batches - np.reshape(holding, (batches, BATCH)).any(axis=1).sum()
        assert (missing == 0) == required


def test_a_required_source_that_is_too_rare():
    with pytest.raises(
        UserError, match=r"'rare' is required in every batch, but stands in . of .* rows: raise its weight"
    ):
        planner(rare={"required": True, "weight": 0.1})


def test_no_weight_at_all():
    ends = {"schedule": ((7, 0.0),)}
    with pytest.raises(UserError, match="all weights are 0 from step 7 on"):
        planner(short=ends, long=ends, rare=ends)
