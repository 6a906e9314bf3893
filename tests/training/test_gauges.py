"""Gauges during training: they measure what they say, disturb nothing, and survive a stop."""

import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

from mmcore_jax import sharding, train
from mmcore_jax.config import Budgets, Config, UserError
from mmcore_jax.data import layout, packing
from mmcore_jax.data.image import Processor
from mmcore_jax.data.text import load_tokenizer
from mmcore_jax.decode import TextGenerator, TextSampling
from mmcore_jax.evaluation import probes
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.models import qwen_vl
from mmcore_jax.models.qwen_vl import QwenVLModel
from mmcore_jax.training import gauges as module
from mmcore_jax.training.gauges import Gauges
from mmcore_jax.training.state import Constants, join, make_plan, random_params
from mmcore_jax.training.telemetry import read_metrics
from tests import tiny
from tests.training.test_step import Run

STEPS = 9


def configured(stage: str, data: pathlib.Path, *extra: str, tasks=("caption", "edit_colour"), examples=5) -> Config:
    shards = {task: f"{data}/{task}-train-*.array_record" for task in tasks}
    sources = {task: dict(kind="array_record", shards=paths, weight=1.0) for task, paths in shards.items()}
    given = dict(every=4, examples=examples, sources=sources)
    return tiny.config(stage, data, f"--config.gauges={given}", f"--config.total_steps={STEPS}", *extra)


def run(config: Config, workdir: pathlib.Path) -> list[dict]:
    return logged(tiny.train(config, workdir))


def logged(workdir: pathlib.Path) -> list[dict]:
    return tiny.logged(workdir)


def split(records: list[dict]) -> tuple[list[dict], list[dict]]:
    """Records of gauges, and those of steps."""
    groups = [], []
    for record in records:
        groups["loss" in record].append(record)
    return groups


def named(record: dict, source: str) -> dict[str, float]:
    start = f"gauge/{source}/"
    return {name.removeprefix(start): value for name, value in record.items() if name.startswith(start)}


# --- A run ------------------------------------------------------------------------------------------------------------


def test_runs_with_gauges_are_those_without(data, tmp_path) -> None:
    """The same losses, bit by bit; and a run that was stopped half way has the same gauges, and the same start."""
    config = configured("stage1", data)
    whole = run(config, tmp_path / "whole")
    gauged, trained = split(whole)
    assert [record["step"] for record in gauged] == [0, 4, 8, 9]
    without = run(configured("stage1", data, "--config.gauges.every=0"), tmp_path / "without")
    assert split(without) == ([], trained)

    log = train.Telemetry.log
    with pytest.MonkeyPatch.context() as patch:

        def log_and_stop(self, step: int, *metrics, **rates) -> None:
            log(self, step, *metrics, **rates)
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(train.Telemetry, "log", log_and_stop)
        assert len(run(config, tmp_path / "stopped")) < len(whole)
    assert run(config, tmp_path / "stopped") == whole

    first, last = (named(record, "caption") for record in (gauged[0], gauged[-1]))
    assert set(first) == {name for key in module._CHANGING for name in (key, f"{key}_change")}
    assert first["next_token_change"] == first["answer_accuracy_change"] == 0
    assert last["next_token_change"] == last["next_token"] - first["next_token"] < -0.1
    assert set(named(gauged[0], "edit_colour")) == {"cosine", "retrieval"}
    assert named(gauged[-1], "edit_colour")["cosine"] > named(gauged[0], "edit_colour")["cosine"] + 0.1


def test_flow_losses_of_a_run(data, tmp_path) -> None:
    gauged, trained = split(run(configured("stage2", data), tmp_path / "whole"))
    assert split(run(configured("stage2", data, "--config.gauges.every=0"), tmp_path / "without")) == ([], trained)
    assert [record["step"] for record in gauged] == [0, 4, 8, 9]
    assert not named(gauged[0], "caption")
    first, last = (np.array(list(named(record, "edit_colour").values())) for record in (gauged[0], gauged[-1]))
    assert len(first) == len(probes.DROPPED) * probes.TIMESTEP_BINS
    assert last.mean() < 0.9 * first.mean()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path) -> None:
    """What it has logged at step 0 goes; what a later checkpoint comes after stays."""
    for first in (0, 5):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 5, 6)))
        train.Telemetry(tmp_path, "run", first, 9).close()
        assert [record["step"] for record in read_metrics(tmp_path)] == ([0, 5] if first else [])


# --- Values -----------------------------------------------------------------------------------------------------------


class Setting:
    """A tiny stage with random weights, and its gauges."""

    def __init__(self, config: Config, record: dict | None = None, devices: int = 1) -> None:
        mesh = self.mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        self.model, self.tokenizer = MMCORE(config.model, config.execution), load_tokenizer(config.data.tokenizer)
        example = packing.placeholder(config, devices)
        with jax.set_mesh(mesh):
            plan = make_plan(config, self.model, mesh, example)
            flat = random_params(config, self.model, plan, example, list(plan.shapes))
        mean = jax.device_put(np.full((4, 32), 0.3, np.float32), sharding.replicated(mesh))
        statistics = {"target_mean": mean} if config.objectives.alignment else {}
        self.params = join(flat, Constants({}, statistics))
        self.gauges = Gauges(config, self.model, plan, mesh, self.tokenizer, record)

    def measure(self) -> dict[str, float]:
        with jax.set_mesh(self.mesh), jax.transfer_guard("disallow"):
            return self.gauges(self.params)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_one_program_and_the_same_values_in_any_batches(stage, data) -> None:
    settings = [Setting(configured(stage, data, f"--config.batch_size={size}")) for size in (3, 16)]
    three, whole = (setting.measure() for setting in settings)
    assert len(whole) > 4
    assert whole == pytest.approx(three, rel=1e-4, abs=1e-6)
    assert settings[0].measure() == three
    assert [setting.gauges._measure._cache_size() for setting in settings] == [1, 1]


