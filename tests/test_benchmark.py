"""The benchmark through its real door, on tiny networks: what it prints, writes, and refuses."""

import dataclasses
import importlib.metadata
import json
import pathlib
import subprocess
import sys

import numpy as np
import optax
import pytest
import torch

from mmcore_jax import benchmark
from mmcore_jax.benchmarks import data, networks, timing
from mmcore_jax.benchmarks.data import DataSizes
from mmcore_jax.benchmarks.networks import MMDiTSizes, VLMSizes
from mmcore_jax.benchmarks.timing import CEILING, COMPILED, EAGER, OURS, Contestant
from mmcore_jax.config import Config, UserError
from mmcore_jax.diffusion import guidance

ROOT = pathlib.Path(__file__).parents[1]
TINY = {
    "mmdit": MMDiTSizes(width=64, depth=2, side=4, context=5, context_width=16, pooled_width=8, batch=2),
    "vlm": VLMSizes(
        width=64, depth=1, kv_heads=1, mlp_width=32, vocabulary=50, tokens=24, side=4, vision_width=64, vision_depth=2
    ),
}

FEW = DataSizes(
    examples=40,
    images=6,
    sides=(32, 40, 64),
    image_size=32,
    query_grid=2,
    rows=2,
    row_tokens=256,
    row_images=4,
    batch=5,
)


