"""Poisoned batches and spikes change nothing; too many in a row send the run back, and past the data that led there."""

import dataclasses
import json
import os
import pathlib
import resource
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mmcore_jax import train
from mmcore_jax.config import BadSteps, UserError
from mmcore_jax.data.pipeline import Batches
from mmcore_jax.training import bad_steps
from mmcore_jax.training.checkpoint import Checkpoints
from mmcore_jax.training.telemetry import read_metrics
from tests import tiny

SETTINGS = BadSteps(window=16, warmup=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def handler():
    """A run takes the signal for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def poison(monkeypatch):
    """Multiplies the pixels of given batches, numbered from 0."""
    original = Batches.__getitem__

    def poison(factor: float, *numbers: int) -> None:
        def get(self, number):
            batch = original(self, number)
            if isinstance(number, slice) or number not in numbers:
                return batch
            images = batch.arrays.images
            pixels = images.pixels.astype(np.float32) * np.float32(factor)
            return batch._replace(arrays=batch.arrays._replace(images=images._replace(pixels=pixels)))

        monkeypatch.setattr(Batches, "__getitem__", get)

    return poison


def configured(data: pathlib.Path, **settings: object):
    """A tiny stage 2 of 12 steps, a checkpoint every 4, which goes back after 3 bad steps."""
    settings = {"checkpoint.every": 4, "checkpoint.keep": 9, "bad_steps.in_a_row": 3} | settings
    settings |= {"total_steps": 12, "bad_steps.warmup": 6}  # the same program for all tests
    return tiny.config("stage2", data, *(f"--config.{name}={value}" for name, value in settings.items()))


def arrays(workdir: pathlib.Path, step: int) -> list[np.ndarray]:
    """Parameters, moments and EMA of a checkpoint."""
    directory = (workdir / "checkpoints" / str(step)).absolute()
    items = [ocp.PyTreeCheckpointer().restore(directory / name) for name in ("params", "opt_state", "ema")]
    return jax.tree.leaves(items)


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# --- The judgement ----------------------------------------------------------------------------------------------------


judge = jax.jit(bad_steps.judge, static_argnums=0)


def judged(*steps: tuple[float, float]) -> tuple[list[bool], bad_steps.Health]:
    """Whether each step is good, by its loss and gradient norm, and the health after them."""
    health, verdicts = bad_steps.health(), []
    for loss, norm in steps:
        good, health = judge(SETTINGS, health, {"loss": np.float32(loss), "gradient_norm": np.float32(norm)})
        verdicts.append(bool(good))
    assert int(health.bad) == verdicts.count(False)
    assert int(health.seen) == verdicts.count(True)
    return verdicts, health


def usual(count: int) -> list[tuple[float, float]]:
    """Steps that vary by some 10 and 20 percent."""
    noise = np.random.default_rng(0).normal(size=(count, 2))
    return [tuple(pair) for pair in np.exp(noise * (0.1, 0.2))]


@pytest.mark.parametrize("bad", [(np.nan, 1), (1, np.inf), (np.inf, np.inf)])
def test_what_is_not_finite_is_bad_from_the_first_step(bad) -> None:
    assert judged(bad, *usual(2), bad)[0] == [False, True, True, False]


@pytest.mark.parametrize("far", [(4, 1), (1, 12)])
def test_what_is_far_above_is_bad_after_the_warmup(far) -> None:
    assert judged(*usual(5), far)[0] == [True] * 6
    assert judged(*usual(40), far, far, *usual(3))[0] == [True] * 40 + [False] * 2 + [True] * 3


def test_what_is_below_or_barely_varies_is_good() -> None:
    assert all(judged(*usual(40), (0.1, 0.01))[0])
    assert all(judged(*[(1, 1)] * 40, (1.05, 1.5))[0])
    assert not all(judged(*[(1, 1)] * 40, (1.1, 1))[0])


def test_the_range_follows_what_changes_slowly() -> None:
    levels = np.linspace(1, 10, 200)
    assert all(judged(*((level * loss, norm) for level, (loss, norm) in zip(levels, usual(200))))[0])


def test_another_mixture_begins_another_range(data, tmp_path) -> None:
    config = tiny.config("stage2", data)
    sources = {"edit": dataclasses.replace(config.data.sources["edit_colour"], schedule=((7, 1.0),))}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    watch, (_, known) = bad_steps.Watch(tmp_path, config), judged(*usual(20))
    assert watch.renew(6, known) is known
    renewed = watch.renew(7, known)
    metrics = {"loss": np.float32(9), "gradient_norm": np.float32(90)}
    assert not judge(SETTINGS, known, metrics)[0]
    good, after = judge(SETTINGS, renewed, metrics)
    assert good
    np.testing.assert_allclose(after.mean, np.log([9, 90]), rtol=1e-6)
    assert not after.variance.any()


def test_jumps_after_the_checkpoint_that_a_run_begins_at_are_forgotten(data, tmp_path) -> None:
    """As when the newest checkpoint is damaged, or all are deleted."""
    config = tiny.config("stage2", data)
    for step, to in ((20, 10), (28, 10), (50, 40)):
        with pytest.raises(bad_steps.RolledBack):
            bad_steps.Watch(tmp_path, config).roll_back(step, to)
    assert bad_steps.Watch(tmp_path, config).begin(40) == 38  # 50 + 28 - 40
    assert bad_steps.Watch(tmp_path, config).begin(30) == 28
    assert bad_steps.Watch(tmp_path, config).begin(40) == 28
    assert bad_steps.Watch(tmp_path, config).begin(0) == 0


@pytest.mark.parametrize(("change", "begins"), [(115, True), (194, True), (99, False), (195, False), (300, False)])
def test_a_jump_over_another_mixture_begins_another_range(data, tmp_path, change, begins) -> None:
    """The jump leaves out batches 100 to 194; at 195 `renew` begins another range, as it does without jumps."""
    config = tiny.config("stage2", data)
    sources = {"edit": dataclasses.replace(config.data.sources["edit_colour"], schedule=((change, 1.0),))}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    with pytest.raises(bad_steps.RolledBack):
        bad_steps.Watch(tmp_path, config).roll_back(195, 100)
    watch, record = bad_steps.Watch(tmp_path, config), judged(*usual(20), (np.nan, 1))[1].record()
    assert int(watch.health(100, record).seen) == (0 if begins else 20)
    assert int(watch.health(100, record).in_a_row) == 0
    assert watch.health(110, record).record() == record
    assert int(watch.renew(195, watch.health(100, record)).seen) == (0 if begins or change == 195 else 20)


def test_a_record_of_health_is_exact() -> None:
    _, health = judged(*usual(3))
    assert same(jax.tree.leaves(health), jax.tree.leaves(bad_steps.health(json.loads(json.dumps(health.record())))))


# --- In runs ----------------------------------------------------------------------------------------------------------


def with_and_without(directory: str) -> list[list]:
    """What a run of stage 0 logs, compiled as for users, with the judgement and without."""
    os.environ["XLA_FLAGS"] = ""
    jax.config.update("jax_disable_most_optimizations", False)
    places = pathlib.Path(directory)
    config = tiny.config("stage0", tiny.write_dataset(places / "data"), "--config.total_steps=10")
    train.train(config, places / "with")
    bad_steps.judge = lambda settings, before, metrics: (True, before)
    train.train(config, places / "without")
    return [tiny.logged(places / name) for name in ("with", "without")]


@pytest.mark.whole_runs
def test_nothing_bad_nothing_changed(tmp_path) -> None:
    """The same numbers, bit by bit, as of a step that judges nothing."""
    judged, unjudged = tiny.call(with_and_without, str(tmp_path), devices=1)
    assert len(judged) == 10
    assert judged == unjudged
    assert same(arrays(tmp_path / "with", 10), arrays(tmp_path / "without", 10))
    assert not (tmp_path / "with/bad_steps.jsonl").exists()


@pytest.mark.parametrize(("factor", "finite"), [(np.inf, False), (30.0, True)])
def test_a_bad_batch_changes_nothing(data, tmp_path, poison, capsys, factor, finite) -> None:
    poison(factor, 11)
    config = configured(data, **{"checkpoint.every": 11})
    train.train(config, tmp_path)
    assert same(arrays(tmp_path, 11), arrays(tmp_path, 12))
    last = read_metrics(tmp_path)[-1]
    assert (last["bad_steps/total"], last["bad_steps/in_a_row"], last["loss"] is not None) == (1, 1, finite)
    (record,) = map(json.loads, (tmp_path / "bad_steps.jsonl").read_text().splitlines())
    assert (record["step"], record["batch"], record["ids"]) == (12, 11, Batches(config)[11].ids)
    assert "bad step 12" in capsys.readouterr().err


@pytest.mark.whole_runs
def test_rollback(data, tmp_path, poison, monkeypatch) -> None:
    """From step 9 to the checkpoint of step 4: the next batch is 9; killed after that, the run does the same again."""
    poison(np.inf, 6, 7, 8)
    config, note, taken, kills = configured(data), bad_steps.Watch.note, {}, []

    def noted(self, step, metrics, batch):
        taken[step] = batch.ids
        if step in kills and self.skipped:
            raise KeyboardInterrupt
        return note(self, step, metrics, batch)

    monkeypatch.setattr(bad_steps.Watch, "note", noted)
    train.train(config, tmp_path / "whole")
    jumps = [{"to": 4, "from": 9, "batch": 9}]
    assert json.loads((tmp_path / "whole/rollbacks.json").read_text()) == jumps
    batches = Batches(dataclasses.replace(config, total_steps=20))
    assert taken == {step: batches[step - 1 if step <= 4 else step + 4].ids for step in range(1, 13)}
    assert [record["step"] for record in tiny.logged(tmp_path / "whole")] == list(range(1, 13))
    account = json.loads((tmp_path / "whole/goodput.json").read_text())["seconds"]
    assert account["lost"] > 0

    kills.append(6)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "killed")
    kills.clear()
    train.train(config, tmp_path / "killed")
    assert json.loads((tmp_path / "killed/rollbacks.json").read_text()) == jumps
    assert tiny.logged(tmp_path / "killed") == tiny.logged(tmp_path / "whole")
    assert same(arrays(tmp_path / "killed", 12), arrays(tmp_path / "whole", 12))


@pytest.mark.whole_runs
def test_too_many_rollbacks_stop(data, tmp_path, poison) -> None:
    """No checkpoint is made among bad steps, and the last one stays."""
    poison(np.inf, *range(6, 40))
    with pytest.raises(UserError, match=r"3 bad steps in a row up to step 7, after 1 rollbacks to step 4: .*intact"):
        train.train(configured(data, **{"bad_steps.rollbacks": 1}), tmp_path)
    assert Checkpoints(tmp_path, configured(data)).latest_step == 4
    assert len((tmp_path / "bad_steps.jsonl").read_text().splitlines()) == 6


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax, for each array
def test_a_full_disk_stops_with_one_sentence(data, tmp_path, monkeypatch) -> None:
    """The disk takes no large file any more while the second checkpoint is written: the first one is whole."""
    save, limits, saved = Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE), []

    def fill(self, state, constants, step, data, last):
        if step == 8:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        saved.append(jax.tree.leaves(jax.device_get((state.params, state.opt_state, state.ema))))
        save(self, state, constants, step, data, last)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", fill)
        try:
            with pytest.raises(UserError, match=r"a checkpoint in .* cannot be written .*make room"):
                train.train(configured(data), tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(arrays(tmp_path, 4), saved[0])
    train.train(configured(data), tmp_path)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 13))
