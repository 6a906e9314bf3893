"""The step: what it changes, what it leaves alone, and that accumulation and meshes do not change what it computes."""

import pathlib

import jax
import numpy as np
import pytest

from mmcore_jax import config as config_lib
from mmcore_jax import sharding
from mmcore_jax.config import Config
from mmcore_jax.data.pipeline import Batches
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.training.checkpoint import fingerprints, initial_params
from mmcore_jax.training.state import Constants, create_state, freeze, make_plan
from mmcore_jax.training.step import make_step
from tests import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("data"))


def run(config: Config, steps: int):
    """Trains a few steps on one device, from random parameters.

    Returns (plan, params at the start, state, constants, losses).
    """
    mesh = sharding.make_mesh(config_lib.Mesh(1, 1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        batches, model = Batches(config), MMCORE(config.model, config.execution)
        plan = make_plan(config, model, mesh, batches[0].arrays)
        params = initial_params(config, model, plan, batches[0].arrays, list(plan.shapes))
        statistics = {"target_mean": np.zeros((4, 32), np.float32)}
        constants = Constants(freeze(config, plan, params), statistics)
        state = create_state(config, plan, mesh, params)
        step, losses = jax.jit(make_step(config, model, plan), donate_argnums=0), []
        for number in range(steps):
            state, metrics = step(state, constants, sharding.shard_batch(batches[number].arrays, mesh))
            losses.append(float(metrics["loss"]))
    return plan, params, state, constants, losses


def frozen_part_problems(plan, params, state, constants, part: str) -> list[str]:
    """What contradicts `part` being frozen."""
    problems = []
    before = {path: value for path, value in params.items() if path.startswith(f"{part}/")}
    after = {path: value for path, value in {**constants.frozen, **state.params}.items() if path in before}
    if fingerprints(before) != fingerprints(after):
        problems.append("parameters changed")
    if any(f"'{part}/" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)):
        problems.append("in the state: trained, with moments, checkpointed")
    return problems


@pytest.mark.parametrize(("stage", "part"), [("stage1", "vision_target"), ("stage2", "vlm"), ("stage2", "connector")])
def test_frozen_parts_stay(data, stage: str, part: str) -> None:
    plan, params, state, constants, _ = run(tiny.config(stage, data), 3)
    assert not frozen_part_problems(plan, params, state, constants, part)
    assert fingerprints({k: v for k, v in params.items() if k in plan.trainable}) != fingerprints(state.params)


def test_removing_the_freeze_is_noticed(data) -> None:
    config = tiny.config("stage2", data, '--config.tuning=({"pattern": ".*"},)')
    assert len(frozen_part_problems(*run(config, 3)[:4], "vlm")) == 2


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_accumulation_changes_nothing(data, stage: str) -> None:
    whole, parts = (run(tiny.config(stage, data, f"--config.optimizer.accumulation={n}"), 4)[-1] for n in (1, 4))
    np.testing.assert_allclose(parts, whole, rtol=2e-5)


@pytest.mark.parametrize(("stage", "bound"), [("stage0", 0.8), ("stage1", 0.75), ("stage2", 0.75)])
def test_learning(data, stage: str, bound: float) -> None:
    """The loss falls below a share of the initial one that needs the whole chain of gradients to work."""
    losses = run(tiny.config(stage, data, "--config.total_steps=60"), 60)[-1]
    assert np.mean(losses[-5:]) < bound * np.mean(losses[:5])


def test_scanned_and_unrolled_agree(data) -> None:
    scanned, unrolled = (
        run(tiny.config("stage2", data, f"--config.execution.scan_layers={flag}"), 3)[-1] for flag in (True, False)
    )
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5)


def test_blockwise_and_remat_agree(data) -> None:
    plain = run(tiny.config("stage2", data), 3)[-1]
    other = run(
        tiny.config("stage2", data, "--config.execution.attention=blockwise", "--config.execution.remat=full"), 3
    )[-1]
    np.testing.assert_allclose(plain, other, rtol=1e-5)
