"""Supervised fine-tuning as a stage after a stage: where its weights come from, and who finds whom."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from mmcore_jax import evaluate
from mmcore_jax.config import UserError, from_json
from mmcore_jax.training import weights
from mmcore_jax.training.weights import load_run
from tests import tiny

PARTS = {"stage1": ("vlm", "queries", "connector"), "stage2": ("vlm", "queries", "connector", "conditioning", "dit")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("runs") / "data")


def after(stage: str, data: pathlib.Path, *extra: str):
    """The fine-tuning of a stage whose run is beside the data, for a step at a learning rate of zero."""
    init = [f"--config.init.{part}={data.parent / f'{stage}-openmoji'}" for part in PARTS[stage]]
    init += [f"--config.init.vision_target={data.parent / 'stage0-openmoji'}"] if stage == "stage1" else []
    still = [f"--config.{name}=0.0" for name in ("optimizer.learning_rate", "optimizer.ema_decay")]
    return tiny.config(f"{stage}_sft", data, *init, *still, "--config.total_steps=1", *extra, random=False)


@pytest.mark.whole_runs
def test_a_chain_of_stages(data) -> None:
    """Fine-tuning at no learning rate is the stage itself; the evaluation finds the stage that aligned last."""
    runs = data.parent
    for stage in PARTS:
        aligned = [f"--config.init.{part}={runs / 'stage1_sft-openmoji'}" for part in PARTS["stage1"]]
        init = ["--config.init.dit=random", "--config.init.conditioning=random", *aligned] if stage == "stage2" else []
        if stage == "stage1":
            tiny.write_run(runs / "stage0-openmoji", tiny.config("stage0", data))
            config = tiny.config(stage, data, "--config.total_steps=1")
            config.init["vision_target"] = str(runs / "stage0-openmoji")
            tiny.train(config, runs / "stage1-openmoji")
        else:
            tiny.write_run(runs / "stage2-openmoji", tiny.config(stage, data, *init, random=False))
        tiny.train(after(stage, data), runs / f"{stage}_sft-openmoji")
        before, tuned = (load_run(runs / f"{name}-openmoji")[2] for name in (stage, f"{stage}_sft"))
        for part in PARTS[stage]:
            jax.tree.map(np.testing.assert_array_equal, before[part], tuned[part])
    tiny.train(after("stage1", data, "--config.init.vision_target=random"), runs / "other-openmoji")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    first, tuned, other = (
        weights._load_statistics(runs / f"{name}-openmoji", here)["target_mean"]
        for name in ("stage1", "stage1_sft", "other")
    )
    np.testing.assert_array_equal(first, tuned)
    assert np.abs(other - first).max() > 1e-2, "centred by the mean of another vision target"
    assert evaluate.find_aligned(from_json(runs / "stage2_sft-openmoji/config.json")) == runs / "stage1_sft-openmoji"


@pytest.mark.parametrize("stage", PARTS)
def test_what_is_missing_says_how_to_make_it(stage, data, tmp_path) -> None:
    missing = tmp_path / f"{stage}_sft-openmoji"
    with pytest.raises(UserError, match=f"--config=configs/{stage}_sft.py:openmoji --workdir={missing}"):
        weights.check_sources(after(stage, data, *(f"--config.init.{part}={missing}" for part in PARTS[stage])))


def test_a_checkpoint_of_a_run_has_the_name_of_its_step(data, tmp_path) -> None:
    """`WORKDIR@STEP`, of a run that goes on: what starts from it, draws with it or is scored names it so."""
    config = tiny.config("stage1", data)
    run = tiny.write_run(tmp_path / "stage1-openmoji", config, steps=(5, 10))
    finish = f"has reached step 10 of 20: name a checkpoint, such as {run}@10, or finish it with"
    with pytest.raises(UserError, match=finish):
        load_run(run)
    with pytest.raises(UserError, match=f"{run}@7, but there is no checkpoint of step 7; there are 5, 10"):
        load_run(f"{run}@7")
    five, ten = (load_run(f"{run}@{step}")[2] for step in (5, 10))
    (run / "config.json").write_text(dataclasses.replace(config, total_steps=10).to_json())
    jax.tree.map(np.testing.assert_array_equal, load_run(run)[2], ten)
    assert (five["queries"]["embedding"] != ten["queries"]["embedding"]).all()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert [weights._load_statistics(f"{run}{step}", here)["seen"] for step in ("", "@5", "@10")] == [10, 5, 10]

    tuned = after("stage1", data, *(f"--config.init.{part}={run}@5" for part in PARTS["stage1"]))
    weights.check_sources(dataclasses.replace(tuned, init=tuned.init | {"vision_target": "random"}))
    jax.tree.map(np.testing.assert_array_equal, weights.load_part(f"{run}@5", "vlm")[1], five["vlm"])
    assert evaluate.place(pathlib.Path(f"{run}@5")) == run / "evaluation@5"
    (tmp_path / "here@5").mkdir()
    assert weights.split_step(tmp_path / "here@5") == (tmp_path / "here@5", None)
