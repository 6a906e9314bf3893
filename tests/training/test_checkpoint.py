"""Damaged checkpoints are passed over, and of those on the host's disk and in the workdir the newest counts."""

import os
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmcore_jax import config as config_lib
from mmcore_jax import sharding, train
from mmcore_jax.config import UserError
from mmcore_jax.training import checkpoint
from mmcore_jax.training.checkpoint import Checkpoints
from mmcore_jax.training.state import Constants, State
from tests import tiny

# Of a checkpoint that Orbax gives up on, other reads end when nobody waits for them any more.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SIZES = {"dit/a/kernel": (8, 16), "dit/b/bias": (64,)}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(config_lib.Mesh(1, 1, 1, 1), jax.devices()[:1])


def state(step: int, mesh) -> State:
    """A state that tells its step."""
    params = {path: np.full(size, step + 0.5, np.float32) for path, size in SIZES.items()}
    made = State(np.int32(step), params, {"count": np.int32(step), "moments": params}, params)
    return jax.device_put(made, sharding.replicated(mesh))


class Run:
    """A run that is started again and again."""

    def __init__(self, directory: pathlib.Path, mesh) -> None:
        self.workdir, self.directory, self.local = directory / "run", directory / "run/checkpoints", directory / "local"
        self._mesh, self._statistics = mesh, {"target_mean": jnp.ones((4, 2))}

    def open(self, local: bool = False) -> Checkpoints:
        extra = [f"--config.checkpoint.local={self.local}", "--config.checkpoint.local_every=1"] if local else []
        return Checkpoints(self.workdir, tiny.config("stage0", self.workdir, "--config.checkpoint.keep=3", *extra))

    def write(self, *steps: int, local: bool = False, last: bool = False) -> None:
        checkpoints = self.open(local)
        for step in steps:
            checkpoints.save(state(step, self._mesh), Constants({}, self._statistics), step, {"seen": step}, last)
        checkpoints.wait()

    def restored(self, local: bool = False) -> int:
        """The step that the next start continues from, with all that belongs to it."""
        checkpoints = self.open(local)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, self._mesh))
        found, constants = checkpoints.restore(like, {})
        step = checkpoints.latest_step
        jax.tree.map(np.testing.assert_array_equal, found, state(step, self._mesh))
        assert checkpoints.data() == {"seen": step}
        np.testing.assert_array_equal(constants.statistics["target_mean"], self._statistics["target_mean"])
        return step


@pytest.fixture
def run(tmp_path, mesh) -> Run:
    return Run(tmp_path, mesh)


