"""The stage table, the schedule and the multi-optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmcore_jax.config import Tuning, UserError
from mmcore_jax.training import optimizer
from tests import tiny

PATHS = ["vlm/a/kernel", "vlm/b/scale", "dit/c/kernel"]


def test_first_match_wins() -> None:
    table = (Tuning("vlm/a/.*", learning_rate=0.1), Tuning("vlm/.*", frozen=True), Tuning(".*"))
    assigned = optimizer.assign(PATHS, table)
    assert [assigned[path] for path in PATHS] == list(table)


def test_unmatched_parameter_is_named() -> None:
    with pytest.raises(UserError, match="dit/c/kernel"):
        optimizer.assign(PATHS, (Tuning("vlm/.*"),))


def test_pattern_that_decides_nothing_is_named() -> None:
    with pytest.raises(UserError, match="sigilp"):
        optimizer.assign(PATHS, (Tuning("sigilp/.*", frozen=True), Tuning(".*")))


def test_a_pattern_must_match_the_whole_path() -> None:
    with pytest.raises(UserError, match="vlm/a/kernel"):
        optimizer.assign(PATHS, (Tuning("vlm"), Tuning("dit/.*")))


@pytest.mark.parametrize(
    ("decay", "quarter", "last"), [("constant", 1.0, 1.0), ("linear", 0.784, 0.1), ("cosine", 0.878, 0.1)]
)
def test_schedule(tmp_path, decay: str, quarter: float, last: float) -> None:
    """Four steps up, flat to the middle, then down; `quarter` is a quarter of the way down."""
    config = tiny.config("stage0", tmp_path)
    settings = dataclasses.replace(
        config.optimizer, learning_rate=1.0, warmup_steps=4, decay=decay, flat=0.5, final=0.1
    )
    rate = optimizer.schedule(dataclasses.replace(config, optimizer=settings, total_steps=100))
    np.testing.assert_allclose([rate(step) for step in range(5)], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rate(49), 1.0, rtol=1e-6)
    np.testing.assert_allclose(rate(62), quarter, atol=0.01)
    np.testing.assert_allclose(rate(100), last, rtol=1e-5)


@pytest.mark.parametrize(("clip_norm", "norm"), [(0.0, 5.0), (1.0, 1.0)])
def test_gradients_are_clipped_unless_that_is_off(tmp_path, clip_norm, norm) -> None:
    config = tiny.config("stage0", tmp_path, f"--config.optimizer.clip_norm={clip_norm}")
    assigned = optimizer.assign(PATHS, (Tuning(".*"),))
    transform, params = optimizer.make_optimizer(config, assigned), {path: jnp.zeros(1) for path in PATHS}
    _, state = transform.update({path: 5 / np.sqrt(3) * jnp.ones(1) for path in PATHS}, transform.init(params), params)
    first_moments = [x for path, x in jax.tree_util.tree_leaves_with_path(state) if ".mu" in jax.tree_util.keystr(path)]
    found = np.linalg.norm(np.concatenate(first_moments)) / (1 - config.optimizer.b1)
    np.testing.assert_allclose(found, norm, rtol=1e-3)


def test_each_line_has_its_own_rate_and_decay(tmp_path) -> None:
    """One step with equal gradients: Adam moves by the rate, decay falls on kernels only, frozen paths stay out."""
    config = tiny.config("stage0", tmp_path, "--config.optimizer.weight_decay=0.5", "--config.optimizer.warmup_steps=0")
    table = (Tuning("vlm/.*", learning_rate=0.1, weight_decay=0.0), Tuning("dit/.*"))
    assigned = optimizer.assign(PATHS, table)
    transform = optimizer.make_optimizer(config, assigned)
    params = {path: jnp.ones(2) for path in PATHS}
    updates, state = transform.update({path: jnp.ones(2) for path in PATHS}, transform.init(params), params)
    rate = config.optimizer.learning_rate
    np.testing.assert_allclose(updates["vlm/a/kernel"], -0.1 * rate, rtol=1e-4)
    np.testing.assert_allclose(updates["dit/c/kernel"], -rate * (1 + 0.5), rtol=1e-4)
    moments = {str(path) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.ndim}
    assert len(moments) == 2 * len(PATHS)
