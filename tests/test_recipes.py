"""The full-size recipes: the real step takes and gives what it should, without making a single array."""

import collections
import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest

from mmcore_jax import config as config_lib
from mmcore_jax import sharding
from mmcore_jax.config import Config
from mmcore_jax.data import packing
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.pretrained.model import open_published
from mmcore_jax.training.state import Constants, abstract_state, make_plan
from mmcore_jax.training.step import make_step
from tests import tiny
from tests.pretrained.published import CONFIGS

RECIPES = ("qwen25vl3b_sd35m", "qwen25vl7b_sd35l")
PUBLISHED = {
    "qwen25vl3b_sd35m": dict(vlm="Qwen2.5-VL-3B", dit="SD3.5-medium", vision_target="siglip-so400m-patch14-384"),
    "qwen25vl7b_sd35l": dict(vlm="Qwen2.5-VL-7B", dit="SD3.5-large", vision_target="siglip-so400m-patch14-384"),
}


def load(stage: str, recipe: str) -> Config:
    return config_lib.load(str(tiny.REPOSITORY / f"configs/{stage}.py:{recipe}"))


@pytest.mark.parametrize("recipe", ["openmoji", *RECIPES])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_fine_tuning_continues_its_stage(stage, recipe):
    """What trains starts from the stage, which is what its workdir is called; only data and schedules are others."""
    before, after = load(stage, recipe), load(f"{stage}_sft", recipe)
    assert (after.stage, after.recipe) == (f"{stage}_sft", recipe)
    assert (after.model, after.tuning) == (before.model, before.tuning)
    for part, source in after.init.items():
        trained = any(line.frozen and re.fullmatch(line.pattern, f"{part}/x") for line in after.tuning)
        assert source == f"runs/{stage}-{recipe}" or (trained and before.init[part] == source), part
    assert after.optimizer.learning_rate < before.optimizer.learning_rate
    assert after.total_steps < before.total_steps
    assert after.optimizer.warmup_steps < after.total_steps / 5
    if stage == "stage2":
        dropped, ended = (config.objectives.flow_matching.dropout for config in (after, before))
        assert (dropped.text.start, dropped.text.end) == (ended.text.end, ended.text.end)
        assert (dropped.visual.end, dropped.joint, dropped.images) == (ended.visual.end, ended.joint, ended.images)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", ["stage1", "stage1_sft", "stage2", "stage2_sft"])
def test_networks_are_the_published_ones(stage, recipe, tmp_path):
    model = load(stage, recipe).model
    for part, name in PUBLISHED[recipe].items():
        if getattr(model, part):
            (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
            published = open_published(tmp_path).config
            if part == "vision_target":
                published = dataclasses.replace(published, text=None)
            if part == "dit":  # config.json does not tell; the tensors do
                published = dataclasses.replace(published, position_origin="centre", query_positions=True)
            assert getattr(model, part) == published


PODS = {"qwen25vl3b_sd35m": dict(v5e_64=64, v5e_256=256), "qwen25vl7b_sd35l": dict(v5e_256=256, v5p_128=128)}


@pytest.mark.parametrize(("recipe", "pod"), [(recipe, pod) for recipe, pods in PODS.items() for pod in pods])
@pytest.mark.parametrize("stage", ["stage1", "stage1_sft", "stage2", "stage2_sft"])
def test_a_pod_changes_the_mesh_and_accumulation_alone(stage, recipe, pod):
    """So that a run moves between them. Parameters are split over chips that every published width divides by."""
    before, after, chips = load(stage, recipe), load(stage, f"{recipe}_{pod}"), PODS[recipe][pod]
    optimizer = dataclasses.replace(after.optimizer, accumulation=before.optimizer.accumulation)
    assert dataclasses.replace(after, mesh=before.mesh, optimizer=optimizer) == before
    assert math.prod(dataclasses.astuple(after.mesh)) == chips
    at_once = after.batch_size // after.optimizer.accumulation
    assert at_once == chips if pod.startswith("v5e") else at_once % chips == 0
    dit = after.model.dit and after.model.dit.width
    for width in filter(None, (after.model.vlm.width, after.model.vlm.vision.width, dit, 1152)):
        assert width % after.mesh.fsdp == 0, width


@pytest.mark.parametrize(
    ("stage", "recipe", "trained", "parameters"),
    [
        ("stage1", "qwen25vl3b_sd35m", {"vlm", "queries", "connector"}, 3_754_622_976),
        ("stage1", "qwen25vl7b_sd35l", {"vlm", "queries", "connector"}, 8_292_166_656),
        ("stage1", "qwen25vl3b_frozen", {"queries", "connector"}, 405_077_120),
        ("stage1_sft", "qwen25vl3b_sd35m", {"vlm", "queries", "connector"}, 3_754_622_976),
        ("stage1_sft", "qwen25vl7b_sd35l", {"vlm", "queries", "connector"}, 8_292_166_656),
        ("stage2", "qwen25vl3b_sd35m", {"dit", "conditioning", "frames"}, 2_243_171_520),
        ("stage2", "qwen25vl7b_sd35l", {"dit", "conditioning", "frames"}, 8_056_627_520),
        ("stage2_sft", "qwen25vl3b_sd35m", {"dit", "conditioning", "frames"}, 2_243_171_520),
        ("stage2_sft", "qwen25vl7b_sd35l", {"dit", "conditioning", "frames"}, 8_056_627_520),
    ],
)
def test_the_step(stage, recipe, trained, parameters):
    config = load(stage, recipe)
    mesh = sharding.make_mesh(config_lib.Mesh(1, 1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = MMCORE(config.model, config.execution)
        one = packing.placeholder(config)
        plan = make_plan(config, model, mesh, one)
        state = abstract_state(config, plan, mesh)
        rows = 2 * config.optimizer.accumulation
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), one)
        frozen = {path: jax.ShapeDtypeStruct(plan.shapes[path].shape, jnp.bfloat16) for path in plan.frozen}
        mean = jax.ShapeDtypeStruct((64, 1152), jnp.float32)
        constants = Constants(frozen, {"target_mean": mean} if config.objectives.alignment else {})
        after, metrics = jax.eval_shape(make_step(config, model, plan), state, constants, batch)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, after)]
    assert shapes[0] == shapes[1]
    assert all(metric.shape == () for metric in metrics.values())
    sizes = collections.Counter()
    for path, leaf in state.params.items():
        sizes[path.split("/")[0]] += math.prod(leaf.shape)
    assert set(sizes) == trained
    assert parameters in sizes.values()
