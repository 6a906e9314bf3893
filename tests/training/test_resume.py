"""Kill a run at random moments: the resumed run cannot be told from one that was never interrupted."""

import os
import pathlib
import random
import signal
import time
from multiprocessing.process import BaseProcess

import pytest

from mmcore_jax import train
from mmcore_jax.config import Config
from mmcore_jax.training.telemetry import read_metrics
from tests import tiny

STEPS = 60
KILLS = 5
SETTINGS = (f"--config.total_steps={STEPS}", "--config.checkpoint.every=5")


def start(config: Config, workdir: pathlib.Path) -> BaseProcess:
    return tiny.fork(train.train, config, workdir, output=workdir.with_suffix(".log"))


def said(workdir: pathlib.Path) -> str:
    return workdir.with_suffix(".log").read_text()


def wait_for_step(process: BaseProcess, workdir: pathlib.Path, step: int) -> None:
    while process.is_alive() and (not (records := read_metrics(workdir)) or records[-1]["step"] < step):
        time.sleep(0.01)


@pytest.mark.whole_runs
@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_killed_runs_end_equal(stage: str, data, tmp_path) -> None:
    """Other processes are killed; this one begins and ends."""
    config = tiny.config(stage, data, *SETTINGS)
    whole, killed = tiny.train(config, tmp_path / "whole"), tmp_path / "killed"
    assert [record["step"] for record in tiny.logged(whole)] == list(range(1, STEPS + 1))

    chance = random.Random(f"{stage} {os.getpid()}")
    moments = sorted(chance.randrange(1, STEPS - 10) for _ in range(KILLS))
    for moment in moments:
        process = start(config, killed)
        wait_for_step(process, killed, moment)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"ended by itself before step {moment}: {said(killed)}"
    tiny.train(config, killed)
    assert tiny.logged(killed) == tiny.logged(whole), f"killed after steps {moments}"


def test_sigterm_saves_and_ends(data, tmp_path) -> None:
    process = start(tiny.config("stage2", data, *SETTINGS), tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 13)
    process.terminate()
    process.join()
    assert process.exitcode == 0, said(tmp_path / "run")
    line, code = said(tmp_path / "run").splitlines()[-2:]
    assert code == "false"
    assert "stopped by SIGTERM and saved" in line
    saved = {int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()}
    assert max(saved) == int(line.split("step ")[1].split()[0])
