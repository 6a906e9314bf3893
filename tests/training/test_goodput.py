"""Where the wall time goes: all of it to one part, over all processes of a run."""

import json
import pathlib
import subprocess
import time

import pytest

from mmcore_jax.training import goodput
from mmcore_jax.training.goodput import PARTS, Goodput
from tests import tiny


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, and with it the age of the process, which began at 1000."""

    class Clock:
        now = began = 1000.0

        def perf_counter(self) -> float:
            return self.now - 300

        def time(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    monkeypatch.setattr(goodput, "_age", lambda: clock.now - clock.began)
    return clock


def account(workdir: pathlib.Path) -> dict[str, float]:
    """The parts that took time."""
    seconds = json.loads((workdir / "goodput.json").read_text())["seconds"]
    return {part: round(value, 6) for part, value in seconds.items() if value}


def test_all_time_goes_to_one_part(clock, tmp_path) -> None:
    clock.now += 4
    run = Goodput(tmp_path)
    clock.now += 1
    run.enter("useful")
    clock.now += 10
    with run.spent_on("checkpoint"):
        clock.now += 2
        with run.spent_on("evaluation"):
            clock.now += 3
    clock.now += 20
    metrics = run.record()
    assert account(tmp_path) == {"start": 5, "useful": 30, "checkpoint": 2, "evaluation": 3}
    assert metrics["goodput/wall_seconds"] == 40
    assert metrics["goodput/useful"] == 0.75
    assert sum(metrics[f"goodput/{part}"] for part in PARTS) == pytest.approx(1)


def test_the_age_of_a_process_belongs_to_its_first_run(monkeypatch) -> None:
    monkeypatch.setattr(goodput, "_asked", [])
    assert goodput._age() > 0
    assert goodput._age() == 0


def test_restarts_and_rollbacks(clock, tmp_path) -> None:
    first = Goodput(tmp_path)
    first.enter("useful")
    clock.now += 30
    first.record()
    clock.now += 5  # killed before the next record
    clock.began, clock.now = 1100.0, 1102.0
    second = Goodput(tmp_path)
    clock.now += 1
    second.resume(20.0)  # the checkpoint is of when 20 seconds of steps had been taken
    clock.now += 1
    second.enter("useful")
    clock.now += 50
    second.resume(45.0)
    clock.now += 1
    second.record()
    assert account(tmp_path) == {"useful": 45, "lost": 35, "down": 70, "start": 5}
    assert sum(account(tmp_path).values()) == clock.now - 1000


def test_a_batch_is_waited_for_once_the_device_is_idle(tmp_path) -> None:
    def slow():
        for number in range(3):
            time.sleep(0.2)
            yield number

    run, idle = Goodput(tmp_path), {}
    run.enter("useful")
    for number in run.batches(slow(), lambda: time.perf_counter() < idle.get("at", 0)):
        # Of the next 0.2 seconds the device works first 0.1, then all.
        idle["at"] = time.perf_counter() + 0.1 * (number + 1)
    run.record()
    assert run.seconds["data_wait"] == pytest.approx(0.3, abs=0.08)
    assert run.seconds["useful"] == pytest.approx(0.3, abs=0.08)


@pytest.mark.whole_runs
def test_of_processes(tmp_path) -> None:
    """Of two, the second of which goes on, the parts sum up to the time from the first start to the last end."""
    data, began = tiny.write_dataset(tmp_path / "data"), time.time()
    arguments = [*tiny.overrides("stage0", data), "--config.checkpoint.every=4"]
    for steps in (8, 10):
        given = [f"--workdir={tmp_path / 'run'}", *arguments, f"--config.total_steps={steps}"]
        command = tiny.command("train", "--config=configs/stage0.py", *given)
        process = subprocess.run(command, cwd=tiny.REPOSITORY, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
    known = json.loads((tmp_path / "run/goodput.json").read_text())
    assert sum(known["seconds"].values()) == pytest.approx(known["until"] - began, abs=0.5)
    assert set(account(tmp_path / "run")) >= {"useful", "start", "compile", "checkpoint", "down"}
    assert known["seconds"]["lost"] < 0.5  # the first stopped at its last checkpoint
