"""Trains a stage.

    python -m mmcore_jax.train --config=configs/stage2.py [--workdir=DIR] [--config.KEY=VALUE ...]

A run that was stopped continues where it stood. The workdir is `runs/STAGE-RECIPE` unless given.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from mmcore_jax import config as config_lib
from mmcore_jax import sharding
from mmcore_jax.config import Config, UserError, door
from mmcore_jax.data import image, layout
from mmcore_jax.data.pipeline import Batch, Batches, Ledger
from mmcore_jax.data.plan import Position
from mmcore_jax.data.text import keep_tokenizer
from mmcore_jax.evaluation.sheet import sheet
from mmcore_jax.generate import Generator
from mmcore_jax.mmcore import MMCORE, Params
from mmcore_jax.objectives import alignment
from mmcore_jax.progress import progress
from mmcore_jax.training.checkpoint import Checkpoints, check_sources, initial_params
from mmcore_jax.training.flops import peak_flops, step_flops
from mmcore_jax.training.precompute import precompute
from mmcore_jax.training.state import Constants, abstract_state, create_state, freeze, join, make_plan
from mmcore_jax.training.step import Metrics, compiled_step, make_step
from mmcore_jax.training.telemetry import Telemetry

# A step's metrics are read when this many later steps have been dispatched: the device never waits for the host.
LAG = 2


@door
def main(argv: Sequence[str]) -> int:
    """Reads the command line, then trains."""
    parser = argparse.ArgumentParser(prog="python -m mmcore_jax.train", description=__doc__.split("\n")[0])
    config_lib.add_arguments(parser)
    parser.add_argument("--workdir", type=pathlib.Path, help="default: runs/STAGE-RECIPE")
    arguments, overrides = parser.parse_known_args(argv)
    config = config_lib.load(arguments.config, overrides)
    return train(config, arguments.workdir or pathlib.Path("runs") / f"{config.stage}-{config.recipe}")


def train(config: Config, workdir: pathlib.Path) -> int:
    """Trains until `config.total_steps` or SIGTERM; returns the exit code."""
    stop = StopSignal()

    # --- Devices and workdir ------------------------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, config.optimizer.accumulation, mesh)
    claim(workdir, config)
    checkpoints = Checkpoints(workdir, config)
    if (checkpoints.latest_step or 0) >= config.total_steps:
        print(f"{workdir} is done: step {checkpoints.latest_step} of {config.total_steps}.")
        return 0
    if checkpoints.latest_step is None:
        check_sources(config)
    jax.set_mesh(mesh)

    # --- Model: what config.init names --------------------------------------------------------------------------------
    first, seen = checkpoints.latest_step or 0, checkpoints.data()
    model, example = MMCORE(config.model, config.execution), layout.placeholder(config, config.batch_size)
    plan = make_plan(config, model, mesh, example)
    params = initial_params(config, model, plan, example, plan.frozen if seen else list(plan.shapes))
    frozen = freeze(config, plan, params)

    # --- Data ---------------------------------------------------------------------------------------------------------
    start = Position.from_json(seen["position"]) if seen else None
    weights = precompute(config, model, plan, frozen, mesh, progress)
    batches = Batches(config, jax.process_index(), jax.process_count(), start, weights)
    ledger = Ledger(config, jax.process_count(), seen.get("ledger"))
    keep_tokenizer(config.data.tokenizer, workdir / "tokenizer")

    # --- State: own checkpoint, else the beginning --------------------------------------------------------------------
    if checkpoints.latest_step is None:
        known = join({}, Constants(frozen, {}))
        statistics = alignment.measure(model, known, batches, mesh) if config.objectives.alignment else {}
        state, constants = create_state(config, plan, mesh, params), Constants(frozen, statistics)
    else:
        state, constants = checkpoints.restore(abstract_state(config, plan, mesh), frozen)
    del params

    # --- The loop -----------------------------------------------------------------------------------------------------
    step_function = compiled_step(make_step(config, model, plan))
    telemetry = Telemetry(workdir, f"{config.stage} {config.recipe}", first, config.total_steps)
    clock = Clock(first, step_flops(config, plan, batches[first].arrays)["total"])
    pending: collections.deque[Pending] = collections.deque()
    pictures = Pictures(workdir, config, model, batches) if config.telemetry.sample_every else None

    def settle(keep: int) -> None:
        """Reads the metrics of all but the last `keep` steps."""
        while len(pending) > keep:
            done = pending.popleft()
            metrics = {name: float(value) for name, value in jax.device_get(done.metrics).items()}
            check_finite(workdir, done, metrics)
            ledger.add(done.batch)
            clock.examples += done.examples
            telemetry.advance()
            if done.step % config.telemetry.log_every == 0 or done.step == config.total_steps:
                telemetry.log(done.step, metrics | ledger.metrics(), **clock.rates(done.step))

    with jax.transfer_guard("disallow"):
        for step, batch in enumerate(batches.iterate(first), start=first + 1):
            arrays = sharding.shard_batch(batch.arrays, mesh)
            state, metrics = step_function(state, constants, arrays)
            pending.append(Pending(step, metrics, batch._replace(arrays=None)))
            settle(LAG)
            saving = step % config.checkpoint.every == 0 or step == config.total_steps or stop.requested
            if saving:
                settle(0)
                seen = {"position": batch.position._asdict(), "ledger": ledger.record()}
                checkpoints.save(state, constants, step, seen)
            if stop.requested:
                break
            if pictures and (step % config.telemetry.sample_every == 0 or step == config.total_steps):
                pictures.draw(step, join(state.ema or state.params, constants))

    checkpoints.wait()
    telemetry.close()
    for line in ledger.lines():
        print(line)
    ending = "done" if step == config.total_steps else "stopped by SIGTERM and saved"
    print(f"{workdir} is {ending}: step {step} of {config.total_steps}.")
    return 0


class Pending(NamedTuple):
    """A step that the device may still be working on."""

    step: int
    metrics: Metrics
    batch: Batch

    @property
    def examples(self) -> int:
        return int(self.batch.drawn.sum())


class Pictures:
    """Sample sheets in `WORKDIR/samples`: a few examples of each source, what is given, generated, and true."""

    PER_SOURCE = 4

    def __init__(self, workdir: pathlib.Path, config: Config, model: MMCORE, batches: Batches) -> None:
        self._directory, self._config = workdir / "samples", config
        self._directory.mkdir(exist_ok=True)
        self._generator = Generator(config, model, batches.tokenizer)
        self._examples = [
            example for example in batches.examples(self.PER_SOURCE) if example["segments"][-1].get("generate")
        ]

    def draw(self, step: int, params: Params) -> None:
        """Writes `step_000500.png`."""
        with jax.transfer_guard("allow"):
            images = self._generator(params, self._examples, self._config.sampling)
        rows = []
        for example, generated in zip(self._examples, images):
            *given, truth = [s["image"] for s in example["segments"] if s["type"] == "image"]
            prompt = " ".join(s["text"] for s in example["segments"] if s["type"] == "text")
            size = self._config.data.image_size
            row = [(image.decode(encoded, size), "given") for encoded in given]
            rows.append(row + [(generated, prompt), (image.decode(truth, size), "truth")])
        sheet(rows).save(self._directory / f"step_{step:06d}.png")


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


class StopSignal:
    """Notes SIGTERM; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self.requested = True


