"""Trains a stage.

    python -m mmcore_jax.train --config=configs/stage2.py [--workdir=DIR] [--config.KEY=VALUE ...]

A run that was stopped continues where it stood. The workdir is `runs/STAGE-RECIPE` unless given.
"""

import argparse
import collections
import contextlib
import dataclasses
import gc
import itertools
import pathlib
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mmcore_jax import config as config_lib
from mmcore_jax import processes, sharding
from mmcore_jax.config import Config, UserError, door
from mmcore_jax.data import image, packing
from mmcore_jax.data.example import Example
from mmcore_jax.data.pipeline import Batch, Batches, Ledger, check_contents
from mmcore_jax.data.plan import Position
from mmcore_jax.data.reader import check_there
from mmcore_jax.data.text import keep_tokenizer
from mmcore_jax.evaluation.sheet import Cell, sheet
from mmcore_jax.generate import Generator
from mmcore_jax.mmcore import MMCORE, Params
from mmcore_jax.objectives import alignment
from mmcore_jax.progress import progress
from mmcore_jax.training import bad_steps
from mmcore_jax.training.checkpoint import RUN_FILE, Checkpoints, has_saved
from mmcore_jax.training.compilation import compiled_step, keep_programs
from mmcore_jax.training.flops import peak_flops, step_flops
from mmcore_jax.training.gauges import Gauges
from mmcore_jax.training.goodput import Goodput
from mmcore_jax.training.precompute import precompute
from mmcore_jax.training.state import Constants, abstract_state, create_state, freeze, join, make_plan
from mmcore_jax.training.step import Metrics, make_encode, make_step
from mmcore_jax.training.telemetry import Silence, Telemetry
from mmcore_jax.training.watchdog import watching
from mmcore_jax.training.weights import check_sources, inherited_statistics, initial_params
from mmcore_jax.writing import write_text

# A step's metrics are read when this many later steps have been dispatched: the device never waits for the host.
LAG = 2


@door
def main(argv: Sequence[str]) -> int:
    """Reads the command line, then trains."""
    parser = argparse.ArgumentParser(prog="python -m mmcore_jax.train", description=__doc__.split("\n")[0])
    config_lib.add_arguments(parser)
    parser.add_argument("--workdir", type=pathlib.Path, help="default: runs/STAGE-RECIPE")
    parser.add_argument("--stopped_code", type=int, default=0, help="exit code of a run that SIGTERM has stopped")
    arguments, overrides = parser.parse_known_args(argv)
    config = config_lib.load(arguments.config, overrides)
    processes.start()
    workdir = arguments.workdir or pathlib.Path("runs") / f"{config.stage}-{config.recipe}"
    return 0 if train(config, workdir) else arguments.stopped_code


def train(config: Config, workdir: pathlib.Path) -> bool:
    """Trains until `config.total_steps`, or SIGTERM; returns whether the run is done. Rolled back, it starts anew."""
    stop, goodput, watch = processes.StopSignal(), Goodput(workdir), bad_steps.Watch(workdir, config)
    while True:
        try:
            return run(config, workdir, stop, goodput, watch)
        except bad_steps.RolledBack as rollback:
            print(f"{workdir}: {rollback}.", file=sys.stderr, flush=True)
        gc.collect()  # the arrays of the last start, before those of the next


