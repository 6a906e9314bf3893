"""Several processes train as one does, stop together, and hand their checkpoints on to any other number."""

import pathlib
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mmcore_jax import processes
from mmcore_jax.config import TryAgain, UserError
from mmcore_jax.data import example
from tests import tiny

STEPS = 36
LIMIT = 600  # seconds; four processes take half a minute on two idle cores, more than three on busy ones


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """The tiny dataset, and two images that turn out to be cut off when they are read."""
    directory = tiny.write_dataset(tmp_path_factory.mktemp("data"))
    writer = ArrayRecordWriter(str(directory / "text_to_image-train-cut.array_record"), "group_size:1")
    for number in range(2):
        image = tiny.drawing("red", "dot")[:-30]
        segments = [example.text("cut"), example.image(image, True)]
        writer.write(example.encode({"id": f"cut/{number}", "task": "text_to_image", "segments": segments}))
    writer.close()
    return directory


# The second process takes its time to make the directories of a checkpoint.
SLOW = """
import asyncio, os
from orbax.checkpoint._src.path import atomicity
async def create(self, known=atomicity.AtomicRenameTemporaryPath.create):
    await asyncio.sleep(2 * (os.environ["JAX_PROCESS_ID"] == "1"))
    return await known(self)
atomicity.AtomicRenameTemporaryPath.create = create
"""


def start(
    data: pathlib.Path, workdir: pathlib.Path, count: int, devices: int, *extra: str, before: str = ""
) -> list[subprocess.Popen]:
    """Trains stage 0 in `count` processes of `devices` devices each; `before` is Python that each runs first."""
    given = [*tiny.overrides("stage0", data), "--config.init.vision_target=random"]
    given += [f"--config.total_steps={STEPS}", "--config.data.bad_record_limit=0.9"]
    given += ["--config.checkpoint.every=20", "--config.checkpoint.keep=9", "--stopped_code=75"]
    given += ["--config.checkpoint.local_every=5", f"--config.checkpoint.local={workdir}-local"]
    python, option, run, *arguments = tiny.command(
        "train", "--config=configs/stage0.py", f"--workdir={workdir}", *given
    )
    return tiny.start([python, option, before + run, *arguments, *extra], count, devices, workdir)


def wait_until(running: list[subprocess.Popen], true: Callable[[], bool]) -> None:
    """Waits while the processes run."""
    while not true():
        assert all(process.poll() is None for process in running)
        time.sleep(0.01)


def output(workdir: pathlib.Path, index: int = 0) -> str:
    return pathlib.Path(f"{workdir}.{index}").read_text()


def logged(workdir: pathlib.Path) -> dict[str, list[float]]:
    records = tiny.logged(workdir)
    return {name: [record.get(name, 0.0) for record in records] for name in records[-1]}


def stopped(data: pathlib.Path, workdir: pathlib.Path, count: int, devices: int) -> int:
    """Goes on, and stops all by a SIGTERM at the last of the processes; returns after which step."""
    (workdir / "config.json").unlink()
    running = start(data, workdir, count, devices)
    wait_until(running, (workdir / "config.json").exists)  # they have met
    running[-1].send_signal(signal.SIGTERM)
    assert [process.wait(LIMIT) for process in running] == [75] * count, output(workdir)
    last = output(workdir).splitlines()[-1]
    assert "stopped by SIGTERM and saved" in last
    return int(last.split("step ")[1].split()[0])


@pytest.mark.whole_runs
def test_processes_come_and_go(data, tmp_path) -> None:
    """Of 1 x 8 devices, 2 x 2 (killed), 2 x 2 (stopped), 1 x 2 (stopped) and 4 x 2 in turn are 1 x 8, uninterrupted."""
    whole, turns = tmp_path / "whole", tmp_path / "turns"
    (process,) = start(data, whole, 1, 8)
    assert process.wait(LIMIT) == 0, output(whole)
    turns.mkdir()
    shutil.copy(whole / "config.json", turns)
    shutil.copy(whole / "metrics.jsonl", turns)
    shutil.copytree(whole / "checkpoints/20", turns / "checkpoints/20")

    running = start(data, turns, 2, 2)
    local = pathlib.Path(f"{turns}-local")
    wait_until(running, lambda: len([*local.glob("*/process_?_of_2*/25/commit_success.txt")]) == 2)
    running[1].kill()
    assert running[0].wait(LIMIT) != 0  # it does not go on alone

    first, second = stopped(data, turns, 2, 2), stopped(data, turns, 1, 2)
    assert 25 < first < second < STEPS, "it did not go on from the host's disk, or from the other's checkpoint"
    assert (turns / "checkpoints" / str(second)).is_dir()

    running = start(data, turns, 4, 2)
    assert [process.wait(LIMIT) for process in running] == [0] * 4, output(turns)
    found, expected = logged(turns), logged(whole)
    assert found["step"] == expected["step"] == list(range(1, STEPS + 1))
    assert expected["data/bad/text_to_image"][-1] > 8, "no record was left out"
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0 if name.startswith("data/") else 1e-5, err_msg=name)


@pytest.mark.whole_runs
def test_a_process_that_is_slow_to_save_on_its_own_disk_is_waited_for(data, tmp_path) -> None:
    """It does not take the directories of the other for its own, which have been made by then."""
    running = start(data, tmp_path / "run", 2, 1, "--config.total_steps=8", before=SLOW)
    try:
        assert [process.wait(LIMIT / 4) for process in running] == [0, 0], output(tmp_path / "run", 1)
    finally:
        for process in running:
            process.kill()
    assert len([*tmp_path.glob("run-local/*/process_?_of_2*/5/commit_success.txt")]) == 2


def call_roll(count: int, present: list[int], timeout: float) -> dict[int, str]:
    """What each of the `present` processes hears: nothing, or who is missing."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address, heard = f"localhost:{probe.getsockname()[1]}", {}

    def call(index: int) -> None:
        try:
            processes.roll_call(address, count, index, timeout)
            heard[index] = ""
        except TryAgain as error:
            heard[index] = str(error)

    threads = [threading.Thread(target=call, args=(index,)) for index in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def test_roll_call() -> None:
    assert call_roll(3, [2, 1, 0], 10) == {0: "", 1: "", 2: ""}


def test_roll_call_names_who_is_missing() -> None:
    heard = call_roll(4, [2, 0], 1)
    assert heard[0] == heard[2]
    assert heard[0].startswith("process 1, 3 of 4 did not come to localhost:")
    assert f"here are 0 on {socket.gethostname()}, 2 on {socket.gethostname()}" in heard[0]


def test_roll_call_without_the_first() -> None:
    heard = call_roll(2, [1], 1)
    assert TryAgain.exit_code == 75  # what xpk, SLURM and the rest start again
    assert heard[1].startswith("process 0 did not come to localhost:")


@pytest.mark.parametrize(
    "given", [{"JAX_NUM_PROCESSES": "2"}, {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, {"JAX_PROCESS_ID": "x"}]
)
def test_a_contradictory_environment_is_refused(monkeypatch, given) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"expected host:port, a number of processes, and one below it"):
        processes.start(1)
