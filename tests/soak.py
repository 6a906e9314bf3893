"""Trains a stage again and again under random faults, and compares each run with one that was left alone.

    python -m tests.soak --minutes 10 [--processes 2] [--stage stage2] [--seed 0]
    python -m tests.soak --minutes 0 --data data/openmoji --steps 600 --faults 100

Tiny stages; with `--data`, the default recipe as it is, from random weights.
A fault is a process that is killed, all of them, SIGTERM to one, a disk that is full while it trains, or a newest
checkpoint that is damaged. The run is started again after each, and must end with the very losses, data and parameters.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from mmcore_jax import config as config_lib
from mmcore_jax.training.telemetry import read_metrics
from tests import tiny

PATIENCE = 120  # seconds that a process may take to end after a fault that it has to notice by itself


class Run:
    """A run in a directory, started as often as it takes."""

    def __init__(self, directory: pathlib.Path, stage: str, settings: list[str], steps: int, count: int) -> None:
        self.directory, self.steps, self._count = directory, steps, count
        every = {"checkpoint.every": max(10, steps // 15), "checkpoint.local_every": max(4, steps // 40)}
        every |= {"checkpoint.keep": 3, "checkpoint.local": f"{directory}-local", "total_steps": steps}
        given = [*settings, *tiny.flags(every)]
        self._command = tiny.command("train", f"--config=configs/{stage}.py", f"--workdir={directory}", *given)

    def start(self) -> None:
        self.processes = tiny.start(self._command, self._count, 1, self.directory)

    def wait(self, patience: float | None = None) -> list[int]:
        """Exit codes. Of several, those that hang on one that is gone are killed after a while, as by a launcher."""
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(patience))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
        return codes

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def wait_for(self, step: int) -> None:
        while self.running() and (not (records := read_metrics(self.directory)) or records[-1]["step"] < step):
            time.sleep(0.01)

    @property
    def step(self) -> int:
        records = read_metrics(self.directory)
        return records[-1]["step"] if records else 0

    def checkpoints(self) -> list[pathlib.Path]:
        """The newest first."""
        found = [*self.directory.glob("checkpoints/*"), *pathlib.Path(f"{self.directory}-local").glob("*/*of*/*")]
        return sorted((path for path in found if path.name.isdigit()), key=lambda path: -int(path.name))

    def outcome(self) -> dict:
        """All that is a function of the run alone."""
        record = json.loads(next(self.directory.glob(f"checkpoints/{self.steps}/record/*")).read_text())
        del record["data"]["useful_seconds"]
        return {
            "metrics": tiny.logged(self.directory),
            "parameters": record["fingerprints"],
            "data": record["data"],
        }

    def output(self) -> str:
        return "\n".join(pathlib.Path(f"{self.directory}.{i}").read_text()[-3000:] for i in range(self._count))


def kill_all(run: Run, chance: random.Random) -> None:
    for process in run.processes:
        process.kill()


def kill_one(run: Run, chance: random.Random) -> None:
    chance.choice(run.processes).kill()


def terminate_one(run: Run, chance: random.Random) -> None:
    chance.choice(run.processes).send_signal(signal.SIGTERM)


def fill_disk(run: Run, chance: random.Random) -> None:
    """Files can grow to some ten thousand bytes: writing a checkpoint fails as it does on a full disk.

    So does the log, which is why the exit code is often 1 and not 2: there is no room for the sentence.
    """
    for process in run.processes:
        if process.poll() is None:
            resource.prlimit(
                process.pid, resource.RLIMIT_FSIZE, (chance.randrange(16_000, 64_000), resource.RLIM_INFINITY)
            )


def damage(run: Run, chance: random.Random) -> None:
    """Kills all; then the newest checkpoint turns out to be broken, or half of it lost."""
    kill_all(run, chance)
    run.wait()
    newest, *others = run.checkpoints() or [None]
    if not others or others[0].name == newest.name:
        return
    files = [path for path in newest.rglob("*") if path.is_file()]
    for path in chance.sample(files, max(1, len(files) // 2)):
        if chance.random() < 0.5:
            path.unlink()
        else:
            os.truncate(path, chance.randrange(path.stat().st_size + 1))


FAULTS = {
    "all killed": kill_all,
    "one killed": kill_one,
    "SIGTERM": terminate_one,
    "full disk": fill_disk,
    "damage": damage,
}


def torture(run: Run, chance: random.Random, faults: int, counts: collections.Counter) -> None:
    """Starts the run under a fault each time, evenly over its steps, and at last lets it end."""
    for number in range(faults):
        run.start()
        name = chance.choice(list(FAULTS))
        if chance.random() < 0.2:  # while it starts
            time.sleep(chance.random() * 8)
        else:
            step = run.steps * (number + chance.random()) / faults
            run.wait_for(min(max(run.step + 1, int(step)), run.steps - 5))
            time.sleep(chance.random() * 0.1)
        if not run.running():
            break
        FAULTS[name](run, chance)
        codes = run.wait(PATIENCE)
        counts[name] += 1
        print(f"{name} at step {run.step}: exit codes {codes}", flush=True)
    run.start()
    if any(run.wait()):
        raise SystemExit(f"a run does not go on:\n{run.output()}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--stage", default="stage2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=pathlib.Path, help="the prepared dataset: train the default recipe")
    parser.add_argument("--steps", type=int, default=40, help="of a run (default: %(default)s)")
    parser.add_argument("--faults", type=int, help="of a run (default: 3 to 8)")
    arguments = parser.parse_args()
    chance, counts = random.Random(arguments.seed), collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{directory}/programs")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        stage, steps, count = arguments.stage, arguments.steps, arguments.processes
        file = str(tiny.REPOSITORY / f"configs/{stage}.py")
        if arguments.data:
            logged = {"telemetry.log_every": 1, "telemetry.sample_every": 0}
            settings = tiny.flags(tiny.elsewhere(file, arguments.data.absolute()) | logged)
        else:
            settings = tiny.overrides(stage, tiny.write_dataset(directory / "data"))
        settings += [f"--config.init.{part}=random" for part in config_lib.load(file).init]
        alone = Run(directory / "alone", stage, settings, steps, count)
        alone.start()
        if any(alone.wait()):
            raise SystemExit(alone.output())
        expected, runs, deadline = alone.outcome(), 0, time.monotonic() + 60 * arguments.minutes
        while runs == 0 or time.monotonic() < deadline:
            run = Run(directory / f"run_{runs}", stage, settings, steps, count)
            torture(run, chance, arguments.faults or chance.randrange(3, 9), counts)
            found = run.outcome()
            for what, value in expected.items():
                if found[what] != value:
                    raise SystemExit(f"run {runs} of seed {arguments.seed} ended with other {what}:\n{run.output()}")
            runs += 1
            print(f"{runs} runs are equal to the one left alone; faults: {dict(counts)}", flush=True)
            for path in (run.directory, pathlib.Path(f"{run.directory}-local")):
                shutil.rmtree(path, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
