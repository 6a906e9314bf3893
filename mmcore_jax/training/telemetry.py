"""What a run tells: a progress bar or plain lines, JSON lines, and TensorBoard."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from mmcore_jax.writing import write_text


class Telemetry:
    """Writes `metrics.jsonl` and TensorBoard events into a workdir, and shows progress."""

    def __init__(self, workdir: pathlib.Path, title: str, first_step: int, total_steps: int) -> None:
        """Continues after `first_step`: what an interrupted run has logged beyond it is taken back."""
        self._path = workdir / "metrics.jsonl"
        _truncate(self._path, first_step)
        self._file = self._path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1, write_to_disk=True)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=title,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._title, self._total = title, total_steps
        self._last = (time.perf_counter(), first_step)

    def advance(self) -> None:
        """Counts one step on the bar."""
        self._bar.update()

    def log(self, step: int, metrics: dict[str, float], **rates: float) -> None:
        """Records a step. `rates` are measured speeds; what else is logged is a function of the run alone."""
        self.record(step, {**metrics, **rates})
        self._bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        if self._bar.disable and (step == self._total or step % max(1, self._total // 20) < step - self._last[1]):
            self._print(step, metrics)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Writes metrics of a step, and shows none. JSON has null for what is not finite."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._board.close()

    def _print(self, step: int, metrics: dict[str, float]) -> None:
        now, (then, before) = time.perf_counter(), self._last
        speed = (step - before) / (now - then)
        left = (self._total - step) / speed
        shown = " ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "/" not in name)
        print(f"{self._title}: step {step}/{self._total} {shown}, {speed:.2f} steps/s, {left:.0f} s left", flush=True)
        self._last = (now, step)


class Silence:
    """The telemetry of every process but the first."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`; a last line that was cut off by a kill is left out."""
    path, records = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _truncate(path: pathlib.Path, step: int) -> None:
    """Takes back what comes after a step; what comes before the first one is of a beginning, and goes with it."""
    kept = [record for record in read_metrics(path.parent) if step and record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
