"""A run that hangs ends with its stacks; the next start continues it, with the programs that the first has compiled."""

import os
import pathlib
import subprocess
import sys

import pytest

from mmcore_jax.training.watchdog import HUNG
from tests import tiny

# The reader of the sixth batch never returns.
HANG = """
import threading
from mmcore_jax import train
from mmcore_jax.data.pipeline import Batches

original = Batches.__getitem__

def never_ending_read():
    threading.Event().wait()

def get(self, number):
    return never_ending_read() if number == 5 else original(self, number)

Batches.__getitem__ = get
train.main()
"""


def start(command: list[str]) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    return subprocess.run(command, cwd=tiny.REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.mark.whole_runs
def test_a_run_that_hangs_ends_and_continues(tmp_path) -> None:
    """Compiling takes longer than a step may, and is no hang."""
    run, cache = tmp_path / "run", "--config.execution.compilation_cache=compiled"
    arguments = ["--config=configs/stage0.py", f"--workdir={run}", cache, "--config.watchdog.minutes=0.02"]
    arguments += [*tiny.overrides("stage0", tiny.write_dataset(tmp_path / "data")), "--config.total_steps=8"]
    arguments += ["--config.checkpoint.every=4"]

    hung = start([sys.executable, "-c", HANG, *arguments])
    assert hung.returncode == HUNG, hung.stderr
    (path,) = run.glob("hang_*.txt")
    for text in (hung.stderr, path.read_text()):
        assert "error: the run hangs" in text
        assert "never_ending_read" in text
        assert "in settle" in text or "in batches" in text

    compiled = programs(run)
    assert any("jit_step" in name for name in compiled)
    continued = start(tiny.command("train", *arguments))
    assert continued.returncode == 0, continued.stderr
    assert "is done: step 8 of 8" in continued.stdout
    assert {name for name in programs(run) - compiled if "jit_step" in name} == set()


def programs(run: pathlib.Path) -> set[str]:
    return {path.name for path in (run / "compiled").glob("*/*-cache")}
