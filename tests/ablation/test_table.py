"""The tables and the shipped stages fit each other; what a variant leaves alone is the control's."""

import pathlib

import pytest

from mmcore_jax.ablation.jobs import Family
from mmcore_jax.ablation.table import COMPARISONS, CONTROL, STAGES, VARIANTS, choose
from mmcore_jax.config import UserError
from tests import tiny

ROOT = pathlib.Path("runs")


@pytest.fixture(scope="module")
def family():
    return Family(str(tiny.REPOSITORY / "configs/ablation.py"), ROOT, {})


def test_every_variant_can_be_configured(family):
    """Each is a run of its own at the stage that it is compared at, made of runs that come before it."""
    seen = set()
    for one in COMPARISONS:
        for variant in one.sides:
            job = family.job(variant, one.stage, 0)
            assert job.variant == variant, f"{variant} changes nothing up to {one.stage}"
            assert job.config.seed == 0
            for source in job.config.init.values():
                assert source == "random" or pathlib.Path(source) in {needed.workdir for needed in job.needs}
            seen.add(variant)
    assert seen == set(VARIANTS)


def test_a_variant_departs_where_it_changes_something(family):
    lora, control = (family.job(variant, "stage2", 1) for variant in ("lora", CONTROL))
    assert lora.workdir == ROOT / "seed1/stage2-lora"
    assert lora.config.init["vlm"] == str(ROOT / "seed1/stage1-lora")
    assert family.job("lora", "stage0", 1) is family.job(CONTROL, "stage0", 1)
    assert family.job("queries_only", "stage1", 1) is family.job(CONTROL, "stage1", 1)
    assert control.config.init["vlm"] == str(ROOT / "seed1/stage1-control")
    unaligned = family.job("no_alignment", "stage2", 1)
    assert [job.name for job in unaligned.needs] == ["seed1/language-control"]


def test_jobs_come_after_what_they_need_and_once(family):
    jobs = family.jobs(COMPARISONS, [0, 1])
    for number, job in enumerate(jobs):
        assert {needed.workdir for needed in job.needs} <= {earlier.workdir for earlier in jobs[:number]}
    assert len({job.workdir for job in jobs}) == len(jobs)
    judged = {job.workdir for job in jobs if job.judged}
    assert judged == {
        family.job(side, one.stage, seed).workdir for one in COMPARISONS for side in one.sides for seed in (0, 1)
    }
    assert [job.workdir.parent.name for job in jobs] == sorted(job.workdir.parent.name for job in jobs)
    assert {job.stage for job in jobs} == set(STAGES)


def test_choosing():
    assert choose(None) == list(COMPARISONS)
    assert [one.variant for one in choose(["lora", "frozen_2"])] == ["lora", CONTROL, CONTROL]
    with pytest.raises(UserError, match="no variant 'lara'"):
        choose(["lara"])
    with pytest.raises(UserError, match="frozen_3 is compared with frozen_2 alone"):
        choose(["frozen_3"])