def run(
    config: Config, workdir: pathlib.Path, stop: processes.StopSignal, goodput: Goodput, watch: bad_steps.Watch
) -> bool:
    """One start of a run, from its checkpoint to its end; raises `RolledBack` if it is to start again."""
    # --- Devices and workdir ------------------------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, config.optimizer.accumulation, mesh)
    with processes.first_goes_ahead():
        claim(workdir, config)
    keep_programs(config.execution.compilation_cache, workdir)
    checkpoints = Checkpoints(workdir, config)
    if (checkpoints.latest_step or 0) >= config.total_steps:
        print(f"{workdir} is done: step {checkpoints.latest_step} of {config.total_steps}.")
        return True
    fresh = checkpoints.latest_step is None
    if fresh:  # before weights are loaded, which may take minutes
        check_sources(config)
        check_there(config)
    jax.set_mesh(mesh)

    # --- Model: what config.init names --------------------------------------------------------------------------------
    model, example = MMCORE(config.model, config.execution), packing.placeholder(config, config.batch_size)
    plan = make_plan(config, model, mesh, example)
    params = initial_params(config, model, plan, example, list(plan.shapes) if fresh else plan.frozen)
    frozen = freeze(config, plan, params)

    # --- Own checkpoint, if there is one ------------------------------------------------------------------------------
    if not fresh:
        state, constants = checkpoints.restore(abstract_state(config, plan, mesh), frozen)
    first, seen = 0 if fresh else checkpoints.latest_step, checkpoints.data()
    goodput.resume(seen.get("useful_seconds", 0.0))

    # --- Data ---------------------------------------------------------------------------------------------------------
    start = Position.from_json(seen["position"]) if seen else None
    weights = precompute(config, model, plan, frozen, mesh, progress)
    skipped = watch.begin(first)
    whole = dataclasses.replace(config, total_steps=config.total_steps + skipped)
    with processes.first_goes_ahead():  # and measures what has not been measured yet
        batches = Batches(whole, jax.process_index(), jax.process_count(), start, weights)
    check_contents(processes.gather(batches.contents), seen.get("contents"))
    ledger = Ledger(config, processes.gather if jax.process_count() > 1 else None, seen.get("ledger"))
    gauges = Gauges(config, model, plan, mesh, batches.tokenizer, seen.get("gauges"))
    if processes.is_first():
        keep_tokenizer(config.data.tokenizer, workdir / "tokenizer")

    # --- State, at the beginning --------------------------------------------------------------------------------------
    if fresh:
        statistics = {}
        if config.objectives.alignment:
            statistics = inherited_statistics(config, frozen, sharding.replicated(mesh))
            statistics = statistics or alignment.measure(model, join({}, Constants(frozen, {})), batches, mesh)
        state, constants = create_state(config, plan, mesh, params), Constants(frozen, statistics)
    else:
        health = watch.health(first, seen.get("health"))
        state = state._replace(health=jax.device_put(health, sharding.replicated(mesh)))
    del params

    # --- The loop -----------------------------------------------------------------------------------------------------
    encode, step_function = make_encode(config, model, plan), compiled_step(make_step(config, model, plan), mesh)
    telemetry = Silence()
    if processes.is_first():
        telemetry = Telemetry(workdir, f"{config.stage} {config.recipe}", first, config.total_steps)
    clock = Clock(first, step_flops(config, plan, batches[first + skipped].arrays)["total"])
    pending: collections.deque[Pending] = collections.deque()
    pictures = Pictures(workdir, config, model, batches) if config.telemetry.sample_every else None

    def settle(keep: int) -> None:
        """Reads the metrics of all but the last `keep` steps."""
        while len(pending) > keep:
            done = pending.popleft()
            metrics = {name: float(value) for name, value in jax.device_get(done.metrics).items()}
            if watch.note(done.step, metrics, done.batch):
                checkpoints.wait()
                watch.roll_back(done.step, checkpoints.latest_step or 0)
            ledger.add(done.batch)
            clock.examples += done.examples
            telemetry.advance()
            if done.step % config.telemetry.log_every == 0 or done.step == config.total_steps:
                ledger.share()
                telemetry.log(done.step, metrics | ledger.metrics(), **clock.rates(done.step), **goodput.record())

    def busy() -> bool:
        """Whether the last step is still being worked on."""
        return bool(pending) and not pending[-1].metrics["loss"].is_ready()

    def gauge(step: int) -> None:
        """Logs the held-out measures, in a time that counts for no step."""
        settle(0)
        with clock.paused(), goodput.spent_on("evaluation"):
            telemetry.record(step, gauges(join(state.ema or state.params, constants)))

    with jax.transfer_guard("disallow"), contextlib.closing(telemetry), watching(workdir, config.watchdog, goodput):
        if gauges.starting:
            gauge(first)
        goodput.enter("useful")
        for step, batch in enumerate(goodput.batches(batches.iterate(first + skipped), busy), start=first + 1):
            with goodput.spent_on("useful" if step > first + 1 else "compile"):
                arrays = sharding.shard_batch(batch.arrays, mesh)
                arrays = encode(constants, arrays) if encode else arrays
                state = state._replace(health=watch.renew(step - 1 + skipped, state.health))
                state, metrics = step_function(state, constants, arrays)
            pending.append(Pending(step, metrics, batch._replace(arrays=None)))
            settle(LAG)
            if gauges.due(step):
                gauge(step)
            last, due = stop.reached(step) or step == config.total_steps, checkpoints.due(step)
            if last or due:
                settle(0)
            if last or (due and not watch.in_a_row):
                with goodput.spent_on("checkpoint"):
                    ledger.share()
                    seen = {"position": batch.position._asdict(), "ledger": ledger.record(), "gauges": gauges.record}
                    seen |= {"contents": batches.contents, "health": state.health.record()}
                    seen |= {"useful_seconds": goodput.seconds["useful"]}
                    checkpoints.save(state, constants, step, seen, last)
            if last and step < config.total_steps:
                break
            if pictures and (step % config.telemetry.sample_every == 0 or step == config.total_steps):
                with goodput.spent_on("evaluation"):
                    pictures.draw(step, join(state.ema or state.params, constants))
        goodput.enter("checkpoint")
        checkpoints.wait()
        goodput.record()

    done = step == config.total_steps
    if processes.is_first():
        ending = "done" if done else "stopped by SIGTERM and saved"
        print(*ledger.lines(), f"{workdir} is {ending}: step {step} of {config.total_steps}.", sep="\n")
    return done


