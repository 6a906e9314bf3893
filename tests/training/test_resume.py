"""Kill a run at random moments: the resumed run cannot be told from one that was never interrupted."""

import os
import pathlib
import random
import signal
import subprocess
import time

import pytest

from mmcore_jax.training.telemetry import read_metrics
from tests import tiny

STEPS = 60
KILLS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("data"))


def start(stage: str, data: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    parts = tiny.config(stage, data).init
    given = [*tiny.overrides(stage, data), *(f"--config.init.{part}=random" for part in parts)]
    given += [f"--config.total_steps={STEPS}", "--config.checkpoint.every=5"]
    command = tiny.command("train", f"--config=configs/{stage}.py", f"--workdir={workdir}", *given)
    return subprocess.Popen(command, cwd=tiny.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    while process.poll() is None and (not (records := read_metrics(workdir)) or records[-1]["step"] < step):
        time.sleep(0.01)


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_killed_runs_end_equal(stage: str, data, tmp_path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(stage, data, whole)
    assert process.wait() == 0, process.stderr.read()
    assert [record["step"] for record in tiny.logged(whole)] == list(range(1, STEPS + 1))

    chance = random.Random(f"{stage} {os.getpid()}")
    moments = sorted(chance.randrange(1, STEPS - 10) for _ in range(KILLS))
    for moment in moments:
        process = start(stage, data, killed)
        wait_for_step(process, killed, moment)
        time.sleep(chance.random() * 0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"ended by itself before step {moment}: {process.stderr.read()}"
    process = start(stage, data, killed)
    assert process.wait() == 0, process.stderr.read()
    assert tiny.logged(killed) == tiny.logged(whole), f"killed after steps {moments}"


def test_sigterm_saves_and_exits_zero(data, tmp_path) -> None:
    process = start("stage2", data, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 13)
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == 0
    line = output.splitlines()[-1]
    assert "stopped by SIGTERM and saved" in line
    saved = {int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()}
    assert max(saved) == int(line.split("step ")[1].split()[0])