def truncate(directory: pathlib.Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def lose_data(directory: pathlib.Path) -> None:
    for path in directory.rglob("d"):
        shutil.rmtree(path)


def lose_item(directory: pathlib.Path) -> None:
    shutil.rmtree(directory / "opt_state")


def lose_record(directory: pathlib.Path) -> None:
    shutil.rmtree(directory / "record")


def change_fingerprint(directory: pathlib.Path) -> None:
    """As if a bit had flipped on the way to the disk."""
    path = directory / "record/metadata"
    text = path.read_text()
    at = text.index('"fingerprints"') + text[text.index('"fingerprints"') :].index('"params"') + len('"params": "')
    path.write_text(text[:at] + ("1" if text[at] == "0" else "0") + text[at + 1 :])


@pytest.mark.parametrize("damage", [truncate, lose_data, lose_item, lose_record, change_fingerprint])
def test_a_damaged_checkpoint_is_passed_over(run, caplog, damage) -> None:
    run.write(5, 10)
    damage(run.directory / "10")
    assert run.restored() == 5
    assert f"{run.directory / '10'} is damaged and passed over" in caplog.text
    run.write(10)  # what it makes anew takes the place
    assert run.restored() == 10


@pytest.mark.parametrize("name", ["10.orbax-checkpoint-tmp", "10.orbax-checkpoint-tmp-7"])
def test_a_checkpoint_that_was_half_written_does_not_count_and_goes(run, name) -> None:
    run.write(5, 6, local=True)
    (local,) = run.local.glob("*/process_0_of_1")
    halves = [run.directory / name, local / name]
    for half in halves:
        shutil.copytree(run.directory / "5", half)
    assert run.restored(local=True) == 6
    end = time.monotonic() + 30  # Orbax deletes in the background
    while any(half.exists() for half in halves):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_workdir_that_is_begun_again_is_another_run(run) -> None:
    """Whatever the run that had its name has left on the disk of the host."""
    config = tiny.config("stage0", run.workdir)
    train.claim(run.workdir, config)
    run.write(3, local=True)
    train.claim(run.workdir, config)
    assert run.open(local=True).latest_step == 3
    shutil.rmtree(run.workdir)
    train.claim(run.workdir, config)
    assert run.open(local=True).latest_step is None


def test_what_storage_refuses_once_is_read_again(run, monkeypatch) -> None:
    run.write(5, 10)
    read, failures = checkpoint._read, [OSError(5, "Input/output error")]

    def fail_once(*given):
        if failures:
            raise failures.pop()
        return read(*given)

    monkeypatch.setattr(checkpoint, "_read", fail_once)
    assert run.restored() == 10
    assert not failures


def test_an_ema_does_not_begin_within_a_run(run, mesh) -> None:
    run.write(5)
    checkpoints, like = run.open(), state(0, mesh)
    with pytest.raises(UserError, match=r"was made with config.optimizer.ema_decay 0\.\d+: an EMA neither begins"):
        checkpoints.restore(like._replace(ema={}), {})
    assert run.restored() == 5


def test_without_a_whole_one_nothing_is_moved(run) -> None:
    run.write(5, 10)
    for step in ("5", "10"):
        lose_data(run.directory / step)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .*run/checkpoints can be read"):
        run.restored()
    assert {"5", "10"} <= {path.name for path in run.directory.iterdir()}


def test_tiers(run) -> None:
    """Every fifth goes into the workdir, as does the last; the others to the host's disk, where two stay."""
    run.write(*range(1, 9), local=True)
    (local,) = run.local.glob("*/process_0_of_1")
    assert {path.name for path in run.directory.iterdir()} == {"5"}
    assert {path.name for path in local.iterdir()} == {"7", "8"}
    assert run.restored(local=True) == 8
    lose_data(local / "8")
    assert run.restored(local=True) == 7
    run.write(8, local=True, last=True)
    assert run.restored(local=True) == 8
    shutil.rmtree(run.local)
    assert run.restored(local=True) == 8
    shutil.rmtree(run.directory / "8")
    assert run.restored() == 5


def test_of_what_another_process_lacks_nothing_stays(run, monkeypatch) -> None:
    """Else one would skip, and the others wait for it, when that step comes again."""
    run.write(6, 7, local=True)
    (local,) = run.local.glob("*/process_0_of_1")
    monkeypatch.setattr(checkpoint, "gather", lambda mine: [mine, [[6, "local"]]])
    assert run.open(local=True).latest_step == 6
    assert {path.name for path in local.iterdir()} == {"6"}


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (OSError(28, "No space left on device"), r"No space left.*; the ones before it are intact: make room", 2),
        (OSError(5, "Input/output error"), r"Input/output error\); the ones before it are intact: run the same", 75),
        (OSError(30, "Read-only file system"), r"intact: let it be written to, and run the same", 2),
        (ValueError("UNAVAILABLE: HTTP 503"), r"503\); the ones before it are intact: run the same", 75),
    ],
)
def test_what_cannot_be_written_is_one_sentence(run, mesh, monkeypatch, error, words, code) -> None:
    """A full disk is for the user to see to; what may pass is tried again by what has launched the run."""
    run.write(5)
    checkpoints = run.open()

    def fail(*_, **__) -> None:
        raise error

    monkeypatch.setattr(checkpoints._managers["lasting"], "save", fail)
    with pytest.raises(UserError, match=rf"run/checkpoints cannot be written \(.*{words}") as raised:
        checkpoints.save(state(10, mesh), Constants({}, {}), 10, {})
    assert raised.value.exit_code == code
    assert run.restored() == 5
