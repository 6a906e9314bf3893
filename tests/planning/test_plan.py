"""The door `plan`, with outcomes made up: what it prints, writes, and returns; and what a search leaves out."""

import dataclasses
import importlib.util
import json
import sys

import pytest

from mmcore_jax import plan
from mmcore_jax.config import UserError
from mmcore_jax.planning import process
from mmcore_jax.planning.outcome import GIB
from tests import tiny
from tests.planning.test_report import outcome

RECIPE = f"--config={tiny.REPOSITORY / 'configs/stage2.py:qwen25vl3b_sd35m'}"


@pytest.fixture
def enter(monkeypatch, capsys):
    """Runs the door with arguments and returns (exit code, stdout, stderr)."""

    def enter(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            plan.main()
        printed = capsys.readouterr()
        return stopped.value.code, printed.out, printed.err

    return enter


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5e:2x2", "--slices=0"], "--slices is 0"),
        (["--topology=local", "--slices=2"], "only of a TPU topology"),
        (["--topology=v5e:2x2", "--json=nowhere/at/all.json"], "nowhere/at does not exist"),
        (["--topology=v5e:2x2", "--config.batch_sise=2"], "did you mean 'batch_size'"),
        (["--topology=v5e:2x2"], "pip install 'mmcore_jax[tpu]'"),
        (["--topology=v5e", "--search"], "not of the form v5e:16x16"),
    ],
)
def test_mistakes_are_told_in_one_sentence(enter, monkeypatch, arguments, words) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    code, _, error = enter(RECIPE, *arguments)
    assert code == 2
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(("needed", "code"), [(7, 0), (20, 1)])
def test_a_plan_is_printed_and_written(enter, monkeypatch, tmp_path, needed, code) -> None:
    made = outcome(needed=needed * GIB)
    monkeypatch.setattr(process, "run", lambda config, topology, slices, label: made)
    result = enter(RECIPE, "--topology=v5e:16x16", f"--json={tmp_path / 'plan.json'}")
    assert result[0] == code
    assert ("OUT OF MEMORY" in result[1]) == bool(code)
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] == (not code)


def test_a_search_leaves_out_what_cannot_fit(enter, monkeypatch, tmp_path) -> None:
    """Two rows never fit with full remat, one never without: nothing larger is tried, and no broken mesh again."""
    tried = []

    def run(config, topology, slices, label):
        rows = config.batch_size // (config.mesh.data * config.mesh.fsdp)
        tried.append((config.mesh.fsdp, config.mesh.tensor, config.execution.remat, rows))
        if config.mesh.fsdp == 256:
            raise UserError("large parameters are left replicated.")
        fits = rows == 1 and config.execution.remat != "none"
        made = outcome(batch_size=config.batch_size, remat=config.execution.remat)
        return made if fits else dataclasses.replace(made, needed=20 * GIB, seconds=None)

    monkeypatch.setattr(process, "run", run)
    code, printed, _ = enter(RECIPE, "--topology=v5e:16x16", "--search", f"--json={tmp_path / 'found.json'}")
    assert code == 0
    written = json.loads((tmp_path / "found.json").read_text())
    assert len(written["outcomes"]) + len(written["failures"]) == len(tried)
    assert "left replicated" in written["failures"][0]["reason"]
    assert sum(fsdp == 256 for fsdp, *_ in tried) == 1
    assert "left replicated" in printed
    expected = [("full", 1), ("full", 2), ("attention", 1), ("qkv", 1), ("dots", 1), ("none", 1)]
    assert [case[2:] for case in tried if case[:2] == (64, 1)] == expected
    lines = printed.splitlines()
    assert "too much" not in lines[1]
    assert "too much" in lines[-2]


def test_what_fails_once_leaves_out_what_is_larger_alone(enter, monkeypatch) -> None:
    tried = []

    def run(config, topology, slices, label):
        tried.append(config.execution.remat)
        if config.batch_size == 8 * config.mesh.data * config.mesh.fsdp:
            raise UserError("the compiler ended by SIGKILL")
        return outcome(batch_size=config.batch_size, remat=config.execution.remat)

    monkeypatch.setattr(process, "run", run)
    code, _, _ = enter(RECIPE, "--topology=v5e:16x16", "--search")
    assert code == 0
    assert set(tried) == {"full", "attention", "qkv", "dots", "none"}


def test_a_search_without_candidates_is_a_mistake(enter) -> None:
    code, _, error = enter(RECIPE, "--topology=v5e:16x16", "--search", "--config.mesh.context=3")
    assert code == 2
    assert "config.mesh.context 3 does not divide the 256 chips of v5e:16x16" in error
