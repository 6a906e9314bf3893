"""The runs that comparisons need, each an ordinary workdir of `train`; a stage that a variant leaves alone is shared.

`ROOT/seed0/stage1-lora` is a run; the stage 0 that it needs is that of `control`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from mmcore_jax import config as config_lib
from mmcore_jax.ablation.table import CONTROL, STAGES, VARIANTS, Comparison
from mmcore_jax.config import Config, TryAgain, UserError
from mmcore_jax.writing import write_text

SECONDS_FILE = "seconds.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to be made. `judged`: its scores are wanted too."""

    variant: str
    stage: str
    config: Config
    workdir: pathlib.Path
    needs: tuple["Job", ...]
    judged: bool = False

    @property
    def name(self) -> str:
        return f"{self.workdir.parent.name}/{self.workdir.name}"

    @property
    def fingerprint(self) -> str:
        """Stands for the settings, wherever the runs lie that it begins from, which have fingerprints of their own.

        A setting that came later, and has its default, changes nothing.
        """
        init = {part: pathlib.Path(source).name for part, source in sorted(self.config.init.items())}
        settings = json.dumps(_departures(_comparable(self.config)) | {"init": init})
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    @property
    def is_trained(self) -> bool:
        return (self.workdir / "checkpoints" / str(self.config.total_steps)).is_dir()

    @property
    def is_done(self) -> bool:
        return self.is_trained and (not self.judged or self.scores.is_file())

    @property
    def scores(self) -> pathlib.Path:
        return self.workdir / "evaluation/scores.json"


class Family:
    """The runs of all variants and seeds, from a file whose recipes are the stages."""

    def __init__(self, file: str, root: pathlib.Path, overrides: dict[str, list[str]]) -> None:
        """`overrides` are those of each stage, for all of its variants, as `config.load` takes them."""
        self._file, self._root, self._overrides = file, root, overrides
        self.job = functools.cache(self._job)

    def _job(self, variant: str, stage: str, seed: int) -> Job:
        """The run that serves a variant at a stage: its own, or the control's where it has not departed yet."""
        changes = VARIANTS[variant].changes.get(stage, {})
        overrides = [*self._overrides.get(stage, []), *(f"--config.{key}={value!r}" for key, value in changes.items())]
        config = config_lib.load(f"{self._file}:{stage}", [*overrides, f"--config.seed={seed}"])
        before = {source: self.job(variant, source, seed) for source in config.init.values() if source in STAGES}
        if variant != CONTROL and not changes and all(job.variant == CONTROL for job in before.values()):
            return self.job(CONTROL, stage, seed)
        init = {
            part: str(before[source].workdir) if source in before else source for part, source in config.init.items()
        }
        workdir = self._root / f"seed{seed}" / f"{stage}-{variant}"
        return Job(variant, stage, dataclasses.replace(config, init=init), workdir, tuple(before.values()))

    def jobs(self, comparisons: Sequence[Comparison], seeds: Sequence[int]) -> list[Job]:
        """What to run, in an order in which each finds what it needs; a seed is done before the next one begins."""
        ordered: dict[pathlib.Path, Job] = {}

        def add(job: Job, judged: bool) -> None:
            for needed in job.needs:
                add(needed, False)
            judged |= job.workdir in ordered and ordered[job.workdir].judged
            ordered[job.workdir] = dataclasses.replace(job, judged=judged)

        for seed in seeds:
            for one in comparisons:
                for variant in one.sides[::-1]:
                    add(self.job(variant, one.stage, seed), True)
        return list(ordered.values())


def check(jobs: Sequence[Job], cases: int) -> None:
    """Raises `UserError` where a run was made with other settings than are asked for, or scored on other `cases`."""
    for job in jobs:
        if (there := read_cases(job)) not in (None, cases):
            raise UserError(f"{job.workdir} was scored with --cases={there}: give the same, or delete its evaluation.")
        path = job.workdir / "config.json"
        if path.is_file() and (changed := _different(config_lib.from_json(path), job.config)):
            raise UserError(
                f"{job.workdir} was made with another config.{changed}: choose another --workdir, or delete it."
            )


