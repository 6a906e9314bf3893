"""LoRA as a way to tune: what it changes and leaves alone, where its weights come from, and that a run resumes."""

import dataclasses
import os
import pathlib
import signal
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mmcore_jax import convert, pretrained, sharding, train
from mmcore_jax.config import Config, UserError
from mmcore_jax.data.pipeline import Batches
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.nn.layers import is_lora
from mmcore_jax.nn.masks import PAD
from mmcore_jax.training import weights
from mmcore_jax.training.flops import step_flops
from mmcore_jax.training.state import Constants, join, make_plan
from mmcore_jax.training.telemetry import read_metrics
from tests import tiny
from tests.training.test_step import Run

LORA = {"rank": 4, "alpha": 8.0, "targets": ("q", "v", "down")}
FREEZE = {"pattern": "(vlm|vision_target)/.*", "frozen": True}
TABLE = ({"pattern": "vlm/.*/lora_[ab]"}, FREEZE, {"pattern": ".*"})
STEPS = 8


class Places(NamedTuple):
    """A dataset; a stage 1 on it, its VLM as published, and two runs with LoRA, the second on top of the first."""

    data: pathlib.Path
    base: pathlib.Path
    published: pathlib.Path
    adapted: pathlib.Path
    later: pathlib.Path


def configured(places: Places, vlm: object, *extra: str, table=TABLE, lora=LORA) -> Config:
    """Stage 1 with LoRA on the VLM of `vlm`."""
    init = dict.fromkeys(("queries", "connector"), str(places.base)) | {"vlm": str(vlm), "vision_target": "random"}
    given = [f"--config.model.vlm.lora={lora}", f"--config.tuning={table}", f"--config.init={init}"]
    return tiny.config("stage1", places.data, *given, f"--config.total_steps={STEPS}", *extra, random=False)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Places:
    """The second run keeps LoRA as it is, and trains the last norm."""
    names = ("data", "base", "published", "adapted", "later")
    places = Places(*(tmp_path_factory.mktemp("runs") / name for name in names))
    tiny.write_dataset(places.data)
    tiny.train(tiny.config("stage1", places.data, "--config.total_steps=1"), places.base)
    config, params = weights.load_part(places.base, "vlm")
    pretrained.export(params, config, places.published)
    tiny.train(configured(places, places.published), places.adapted)
    table = ({"pattern": "vlm/decoder/norm/scale"}, FREEZE, {"pattern": ".*"})
    tiny.train(configured(places, places.adapted, "--config.total_steps=1", table=table), places.later)
    return places