def test_next_token_is_that_of_the_answers(data) -> None:
    """By the logits of each example alone: the user's text, which trains here too, does not count."""
    setting = Setting(configured("stage1", data, tasks=("caption", "compose")))
    losses, rights = [], []
    for case in (case for case in setting.gauges._cases if case.source == "caption"):
        sizes = setting.gauges._sizes
        budgets = Budgets(*layout.lengths(case.item, sizes))
        batch = packing.assemble([[(case.item, case.pictures)]], 0, budgets, sizes)
        hidden = setting.model.apply({"params": setting.params}, batch, method="hidden_states")
        logits = setting.model.apply({"params": setting.params}, hidden, method="logits")[0]
        answer = np.flatnonzero(np.array(case.item.learned))
        ids = np.array(case.item.ids)[answer]
        losses += (-jax.nn.log_softmax(logits)[answer - 1, ids]).tolist()
        rights.append(bool((np.argmax(logits, -1)[answer - 1] == ids).all()))
    found = named(setting.measure(), "caption")
    assert found["next_token"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["answer_accuracy"] == np.mean(rights)


def test_right_answers_are_those_that_greedy_decoding_writes(data) -> None:
    """While a VLM learns captions by heart."""
    others = [f"--config.data.sources.{task}.weight=0.0" for task in tiny.config("stage1", data).data.sources]
    given = [*others, "--config.data.sources.caption.weight=1.0", "--config.total_steps=90"]
    config = configured("stage1", data, *given, tasks=("caption",), examples=12)
    setting = Setting(config)
    processor = Processor(4, 2, 256, 256, tuple(qwen_vl.IMAGE_MEAN), tuple(qwen_vl.IMAGE_STD))
    decoder = TextGenerator(QwenVLModel(config.model.vlm, config.execution), setting.tokenizer, processor)
    captions = tiny.examples()["caption"]
    asked = [{**example, "segments": example["segments"][:-1]} for example in captions]
    accuracies, learner = [], Run(config)
    for _ in range(3):
        learner.train(30)
        params = join(learner.state.params, learner.constants)
        answers = decoder(params["vlm"], asked, TextSampling(max_new_tokens=24))
        right = [answer == example["segments"][-1]["text"] for answer, example in zip(answers, captions)]
        found = named(setting.gauges(params), "caption")
        assert found["answer_accuracy"] == np.mean(right)
        accuracies.append(np.mean(right))
    assert max(accuracies) > 0, accuracies


def test_retrieval_is_among_different_images() -> None:
    """Two of the four examples have one image: either of its places is right."""
    targets = np.eye(3, dtype=np.float32)[[0, 1, 0, 2], None]
    truths = [b"a", b"b", b"a", b"c"]
    assert module._retrieval(targets, targets, truths) == 1
    assert module._retrieval(targets[[1, 1, 2, 0]], targets, truths) == 0.5


def on_four_devices(data: str) -> list[dict[str, float]]:
    """What is measured of each stage, its parameters split. Runs where four devices are."""
    return [Setting(sharded(stage, pathlib.Path(data)), devices=4).measure() for stage in ("stage1", "stage2")]


def sharded(stage: str, data: pathlib.Path) -> Config:
    devices = {"data": 1, "fsdp": -1, "context": 2 if jax.device_count() > 1 else 1}
    return configured(stage, data, *(f"--config.mesh.{axis}={size}" for axis, size in devices.items()))


@pytest.mark.whole_runs
def test_meshes_measure_the_same(data) -> None:
    for stage, found in zip(("stage1", "stage2"), tiny.call(on_four_devices, str(data), devices=4)):
        assert found == pytest.approx(Setting(sharded(stage, data)).measure(), rel=1e-3, abs=1e-5)


# --- The start, and mistakes ------------------------------------------------------------------------------------------


def test_the_start_is_of_the_same_examples(data) -> None:
    """Values at the start that come from other examples are not compared with."""
    config = configured("stage1", data)
    first = Setting(config)
    assert first.gauges.starting
    first.measure()
    record = json.loads(json.dumps(first.gauges.record))
    record["start"]["gauge/caption/next_token"] += 1
    again = Setting(config, record)
    assert not again.gauges.starting
    assert again.measure()["gauge/caption/next_token_change"] == pytest.approx(-1)
    assert Setting(configured("stage1", data, examples=4), record).gauges.starting


@pytest.mark.parametrize(
    ("stage", "extra", "sentence"),
    [
        ("stage1", "--config.gauges.sources={}", "every is 4, but stage1 openmoji has nothing to measure"),
        ("stage1", "--config.data.budgets.vlm_tokens=8", r"sources\.caption has no example that can be used: more"),
        ("stage1", "--config.gauges.every=-1", r"config\.gauges\.every in .* is -1, expected at least 0"),
        ("stage2", "--config.gauges.sources.edit_colour.shards=nowhere", "nowhere"),
    ],
)
def test_mistakes(stage, extra, sentence, data) -> None:
    with pytest.raises(UserError, match=sentence):
        Setting(configured(stage, data, extra))