def read_cases(job: Job) -> int | None:
    """On how many cases of each set a run was scored, if it was."""
    return json.loads(job.scores.read_text())["settings"]["cases"] if job.scores.is_file() else None


def _different(there: Config, ours: Config) -> str | None:
    """The first part of two configs that differs, apart from how batches are prepared."""
    ours, there = vars(_comparable(ours)), vars(_comparable(there))
    return next((name for name in ours if there[name] != ours[name]), None)


def _departures(settings: Any) -> Any:
    """Settings as JSON values, without those that have their default."""
    if dataclasses.is_dataclass(settings):
        values = {field: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        return {field.name: _departures(value) for field, value in values.items() if value != field.default}
    if isinstance(settings, dict):
        return {name: _departures(value) for name, value in settings.items()}
    return [_departures(value) for value in settings] if isinstance(settings, tuple) else settings


def _comparable(config: Config) -> Config:
    data = dataclasses.replace(config.data, index="", workers=0, threads=1)
    init = {part: source if source == "random" else os.path.abspath(source) for part, source in config.init.items()}
    return dataclasses.replace(config, data=data, init=init)


# --- Running ----------------------------------------------------------------------------------------------------------


class Doors(NamedTuple):
    """What `train` and `evaluate` do for a job."""

    train: Callable[[Job], None]
    evaluate: Callable[[Job], None]


def run(
    jobs: Sequence[Job], root: pathlib.Path, doors: Doors, minutes: float | None, known: Collection[str] = ()
) -> dict[str, UserError]:
    """Makes what is not there, until the time is over or the process is told to stop, and returns what failed, by name.

    Runs that another machine has made, `known` by name, are made again only where a run to be made begins from them.
    What trains when the time is over saves itself first, and continues at the next call.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    begin, todo, failed = time.monotonic(), wanted(jobs, known), {}
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are done.", flush=True)
    for number, job in enumerate(todo):
        if end is not None and time.monotonic() >= end:
            break
        if any(needed.name in failed for needed in job.needs):
            failed[job.name] = UserError("it begins from a run that failed.")
            continue
        passed = (time.monotonic() - begin) / 60
        print(f"\n[{number + 1} of {len(todo)}, {passed:.1f} min] {job.name}", flush=True)
        try:
            with _counted(root, job):
                if not job.is_trained:
                    with _stopping_at(end):
                        doors.train(job)
                    if not job.is_trained:
                        break
                if job.judged:
                    doors.evaluate(job)
        except TryAgain:
            raise
        except UserError as error:
            print(f"{job.name} failed: {error}", flush=True)
            failed[job.name] = error
    return failed


def wanted(jobs: Sequence[Job], known: Collection[str]) -> list[Job]:
    """Those that are neither done nor `known`, and, of those that they begin from, the ones that are not done."""
    names: set[str] = set()

    def add(job: Job) -> None:
        names.add(job.name)
        for needed in job.needs:
            if not needed.is_trained:
                add(needed)

    for job in jobs:
        if not job.is_done and job.name not in known:
            add(job)
    return [dataclasses.replace(job, judged=job.judged and job.name not in known) for job in jobs if job.name in names]


@contextlib.contextmanager
def _stopping_at(end: float | None) -> Iterator[None]:
    """Sends this process SIGTERM, which a training run saves itself at, when the time is over."""
    handler = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0 if end is None else end - time.monotonic(), os.kill, (os.getpid(), signal.SIGTERM))
    if end is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _counted(root: pathlib.Path, job: Job) -> Iterator[None]:
    """Adds the time that passes to what a job has taken so far."""
    begin = time.monotonic()
    try:
        yield
    finally:
        taken = seconds(root)
        taken[job.name] = round(taken.get(job.name, 0.0) + time.monotonic() - begin, 1)
        write_json(root / SECONDS_FILE, taken)


def seconds(root: pathlib.Path) -> dict[str, float]:
    """How long each run and its evaluation have taken."""
    path = root / SECONDS_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a file whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")
