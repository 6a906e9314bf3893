"""The step: what it changes, what it leaves alone, and that accumulation and meshes do not change what it computes."""

import functools

import jax
import numpy as np
import pytest

from mmcore_jax import config as config_lib
from mmcore_jax import sharding
from mmcore_jax.config import Config
from mmcore_jax.data.pipeline import Batches
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.training.checkpoint import fingerprints
from mmcore_jax.training.compilation import compiled_step
from mmcore_jax.training.state import Constants, create_state, freeze, make_plan
from mmcore_jax.training.step import make_step
from mmcore_jax.training.weights import initial_params
from tests import tiny

STEPS = 60


class Run:
    """Trains on one device, from random parameters."""

    def __init__(self, config: Config) -> None:
        self.batches, model = Batches(config), MMCORE(config.model, config.execution)
        self.mesh = sharding.make_mesh(config_lib.Mesh(1, 1, 1, 1), jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            example = self.batches[0].arrays
            self.plan = make_plan(config, model, self.mesh, example)
            self.start = initial_params(config, model, self.plan, example, list(self.plan.shapes))
            statistics = {"target_mean": np.zeros((4, 32), np.float32)}
            self.constants = Constants(freeze(config, self.plan, self.start), statistics)
            self.state = create_state(config, self.plan, self.mesh, self.start)
        self.losses: list[float] = []
        self._step = compiled_step(make_step(config, model, self.plan), self.mesh)

    def train(self, steps: int) -> "Run":
        """Goes so many steps further."""
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                batch = sharding.shard_batch(self.batches[len(self.losses)].arrays, self.mesh)
                self.state, metrics = self._step(self.state, self.constants, batch)
                self.losses.append(float(metrics["loss"]))
        return self


def configured(stage: str, data, *extra: str) -> Config:
    return tiny.config(stage, data, f"--config.total_steps={STEPS}", *extra)


@pytest.fixture(scope="module")
def whole(data):
    """The whole run of a stage as it is, which tests share."""
    return functools.cache(lambda stage: Run(configured(stage, data)).train(STEPS))


def frozen_part_problems(run: Run, part: str) -> list[str]:
    """What contradicts `part` being frozen."""
    problems = []
    before = {path: value for path, value in run.start.items() if path.startswith(f"{part}/")}
    after = {path: value for path, value in {**run.constants.frozen, **run.state.params}.items() if path in before}
    if fingerprints(before) != fingerprints(after):
        problems.append("parameters changed")
    if any(f"'{part}/" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(run.state)):
        problems.append("in the state: trained, with moments, checkpointed")
    return problems


@pytest.mark.parametrize(("stage", "part"), [("stage1", "vision_target"), ("stage2", "vlm"), ("stage2", "connector")])
def test_frozen_parts_stay(whole, stage: str, part: str) -> None:
    run = whole(stage)
    assert not frozen_part_problems(run, part)
    assert fingerprints({path: run.start[path] for path in run.plan.trainable}) != fingerprints(run.state.params)


def test_removing_the_freeze_is_noticed(data) -> None:
    config = configured("stage2", data, '--config.tuning=({"pattern": ".*"},)')
    assert len(frozen_part_problems(Run(config).train(3), "vlm")) == 2


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_accumulation_changes_nothing(whole, data, stage: str) -> None:
    parts = Run(configured(stage, data, "--config.optimizer.accumulation=4")).train(4).losses
    np.testing.assert_allclose(parts, whole(stage).losses[:4], rtol=2e-5)


@pytest.mark.parametrize(("stage", "bound"), [("stage0", 0.8), ("stage1", 0.75), ("stage2", 0.75)])
def test_learning(whole, stage: str, bound: float) -> None:
    """The loss falls below a share of the initial one that needs the whole chain of gradients to work."""
    losses = whole(stage).losses
    assert np.mean(losses[-5:]) < bound * np.mean(losses[:5])


@pytest.mark.parametrize(
    "extra", [("scan_layers=False",), ("attention=blockwise", "remat=full")], ids=["unrolled", "blockwise and remat"]
)
def test_other_executions_agree(whole, data, extra) -> None:
    losses = Run(configured("stage2", data, *(f"--config.execution.{setting}" for setting in extra))).train(3).losses
    np.testing.assert_allclose(whole("stage2").losses[:3], losses, rtol=1e-5)