def vlm(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    return flatten_dict({"vlm": jax.device_get(weights.load_part(workdir, "vlm")[1])}, sep="/")


def start(config: Config, part: str = "vlm") -> tuple[dict[str, jax.Array], object]:
    """The parameters of a part at the start of a run, and the plan."""
    mesh, model = sharding.make_mesh(config.mesh), MMCORE(config.model, config.execution)
    batch = Batches(config)[0].arrays
    plan = make_plan(config, model, mesh, batch)
    paths = [path for path in plan.shapes if path.startswith(f"{part}/")]
    return weights.initial_params(config, model, plan, batch, paths), plan


def held(workdir: pathlib.Path) -> set[str]:
    return {path for path in weights._open_run(workdir, "vlm", "").held if path.startswith("vlm/")}


# --- What trains ------------------------------------------------------------------------------------------------------


def problems(run: Run) -> list[str]:
    """What contradicts that of the VLM LoRA trains, and nothing else."""
    found = []
    now = {**run.constants.frozen, **run.state.params}
    mentioned = " ".join(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(run.state))
    for path in (path for path in run.start if path.startswith("vlm/")):
        same = np.array_equal(np.asarray(run.start[path]).view(np.uint32), np.asarray(now[path]).view(np.uint32))
        if same == is_lora(path):
            found.append(f"{path} {'stayed' if same else 'changed'}")
        if mentioned.count(f"'{path}'") != (4 if is_lora(path) else 0):  # parameter, two moments, average
            found.append(f"{path} is in the state, or lacks a moment there")
    return found


def test_only_lora_trains(places) -> None:
    run = Run(configured(places, places.published)).train(3)
    assert not problems(run)
    assert sum(is_lora(path) for path in run.state.params) == 2 * len(LORA["targets"])


def test_removing_the_freeze_is_noticed(places) -> None:
    table = (TABLE[0], {"pattern": "vision_target/.*", "frozen": True}, TABLE[2])
    run = Run(configured(places, places.published, table=table)).train(3)
    assert any("vlm/decoder/blocks/q/kernel changed" in problem for problem in problems(run))


@pytest.mark.parametrize("scan", [True, False])
def test_it_begins_as_the_base(places, scan: bool) -> None:
    hidden = {}
    for lora in (LORA, None):
        table = TABLE if lora else TABLE[1:]
        config = configured(places, places.published, f"--config.execution.scan_layers={scan}", table=table, lora=lora)
        params = {**start(config)[0], **start(config, "queries")[0]}
        model, batch = MMCORE(config.model, config.execution), Batches(config)[0].arrays
        apply = jax.jit(
            lambda flat, model=model, batch=batch: model.apply(
                {"params": join(flat, Constants({}, {}))}, batch, method="hidden_states"
            )
        )
        hidden[bool(lora)] = np.asarray(apply(params))
        if lora:
            changed = {path: x + 0.1 if path.endswith("lora_b") else x for path, x in params.items()}
            assert np.abs(np.asarray(apply(changed)) - hidden[True]).max() > 1e-3
    np.testing.assert_array_equal(hidden[True], hidden[False])


def test_flops(places) -> None:
    """A trained matrix costs its forward product three times."""
    plain = configured(places, places.published, table=TABLE[1:], lora=None)
    config, batch = configured(places, places.published), Batches(plain)[0].arrays
    plan = start(config)[1]
    added = step_flops(config, plan, batch)["vlm/decoder"] - step_flops(plain, start(plain)[1], batch)["vlm/decoder"]
    values = sum(x.size for path, x in plan.shapes.items() if is_lora(path))
    assert values == 2 * 4 * (2 * 32 + (32 + 16) + (64 + 32))  # layers, rank, both sides of q, v and down
    assert added == 3 * 2 * np.count_nonzero(batch.tokens.meta.kind != PAD) * values


# --- Where weights come from ------------------------------------------------------------------------------------------


def test_fresh_on_any_base(places) -> None:
    """From the published directory and from the workdir: the same base, and the same LoRA, whose product is zero."""
    published, workdir = (start(configured(places, source))[0] for source in (places.published, places.base))
    base = vlm(places.base)
    assert set(published) == set(workdir) == set(vlm(places.adapted))
    for path, value in published.items():
        np.testing.assert_array_equal(value, workdir[path])
        if is_lora(path):
            assert np.any(value) == path.endswith("lora_a"), path
        else:
            np.testing.assert_array_equal(value, base[path])


def test_checkpoints_hold_what_trained(places) -> None:
    assert held(places.adapted) == {path for path in vlm(places.adapted) if is_lora(path)}
    assert held(places.later) == {"vlm/decoder/norm/scale"}


def test_later_stages_get_base_and_lora(places) -> None:
    """One run after another: each parameter is that of the run that trained it last."""
    base, adapted, later = (vlm(workdir) for workdir in (places.base, places.adapted, places.later))
    found, _ = start(configured(places, places.later))
    for path, value in found.items():
        last = later if path == "vlm/decoder/norm/scale" else adapted if is_lora(path) else base
        np.testing.assert_array_equal(value, last[path])
        np.testing.assert_array_equal(value, later[path])
    assert not np.array_equal(later["vlm/decoder/norm/scale"], base["vlm/decoder/norm/scale"])
    assert np.any(adapted["vlm/decoder/blocks/q/lora_b"])


def test_stage_2_gets_it_frozen(places) -> None:
    init = dict.fromkeys(("vlm", "queries", "connector"), str(places.adapted))
    init |= dict.fromkeys(("conditioning", "dit"), "random")
    given = [f"--config.model.vlm.lora={LORA}", f"--config.init={init}"]
    found, plan = start(tiny.config("stage2", places.data, *given, random=False))
    assert set(found) <= set(plan.frozen)
    jax.tree.map(np.testing.assert_array_equal, found, vlm(places.adapted))


@pytest.mark.parametrize("lora", [None, LORA | {"alpha": 4.0}, LORA | {"targets": ("q", "v")}])
def test_other_lora_than_the_source(places, lora) -> None:
    config = configured(places, places.adapted, table=TABLE if lora else TABLE[1:], lora=lora)
    with pytest.raises(UserError) as raised:
        start(config)
    for word in (str(places.adapted), "config.model.vlm.lora", "must be Lora(rank=4, alpha=8.0"):
        assert word in str(raised.value)


def test_lora_that_nothing_trains(places) -> None:
    with pytest.raises(UserError, match=r"freezes 'vlm/.*lora_[ab]'.*'vlm/\.\*/lora_\[ab\]'"):
        start(configured(places, places.published, table=TABLE[1:]))


# --- Stopped and resumed ----------------------------------------------------------------------------------------------


def test_resume(places, tmp_path, monkeypatch) -> None:
    """Stopped half way and continued: the same metrics and weights, bit by bit; on another base it stops."""
    config, log = configured(places, places.published), train.Telemetry.log
    handler = signal.getsignal(signal.SIGTERM)

    def log_and_stop(self, step: int, *metrics, **rates) -> None:
        log(self, step, *metrics, **rates)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(train.Telemetry, "log", log_and_stop)
        train.train(config, tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) < STEPS
    other, params = weights.load_part(places.later, "vlm")
    pretrained.export(params, other, tmp_path / "other")
    with pytest.raises(UserError, match="the frozen part 'vlm'"):
        train.train(dataclasses.replace(config, init=config.init | {"vlm": str(tmp_path / "other")}), tmp_path / "run")
    train.train(config, tmp_path / "run")
    signal.signal(signal.SIGTERM, handler)

    resumed, whole = map(tiny.logged, (tmp_path / "run", places.adapted))
    assert len(whole) == STEPS
    assert resumed == whole
    jax.tree.map(np.testing.assert_array_equal, vlm(tmp_path / "run"), vlm(places.adapted))


# --- Exports, and mistakes --------------------------------------------------------------------------------------------


@pytest.fixture
def enter(monkeypatch, capsys):
    """Runs a door and returns (exit code, stdout, stderr)."""

    def enter(door, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tiny.REPOSITORY)
        monkeypatch.setattr(sys, "argv", ["door", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            door()
        return stopped.value.code, *capsys.readouterr()

    return enter


def test_export(places, enter, tmp_path) -> None:
    import peft

    arguments = ("--from", places.adapted, "--part", "vlm")
    assert enter(convert.main, *arguments, "--to", tmp_path / "merged", "--verify")[0] == 0
    code, out, err = enter(convert.main, *arguments, "--to", tmp_path / "adapter", "--adapter")
    assert code == 0, err
    assert str(places.published) in out
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(places.published)
    merged = flatten_dict({"vlm": pretrained.load(tmp_path / "merged").params}, sep="/")
    adapted = vlm(places.adapted)
    for path, value in merged.items():
        stem = path.removesuffix("/kernel")
        expected = adapted[path]
        if f"{stem}/lora_a" in adapted:
            expected = expected + np.float32(2) * (adapted[f"{stem}/lora_a"] @ adapted[f"{stem}/lora_b"])
            assert np.abs(expected - adapted[path]).max() > 0
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("source", "words"),
    [("base", ["no LoRA"]), ("published", ["no LoRA"]), ("later", ["'vlm/decoder/norm/scale'", "merged"])],
)
def test_no_adapter(places, enter, tmp_path, source, words) -> None:
    code, _, err = enter(
        convert.main, "--from", getattr(places, source), "--part", "vlm", "--to", tmp_path / "out", "--adapter"
    )
    assert code == 2
    for word in [str(getattr(places, source)), "--adapter", *words]:
        assert word in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": ("q", "ou")}, ["config.model.vlm.lora.targets[1]", "'ou'", "did you mean 'out'", "'gate'"]),
        ({"rank": 0}, ["rank 0", "at least 1"]),
        ({"targets": ()}, ["0 targets"]),
        ({"rnak": 1}, ["config.model.vlm.lora.rnak", "did you mean 'rank'"]),
    ],
)
def test_mistakes(enter, tmp_path, change, words) -> None:
    code, _, err = enter(
        train.main,
        "--config=configs/stage1.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.model.vlm.lora={LORA | change}",
    )
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line, line
