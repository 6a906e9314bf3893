"""The modes of tuning, as the shipped recipes have them: what is to train moves, all of it, and nothing else does."""

import dataclasses
import pathlib

import numpy as np
import pytest

from mmcore_jax import config as config_lib
from tests import tiny
from tests.training.test_step import Run

# Of SD3's last block only the image goes on: what its text would ask is asked for nothing.
UNUSED = {"dit/last_block/y_q/kernel", "dit/last_block/y_q/bias", "dit/last_block/y_q_norm/scale"}
ALIGNED_ONLY = ("--config.objectives.next_token=None",)


def moved(recipe: str, data: pathlib.Path, *extra: str) -> tuple[set[str], set[str]]:
    """The parameters that differ after a few steps of the tiny stage with the table of a recipe, and all of them."""
    stage = recipe.partition(":")[0]
    table = config_lib.load(str(tiny.REPOSITORY / f"configs/{stage}.py:{recipe.partition(':')[2]}")).tuning
    given = f"--config.tuning={[dataclasses.asdict(line) for line in table]}"
    given = given, "--config.optimizer.weight_decay=0.0"  # which moves what has no gradient, too
    run = Run(tiny.config(stage, data, *given, *extra)).train(6)
    now = {**run.constants.frozen, **run.state.params}
    return {path for path, value in run.start.items() if not np.array_equal(value, now[path])}, set(run.start)


@pytest.mark.parametrize(
    ("mode", "recipe", "extra", "trained"),
    [
        ("full", "stage1:openmoji", (), ("vlm", "queries", "connector")),
        ("query-only", "stage1:query_only", ALIGNED_ONLY, ("queries", "connector")),
        ("frozen", "stage2:openmoji", (), ("conditioning", "dit")),
    ],
)
def test_exactly_what_a_mode_trains_moves(mode, recipe, extra, trained, data) -> None:
    """Low-rank adaptation is in `test_lora.py`."""
    found, every = moved(recipe, data, *extra)
    assert found == {path for path in every if path.split("/")[0] in trained} - UNUSED