@pytest.fixture
def enter(monkeypatch, capsys):
    """Runs the door on tiny networks and returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(networks, "SIZES", TINY)
    monkeypatch.setattr(data, "SIZES", FEW)
    monkeypatch.setenv("NPROC", "1")  # what the door sets ends with the test
    threads = torch.get_num_threads()

    def enter(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            benchmark.main()
        return stopped.value.code, *capsys.readouterr()

    yield enter
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("suite", "names"), [("step", ["mmdit", "vlm"]), ("sample", ["mmdit"])])
def test_table_and_json(enter, tmp_path, suite: str, names: list[str]) -> None:
    code, out, error = enter(suite, "--eager", "--repeats=2", "--threads=1", f"--json={tmp_path / 'out.json'}")
    assert code == 0, error
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["environment"]["threads"] == "1"
    assert [result["network"] for result in record["results"]] == names
    header, environment, columns, *rows = out.splitlines()
    assert header.startswith(f"{suite}, float32")
    assert f"torch {torch.__version__.partition('+')[0]}" in environment
    for name in (OURS, EAGER, COMPILED):
        assert name in columns
    for row, result in zip(rows, record["results"], strict=True):
        assert set(result["seconds"]) == {OURS, EAGER}
        assert all(len(seconds) == 2 for seconds in result["seconds"].values())
        ours, eager = (np.median(result["seconds"][name]) for name in (OURS, EAGER))
        assert result["ratio"] == pytest.approx(ours / eager)
        assert 0 < result["difference"] < result["tolerance"] == 1e-4
        for figure in (f"{ours:.3f} [", f"{eager:.3f} [", "not run", f"{ours / eager:.2f}"):
            assert figure in row


SMALL_PHOTOGRAPHS = """import dataclasses
from mmcore_jax import benchmark
from mmcore_jax.benchmarks import data
data.SIZES = dataclasses.replace(data.SIZES, images=6, sides=(96, 128), image_size=96)
benchmark.main()"""


def test_table_of_the_data_pipeline(tmp_path) -> None:
    """In a process of its own, which workers can be forked from: JAX has not started its threads in it."""
    command = [sys.executable, "-c", SMALL_PHOTOGRAPHS, "data", "--examples=216", "--repeats=2", "--threads=2"]
    ran = subprocess.run([*command, f"--json={tmp_path / 'out.json'}"], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stderr.splitlines() if "Warning" in line]
    assert [line for line in said if "leaked shared_memory" not in line] == []  # grain's, which Python removes
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (result["examples"], result["workers"], result["difference"]) == (216, 2, 0.0)
    title, environment, _, *rows = ran.stdout.splitlines()
    assert title.startswith("data, 216 examples a pass, 2 workers")
    assert f"webdataset {importlib.metadata.version('webdataset')}" in environment
    assert [row.partition("  ")[0] for row in rows] == [OURS, "webdataset", "datasets", CEILING]
    assert "scanning" in ran.stderr  # once, before what is timed
    rates, each = {}, {}
    for name, passes in result["passes"].items():
        assert len(passes) == 2
        for whole, one in zip(result["seconds"][name], passes, strict=True):
            assert one["opening"] + one["each"] * 216 / 6 < whole  # of at least six batches, four are timed apart
            assert 0 < one["cpu"] < 2 * whole
        each[name] = np.median([one["each"] for one in passes])
        rates[name] = np.median([1 / one["each"] for one in passes]) / 2
    assert result["ratio"] == pytest.approx(each[OURS] / min(each["webdataset"], each["datasets"]))
    for row, (name, rate) in zip(rows, rates.items(), strict=True):
        assert f"{rate:.1f} [" in row
        assert f"{rates[OURS] / rate:.2f}" in row
        assert name == CEILING or f"{result['used'][name]['vlm']:.1%}" in row


def another_optimizer(monkeypatch):
    """The first losses agree: only those of later steps see gradients and updates."""
    monkeypatch.setattr(optax, "adamw", lambda rate, *settings, **others: optax.sgd(10 * rate))


def no_guidance(monkeypatch):
    monkeypatch.setattr(guidance, "branches", lambda *scales: guidance.Branches(*np.array([[1, 0]] * 3 + [[0, 1]])))


@pytest.mark.parametrize(("suite", "broken"), [("step", another_optimizer), ("sample", no_guidance)])
def test_no_ratio_where_the_work_is_not_the_same(enter, monkeypatch, tmp_path, suite: str, broken) -> None:
    broken(monkeypatch)
    arguments = (suite, "--model=mmdit", "--eager", "--repeats=2", f"--json={tmp_path / 'out.json'}")
    code, out, error = enter(*arguments)
    assert code == 2
    assert "error: mmdit: ours and the others differ" in error
    assert out == ""
    assert not (tmp_path / "out.json").exists()


def another_crop(monkeypatch):
    monkeypatch.setattr(data, "square", lambda image, size: np.asarray(image.resize((size, size))))


def a_lost_example(monkeypatch):
    whole = data.our_batches
    monkeypatch.setattr(data, "our_batches", lambda config: list(whole(config))[:-1])


def other_words(monkeypatch):
    ask = data.frame
    monkeypatch.setattr(data, "frame", lambda chat, sizes: (ask(chat, sizes)[0], ask(chat, sizes)[1][:-1]))


def in_this_process(config: Config) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))


@pytest.mark.parametrize("broken", [another_crop, a_lost_example, other_words])
def test_no_rate_where_examples_are_not_the_same(enter, monkeypatch, broken) -> None:
    loader, make = torch.utils.data.DataLoader, data.make_config
    here = {"num_workers": 0}  # JAX may have started threads: nothing is forked
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *given, **named: loader(*given, **named | here))
    monkeypatch.setattr(data, "make_config", lambda *given: in_this_process(make(*given)))
    broken(monkeypatch)
    code, out, error = enter("data", "--repeats=1", "--threads=1")
    assert code == 2
    assert "error: data: ours and the others differ" in error
    assert out == ""


def test_too_few_examples_for_a_rate(enter, monkeypatch) -> None:
    monkeypatch.setattr(data, "our_batches", lambda config: iter([data.Batch(1, {}, list)]))
    code, _, error = enter("data", "--repeats=1", "--threads=1")
    assert code == 2
    assert "40 examples make 1 batches, none after the first 2" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["step", "--repeats=0"], ["--repeats", "at least 1"]),
        (["sample", "--model=vlm"], ["sample measures mmdit, not vlm"]),
        (["data", "--model=vlm"], ["data measures no network, not vlm"]),
        (["data", "--examples=0"], ["--examples", "at least --threads"]),
        (["step", "--examples=9"], ["--examples is a setting of the suite data"]),
        (["step", "--json=nowhere/out.json"], ["nowhere", "does not exist"]),
    ],
)
def test_bad_requests(enter, arguments: list[str], words: list[str]) -> None:
    code, _, error = enter(*arguments)
    assert code == 2
    for word in words:
        assert word in error


@pytest.mark.parametrize(("suite", "missing"), [("step", "torch"), ("data", "webdataset"), ("data", "datasets")])
def test_without_its_packages_it_names_the_extra(enter, monkeypatch, suite: str, missing: str) -> None:
    real = benchmark.importlib.util.find_spec
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    code, _, error = enter(suite)
    assert code == 2
    assert error.startswith("error: ")
    assert f"needs {missing}: pip install 'mmcore_jax[bench]'" in error


# --- Timing -----------------------------------------------------------------------------------------------------------


def contestants(log: list, slow: str = "", wrong: float = 0.0) -> list[Contestant]:
    def runner(name):
        def run():
            log.append(name)
            if name == slow:
                raise RuntimeError("\nno C++ compiler was found\nand more")
            return np.float32(1.0 + wrong * (name == OURS))

        return run

    return [Contestant(name, runner(name)) for name in (OURS, EAGER, COMPILED)]


def test_contestants_run_by_turns() -> None:
    log = []
    found = timing.compare("x", {}, contestants(log), warmup=2, repeats=3, tolerance=0.1)
    assert log == 5 * [OURS, EAGER, COMPILED]
    assert {name: len(seconds) for name, seconds in found.seconds.items()} == dict.fromkeys(log, 3)


def test_the_ratio_is_to_the_faster_one() -> None:
    seconds = {OURS: [3.0, 2.0, 9.0], EAGER: [6.0, 6.0, 1.0], COMPILED: [4.0, 4.0, 4.0]}
    assert timing.Comparison("x", {}, seconds, {}, 0.0, 0.1).ratio == 0.75


def test_without_a_compiler_the_column_says_why() -> None:
    found = timing.compare("x", {}, contestants([], COMPILED), warmup=1, repeats=1, tolerance=0.1)
    assert found.unavailable == {COMPILED: "no C++ compiler was found"}
    _, (_, cells) = benchmark.network_table("step", [found])
    assert "not available: no C++ compiler was found" in cells


@pytest.mark.parametrize("wrong", [0.2, np.nan])
def test_a_difference_is_refused(wrong: float) -> None:
    with pytest.raises(UserError, match="cannot be compared"):
        timing.compare("x", {}, contestants([], wrong=wrong), warmup=1, repeats=1, tolerance=0.1)


def test_a_failure_of_ours_or_of_eager_is_no_missing_compiler() -> None:
    with pytest.raises(RuntimeError):
        timing.compare("x", {}, contestants([], EAGER), warmup=1, repeats=1, tolerance=0.1)
