"""Outcomes in words: what fits, what does not and what then, and how a search ranks them."""

import dataclasses
import json
import pathlib
import shlex

import pytest

from mmcore_jax import config as config_lib
from mmcore_jax.config import Mesh, UserError
from mmcore_jax.planning import outcome as outcome_lib
from mmcore_jax.planning.outcome import GIB, Large, Outcome, Transfer
from mmcore_jax.planning.report import ranking, report
from mmcore_jax.planning.search import candidates, device_count, not_smaller, with_candidate
from tests import tiny

FULL = str(tiny.REPOSITORY / "configs/stage2.py:qwen25vl3b_sd35m")


def outcome(**changes) -> Outcome:
    made = Outcome(
        recipe="stage2 qwen25vl3b_sd35m",
        topology="v5e:16x16",
        device="TPU v5 lite",
        chips=256,
        mesh={"data": 4, "fsdp": 64},
        batch_size=256,
        remat="full",
        total_steps=50_000,
        memory={"parameters": 2.0 * GIB, "moments": 4.0 * GIB, "EMA": 0.0, "frozen": 1.0 * GIB},
        needed=7.0 * GIB,
        capacity=15.75 * GIB,
        model_flops={"vlm/decoder": 1e15, "autoencoder": 1e15, "dit": 3e15, "total": 5e15},
        rows={"generated images": 768, "VLM tokens": 524288},
        peak=197e12,
        seconds=0.5,
        cycles=6e8,
        transfers=[Transfer("all-gather", "fsdp", 48, 3.0 * GIB, 0.05, 0.01)],
        temporaries=[Large(1.5 * GIB, "f32[1,24,128,13312]", "mmcore_jax/nn/attention.py:38")],
    )
    return dataclasses.replace(made, **changes)


def out_of_memory(message: str, **changes) -> Outcome:
    made = outcome(seconds=None, transfers=[], temporaries=[], **changes)
    outcome_lib._out_of_memory(made, message)
    return made


TEMPORARIES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (259.00G) exceeds "
    "available HBM (15.75G)."
)
USED = (pathlib.Path(__file__).parent / "modules/out_of_memory.txt").read_text()


def test_what_a_report_says():
    text = report(outcome())
    flat = " ".join(text.split())
    for words in ("left 8.750", "all-gather fsdp 48", "MFU 19.8%", "50,000 steps 0.3 days", "attention.py:38 f32"):
        assert words in flat
    assert "OUT OF MEMORY" not in text
    assert Outcome.from_dict(json.loads(json.dumps(dataclasses.asdict(outcome())))) == outcome()
    record = json.loads(json.dumps(outcome().record()))
    assert record["days"] == pytest.approx(50_000 * 0.5 / 86400)
    assert record["chip_hours"] == pytest.approx(24 * 256 * record["days"])


def test_out_of_memory_says_by_how_much():
    made = out_of_memory(USED)
    assert not made.fits
    assert made.needed == pytest.approx(20.5 * GIB)
    assert made.memory["activations, temporaries"] == pytest.approx(13.5 * GIB)
    assert made.temporaries == [Large(6.0 * GIB, "f32[24,128,13312]", "mmcore_jax/nn/attention.py:38")]
    assert "OUT OF MEMORY by 4.750" in " ".join(report(made).split())
    assert out_of_memory(TEMPORARIES).needed == pytest.approx((7 + 259) * GIB)
    barely = USED.replace("Used 20.50G of 15.75G hbm", "Used 15.75G of 15.75G hbm")
    assert barely != USED
    assert not out_of_memory(barely).fits


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: E1001: Ran out of memory in memory space vmem. Used 40.00M of 32.00M vmem.",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack\n and more",
    ],
)
def test_a_kernel_that_does_not_fit_on_a_core_is_no_step_that_fits(message):
    with pytest.raises(UserError, match=r"does not compile.*vmem") as error:
        out_of_memory(message)
    assert "and more" not in str(error.value)


def test_what_to_change_to_fit():
    config = config_lib.load(FULL, ["--config.batch_size=1024", "--config.execution.remat=dots"])
    changes = outcome_lib.advice(config, out_of_memory(USED, batch_size=1024))
    for number, words in enumerate(("remat=full", "accumulation=4", "('latents',)\"", "mesh.data smaller")):
        assert words in changes[number]
    assert shlex.split(changes[2].partition(": ")[0]) == ["--config.data.features=('latents',)"]
    conditioned = config_lib.load(FULL, ["--config.data.features=('conditioning',)"])
    told = outcome_lib.advice(conditioned, out_of_memory(USED), slices=4)
    assert any("('conditioning', 'latents')" in change for change in told)
    assert not any("mesh.data" in change for change in told)  # one copy a slice is the least
    assert outcome_lib.advice(config, outcome()) == []
    one_row = outcome_lib.advice(config_lib.load(FULL, ["--config.execution.remat=full"]), out_of_memory(USED))
    assert not any("remat" in change or "accumulation" in change for change in one_row)
    assert any("mesh.context=2" in change for change in one_row)


def test_a_search_ranks_by_speed_and_puts_what_does_not_fit_last():
    slow, fast = outcome(seconds=1.0, remat="full"), outcome(seconds=0.8, remat="none")
    twice = outcome(seconds=1.5, batch_size=512, remat="dots")
    lines = ranking([out_of_memory(USED), slow, fast, twice], [("mesh x", "died")]).splitlines()
    found = [next(word for word in ("4.75", "dots", "none", "full") if word in line) for line in lines[1:5]]
    assert found == ["dots", "none", "full", "4.75"]
    assert "died" in lines[5]


def test_candidates_use_all_chips_and_cover_the_choices():
    config = config_lib.load(FULL)
    found = list(candidates(config, 256, 1))
    assert {(mesh.data, mesh.fsdp, mesh.tensor) for mesh, _, _ in found} >= {(1, 256, 1), (4, 64, 1), (16, 8, 2)}
    for mesh, remat, rows in found:
        changed = with_candidate(config, mesh, remat, rows)
        assert mesh.data * mesh.fsdp * mesh.context * mesh.tensor == 256
        assert changed.batch_size == rows * mesh.data * mesh.fsdp
        assert changed.execution.remat == remat
    assert all(mesh.data % 2 == 0 for mesh, _, _ in candidates(config, 512, 2))
    assert device_count(config, "v5p:4x4x8", 2) == 256


def test_what_cannot_be_smaller_is_not_tried():
    mesh, other = Mesh(1, 256, 1, 1), Mesh(4, 64, 1, 1)
    assert not_smaller((mesh, "none", 4), (mesh, "full", 2))
    assert not not_smaller((mesh, "full", 1), (mesh, "full", 2))
    assert not not_smaller((mesh, "full", 4), (mesh, "dots", 2))
    assert not not_smaller((other, "none", 4), (mesh, "full", 2))
