"""How the runs are made: what is there is kept, time is kept, and a report is written from whatever there is."""

import dataclasses
import json
import pathlib
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

from mmcore_jax import ablate
from mmcore_jax.ablation import jobs as jobs_lib
from mmcore_jax.ablation import report
from mmcore_jax.ablation.jobs import Doors, Family
from mmcore_jax.ablation.table import COSINE, IN_FAMILY, choose
from mmcore_jax.config import UserError
from tests import tiny

FILE = str(tiny.REPOSITORY / "configs/ablation.py")
COMPARED = ["lora", "frozen_2"]
CASES = 60
NAMES = ["stage0-control", "language-control", "stage1-frozen_2", "stage1-lora", "stage1-control"]


class Fakes:
    """Trains and evaluates in no time. A value is 0.1 a seed and 1 a letter of the variant's name."""

    def __init__(self, broken: str = "", failing: str = "") -> None:
        self.trained, self.evaluated, self._broken, self._failing = [], [], broken, failing
        self.doors = Doors(self._train, self._evaluate)

    def _train(self, job):
        self.trained.append(job.name)
        if job.name == self._broken:
            return
        if job.name == self._failing:
            raise UserError("too many bad steps.")
        job.workdir.mkdir(parents=True, exist_ok=True)
        (job.workdir / "config.json").write_text(job.config.to_json())
        (job.workdir / "checkpoints" / str(job.config.total_steps)).mkdir(parents=True)
        flow = {f"gauge/edit_tone/flow/drop_nothing/t_{low}_{low + 0.1}": low for low in (0.0, 0.9)}
        records = [{"step": step, "gauge/text_to_image/cosine": step / 300, **flow} for step in (0, 150, 300)]
        (job.workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def _evaluate(self, job):
        self.evaluated.append(job.name)
        value = len(job.variant) + 0.1 * job.config.seed
        score = {"value": value, "low": 0.0, "high": 1.0, "n": 1}
        scores = {"held_out": {"predicted/cosine": score}}
        (job.workdir / "evaluation").mkdir()
        job.scores.write_text(json.dumps({"settings": {"cases": CASES}, "alignment": scores}))


def plan(root, seeds=(0,), overrides=None):
    family = Family(FILE, root, overrides or {})
    return family, family.jobs(choose(COMPARED), seeds)


def test_what_is_done_is_known_again(tmp_path, capsys):
    _, jobs = plan(tmp_path)
    stopped, fakes = Fakes(broken="seed0/stage1-lora"), Fakes()
    assert jobs_lib.run(jobs, tmp_path, stopped.doors, None) == {}
    assert [job.workdir.name for job in jobs if not job.is_done] == NAMES[3:]
    assert stopped.trained == [f"seed0/{name}" for name in NAMES[:4]]
    assert stopped.evaluated == ["seed0/stage1-frozen_2"]
    assert jobs_lib.run(jobs, tmp_path, fakes.doors, None) == {}
    assert all(job.is_done for job in jobs)
    assert fakes.trained == fakes.evaluated == [f"seed0/{name}" for name in NAMES[3:]]
    assert "3 of 5 runs are done" in capsys.readouterr().out
    assert set(jobs_lib.seconds(tmp_path)) == {f"seed0/{name}" for name in NAMES}


def test_an_evaluation_that_is_missing_is_made_alone(tmp_path):
    _, jobs = plan(tmp_path)
    jobs_lib.run(jobs, tmp_path, Fakes().doors, None)
    (jobs[-1].workdir / "evaluation/scores.json").unlink()
    (jobs[-1].workdir / "evaluation").rmdir()
    fakes = Fakes()
    assert jobs_lib.run(jobs, tmp_path, fakes.doors, None) == {}
    assert (fakes.trained, fakes.evaluated) == ([], ["seed0/stage1-control"])


def test_when_the_time_is_over_what_trains_is_told(tmp_path):
    """As `train` does: it notes SIGTERM, saves and returns."""
    _, jobs = plan(tmp_path)
    told, before = [], signal.getsignal(signal.SIGTERM)

    def train(job):
        signal.signal(signal.SIGTERM, lambda *_: told.append(job.name))
        end = time.monotonic() + 10
        while not told and time.monotonic() < end:
            time.sleep(0.01)

    assert jobs_lib.run(jobs, tmp_path, Doors(train, None), 0.2 / 60) == {}
    assert told == ["seed0/stage0-control"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert jobs_lib.run(jobs, tmp_path, Doors(None, None), 0.0) == {}
    assert not any(job.is_done for job in jobs)


def test_what_fails_stops_nothing_but_what_begins_from_it(tmp_path, capsys):
    _, jobs = plan(tmp_path)
    fakes = Fakes(failing="seed0/stage1-frozen_2")
    assert [*jobs_lib.run(jobs, tmp_path, fakes.doors, None)] == ["seed0/stage1-frozen_2"]
    assert fakes.evaluated == ["seed0/stage1-lora", "seed0/stage1-control"]
    assert "seed0/stage1-frozen_2 failed: too many bad steps." in capsys.readouterr().out
    assert "seed0/stage1-frozen_2" in jobs_lib.seconds(tmp_path)
    _, jobs = plan(tmp_path / "another")
    (tmp_path / "another").mkdir()
    failed = jobs_lib.run(jobs, tmp_path / "another", Fakes(failing="seed0/language-control").doors, None)
    assert [*failed] == [f"seed0/{name}" for name in NAMES[1:]]
    assert "begins from a run that failed" in str(failed["seed0/stage1-lora"])


def test_what_is_known_from_elsewhere_is_made_only_to_begin_from(tmp_path):
    _, jobs = plan(tmp_path)
    known = {f"seed0/{name}" for name in NAMES} - {"seed0/stage1-lora"}
    fakes = Fakes()
    jobs_lib.run(jobs, tmp_path, fakes.doors, None, known)
    assert fakes.trained == [f"seed0/{name}" for name in ("stage0-control", "language-control", "stage1-lora")]
    assert fakes.evaluated == ["seed0/stage1-lora"]


def test_other_settings_are_another_ablation(tmp_path):
    jobs_lib.run(plan(tmp_path)[1], tmp_path, Fakes().doors, None)
    jobs_lib.check(plan(tmp_path, overrides={"stage1": ["--config.data.threads=1"]})[1], CASES)
    with pytest.raises(UserError, match=r"stage1-frozen_2 was made with another config.total_steps"):
        jobs_lib.check(plan(tmp_path, overrides={"stage1": ["--config.total_steps=5"]})[1], CASES)
    with pytest.raises(UserError, match=r"stage1-frozen_2 was scored with --cases=60: give the same"):
        jobs_lib.check(plan(tmp_path)[1], 200)


def test_what_a_run_begins_from_is_a_setting(tmp_path):
    names = {}
    for source in ("language", "random"):
        family, _ = plan(tmp_path, overrides={"stage1": [f"--config.init.vlm={source}"]})
        names[source] = family.job("control", "stage1", 0).fingerprint
    elsewhere, _ = plan(tmp_path / "elsewhere")
    assert names["language"] == elsewhere.job("control", "stage1", 0).fingerprint != names["random"]


# --- Report -----------------------------------------------------------------------------------------------------------


def write(root, seeds, also=()):
    family, comparisons = plan(root, seeds)[0], choose(COMPARED)
    others = report.read_others(also, family, comparisons, CASES)
    return report.write(root, report.Results(root, family, comparisons, seeds, others)).read_text()


def test_report(tmp_path):
    """frozen_2 is 8, lora 4 and control 7 letters long, the same in both seeds but for their 0.1."""
    jobs_lib.run(plan(tmp_path, [0, 1])[1], tmp_path, Fakes().doors, None)
    text = write(tmp_path, [0, 1])
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| tuning of the VLM |")]
    assert [row[1] for row in rows] == ["lora against frozen_2", "control against lora", "control against frozen_2"]
    assert rows[0][3:5] == ["4.050", "8.050"]
    assert "| stage1-frozen_2 | 8.050 |" in text
    assert [row[5].split()[0] for row in rows] == ["-4.000", "3.000", "-1.000"]
    assert [row[-1] for row in rows] == ["contradicts |", "agrees |", "contradicts |"]
    assert [row[6] for row in rows] == ["2"] * 3
    assert "Not done yet" not in text
    assert COSINE.label in text
    for name in ("differences.png", "tuning_of_the_VLM.png"):
        assert f"]({name})" in text
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 5


def test_a_report_of_a_part(tmp_path):
    """One seed resolves nothing; of what is not done nothing is said."""
    assert "No two runs can be compared yet" in write(tmp_path, [0])
    jobs_lib.run(plan(tmp_path)[1], tmp_path, Fakes(broken="seed0/stage1-control").doors, None)
    text = write(tmp_path, [0, 1])
    assert "Not done yet: seed0/stage1-control, seed1/stage0-control" in text
    assert (
        "control against" not in text.partition("## Tuning")[0].partition("## Summary")[2].partition("A difference")[0]
    )
    assert "| -4.000 | 1 | better (section 4.3) | not resolved |" in text
    assert "inf" not in text
    assert IN_FAMILY.label in text


def test_seeds_of_two_machines_are_one_report(tmp_path):
    """But for the plots, which are no text."""
    here, there, both = (tmp_path / name for name in ("here", "there", "both"))
    for root, seeds in ((here, [0]), (there, [1]), (both, [0, 1])):
        root.mkdir()
        jobs_lib.run(plan(root, seeds)[1], root, Fakes().doors, None)
        write(root, seeds)
    merged = write(here, [0], [there / report.RESULTS_FILE])
    assert merged == (both / "report.md").read_text()
    assert json.loads((here / report.RESULTS_FILE).read_text()).keys() == {
        f"seed{seed}/{name}" for seed in (0, 1) for name in NAMES
    }


def test_what_is_made_again_to_begin_from_keeps_its_scores(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for root in (here, there):
        root.mkdir()
    jobs_lib.run(plan(there)[1], there, Fakes().doors, None)
    write(there, [0])
    known = report.read_others([there / report.RESULTS_FILE], plan(here)[0], choose(COMPARED), CASES)
    unscored = [dataclasses.replace(job, judged=False) for job in plan(here)[1]]
    jobs_lib.run(unscored, here, Fakes().doors, None)
    family = plan(here)[0]
    as_they_are = family.jobs
    family.jobs = lambda *given: [dataclasses.replace(job, judged=False) for job in as_they_are(*given)]
    results = report.Results(here, family, choose(COMPARED), [0], known)
    assert results.value("lora", "stage1", 0, COSINE) == 4.0


def test_results_with_other_settings_are_refused(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for root, overrides in ((here, {}), (there, {"stage1": ["--config.total_steps=5"]})):
        root.mkdir()
        family, jobs = plan(root, [1], overrides)
        jobs_lib.run(jobs, root, Fakes().doors, None)
        report.write(root, report.Results(root, family, choose(COMPARED), [1], {}))
    with pytest.raises(UserError, match=r"results.json: seed1/stage1-frozen_2 was made with other settings"):
        write(tmp_path, [0], [there / report.RESULTS_FILE])
    (there / "another.json").write_text('{"settings": {}}')
    for name in ("report.md", "another.json"):
        with pytest.raises(UserError, match=rf"{name} is not the results.json of an ablation"):
            write(tmp_path, [0], [there / name])
    text = (there / report.RESULTS_FILE).read_text()
    (there / "more.json").write_text(text.replace('"total_steps": 5', "").replace(f'"cases": {CASES}', '"cases": 200'))
    with pytest.raises(UserError, match=r"more.json: seed1/stage1-.* was scored with --cases=200"):
        report.read_others([there / "more.json"], family, choose(COMPARED), CASES)


def test_a_smaller_report_forgets_nothing(tmp_path):
    _, jobs = plan(tmp_path, [0, 1])
    jobs_lib.run(jobs, tmp_path, Fakes().doors, None)
    write(tmp_path, [0, 1])
    file = tmp_path / report.RESULTS_FILE
    before = json.loads(file.read_text())
    family, comparisons = plan(tmp_path)[0], choose(["frozen_2"])
    others = report.read_others([file], family, comparisons, CASES)
    report.write(tmp_path, report.Results(tmp_path, family, comparisons, [0], others))
    assert json.loads(file.read_text()) == before


def test_losses_by_timestep_are_averaged_where_they_are_trained():
    lows = {0.0: 30.0, 0.2: 5.0, 0.3: 1.0, 0.9: 2.0}
    record = {"step": 1, "loss": 2.0, "gauge/a/cosine": None}
    record |= {f"gauge/a/flow/drop_text/t_{low}_{low + 0.1:.1f}": value for low, value in lows.items()}
    values = report.gauge_values(record)
    assert values["gauge/a/flow/drop_text"] == 1.5
    assert len(values) == len(lows) + 1


# --- The door ---------------------------------------------------------------------------------------------------------


def enter(monkeypatch, capsys, *arguments):
    monkeypatch.chdir(tiny.REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["ablate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        ablate.main()
    return stopped.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--variants=lara", "there is no variant 'lara'; there are control, frozen_2"),
        ("--stage3.total_steps=1", "settings of a stage are written --STAGE.KEY=VALUE"),
        ("--stage1.total_step=1", "unknown key config.total_step in an override of configs/ablation.py"),
        ("--config=configs/stage1.py", "configs/stage1.py has no recipe 'stage2'"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, argument, message):
    code, output = enter(monkeypatch, capsys, f"--workdir={tmp_path / 'runs'}", argument)
    assert code == 2
    assert message in output.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.whole_runs
def test_a_stage_through_the_door(tmp_path, monkeypatch, capsys):
    """One that `train` really takes: a VLM that only reads, with queries that wait; the rest is left for later."""
    data = tiny.write_dataset(tmp_path / "data")
    absent = ("vision_target", "compose", "edit_gender", "recolour")
    given = [each for each in tiny.overrides("stage1", data) if not any(name in each for name in absent)]
    given = [f"--language.{override.removeprefix('--config.')}" for override in given]
    shards = data / "edit_tone-train-*.array_record"
    given += [f"--language.data.sources.sequence_tone.shards={shards}", "--language.total_steps=2"]

    def train(job):
        if job.stage == "language":
            ablate.training.train(job.config, job.workdir)
        elif job.stage == "stage0":
            Fakes().doors.train(job)

    monkeypatch.setattr(ablate, "doors", lambda data, cases: Doors(train, None))
    handler = signal.getsignal(signal.SIGTERM)
    code, output = enter(monkeypatch, capsys, f"--workdir={tmp_path / 'runs'}", "--variants=lora", *given)
    assert code == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "2 of 4 runs are in it" in output.out
    assert output.out.splitlines()[-2:] == ["left: seed0/stage1-lora", "left: seed0/stage1-control"]
    assert pathlib.Path(tmp_path / "runs/report.md").is_file()