class Pending(NamedTuple):
    """A step that the device may still be working on."""

    step: int
    metrics: Metrics
    batch: Batch

    @property
    def examples(self) -> int:
        return int(self.batch.drawn.sum())


class Pictures:
    """Sample sheets in `WORKDIR/samples`: a few examples of each source, what is given, generated, and true.

    An example is a row. Of one with several generated images each is drawn in its turn, the true ones before it given.
    """

    PER_SOURCE = 4

    def __init__(self, workdir: pathlib.Path, config: Config, model: MMCORE, batches: Batches) -> None:
        self._directory, self._config = workdir / "samples", config
        if processes.is_first():
            self._directory.mkdir(exist_ok=True)
        self._generator = Generator(config, model, batches.tokenizer)
        self._examples = [example for example in batches.examples(self.PER_SOURCE) if turns(example)]

    def draw(self, step: int, params: Params) -> None:
        """Writes `step_000500.png`."""
        requests = [turns(example) for example in self._examples]
        # Of an example with several images, all have the size of the first.
        sizes = [self._generator.nearest_size(first["segments"][-1]["image"]) for first, *_ in requests]
        each = [size for size, of_example in zip(sizes, requests) for _ in of_example]
        with jax.transfer_guard("allow"):
            drawn = self._generator(params, list(itertools.chain(*requests)), self._config.sampling, sizes=each)
        if not processes.is_first():
            return
        images = iter(drawn)
        rows = [show(example, images, size) for example, size in zip(self._examples, sizes)]
        sheet(rows).save(self._directory / f"step_{step:06d}.png")


def show(example: Example, images: Iterator[np.ndarray], size: tuple[int, int]) -> list[Cell]:
    """A row of a sheet: the images that an example gives, and those drawn, from `images`, beside the true ones."""
    row, prompt = [], []
    for segment in example["segments"]:
        if segment["type"] == "text":
            prompt.append(segment["text"])
            continue
        true = image.decode(segment["image"], *size)
        if segment["generate"]:
            row += [(next(images), " ".join(prompt)), (true, "truth")]
            prompt = []
        else:
            row.append((true, "given"))
    return row


def turns(example: Example) -> list[Example]:
    """For each image that an example generates, the request for it: the example up to there."""
    segments = example["segments"]
    ends = [number for number, segment in enumerate(segments, 1) if segment.get("generate")]
    return [{**example, "segments": segments[:end]} for end in ends]


class Clock:
    """Speeds between two log lines. MFU is left out where the peak of the device is not known."""

    def __init__(self, first: int, flops: float) -> None:
        self.examples, self._flops, self._last = 0, jax.process_count() * flops, (first, time.perf_counter())
        peak = peak_flops(jax.devices()[0])
        self._peak = peak and peak * jax.device_count()

    def rates(self, step: int) -> dict[str, float]:
        (before, then), now = self._last, time.perf_counter()
        seconds = (now - then) / (step - before)
        rates = {"examples_per_second": self.examples / (now - then), "step_seconds": seconds}
        if self._peak:
            rates["mfu"] = self._flops / seconds / self._peak
        self.examples, self._last = 0, (step, now)
        return rates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Counts no time."""
        begin = time.perf_counter()
        yield
        step, then = self._last
        self._last = step, then + time.perf_counter() - begin


def claim(workdir: pathlib.Path, config: Config) -> None:
    """Makes the workdir and writes its config, unless another recipe lives there, which has saved something.

    Where the index of the data lies and how batches are prepared ahead may change.

    Raises:
      UserError: if the directory cannot be written, or holds a run that this config cannot continue.
    """
    path = workdir / "config.json"
    there = config_lib.from_json(path) if path.exists() else None
    if there and (there.checkpoint.local_every or has_saved(workdir)):
        free = {name: getattr(config.data, name) for name in ("index", "workers", "threads")}
        there = dataclasses.replace(there, data=dataclasses.replace(there.data, **free))
        for name in ("stage", "recipe", "seed", "batch_size", "model", "tuning", "data"):
            if getattr(there, name) != getattr(config, name):
                raise UserError(
                    f"{workdir} belongs to another run ({there.stage} {there.recipe}): config.{name} differs. "
                    "Choose another --workdir, or delete it."
                )
    elif there and processes.is_first():  # it failed before it had saved anything: another tokenizer is no mistake
        shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
    if not processes.is_first():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists() and not (workdir / "checkpoints").exists():
            (workdir / RUN_FILE).write_text(secrets.token_hex(8))
        write_text(path, config.to_json())
    except OSError as error:
        raise UserError(f"cannot write to the workdir {workdir}: {error.strerror}.") from error


if __name__ == "__main__":
    main()