def claim(workdir: pathlib.Path, config: Config) -> None:
    """Makes the workdir and writes its config, unless another recipe lives there.

    Where the index of the data lies and how batches are prepared ahead may change.

    Raises:
      UserError: if the directory cannot be written, or holds a run that this config cannot continue.
    """
    path = workdir / "config.json"
    if path.exists():
        there = config_lib.from_json(path)
        free = {name: getattr(config.data, name) for name in ("index", "workers", "threads")}
        there = dataclasses.replace(there, data=dataclasses.replace(there.data, **free))
        for name in ("stage", "recipe", "seed", "batch_size", "model", "tuning", "data"):
            if getattr(there, name) != getattr(config, name):
                raise UserError(
                    f"{workdir} belongs to another run ({there.stage} {there.recipe}): config.{name} differs. "
                    "Choose another --workdir, or delete it."
                )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(config.to_json())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write to the workdir {workdir}: {error.strerror}.") from error


def check_finite(workdir: pathlib.Path, done: Pending, metrics: dict[str, float]) -> None:
    """Stops the run at the first loss or gradient that is not finite; the last checkpoint stays as it is."""
    broken = [name for name, value in metrics.items() if not np.isfinite(value)]
    if not broken:
        return
    path = workdir / f"nonfinite_step_{done.step}.json"
    path.write_text(
        json.dumps(
            {"step": done.step, "metrics": {k: repr(v) for k, v in metrics.items()}, "ids": done.batch.ids}, indent=1
        )
    )
    raise UserError(
        f"{broken[0]} is {metrics[broken[0]]} at step {done.step}: the run stops, its last checkpoint is intact, "
        f"and the ids of the batch are in {path}."
    )


if __name__ == "__main__":
    main()
