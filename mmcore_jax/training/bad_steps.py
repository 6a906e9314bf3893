"""Bad steps: a metric is not finite, or the loss or the gradient norm is far above its running range.

The step itself judges, on the devices, and then changes neither parameters nor optimizer nor EMA, as OLMo-core does
(`SkipStepAdamW`: 6 standard deviations, 128 steps, of which 64 must be known). The host learns of it when it reads the
metrics. After too many in a row the run goes back to its last checkpoint and jumps over all the data that it has seen
since, the batches before the bad ones included, as PaLM did (arXiv:2204.02311, section 5.1). Jumping over the bad ones
alone would do nothing: they have changed nothing, and the same batches before them lead to the same parameters.
"""

import itertools
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax import processes
from mmcore_jax.config import BadSteps, Config, UserError
from mmcore_jax.data.pipeline import Batch
from mmcore_jax.writing import whole

# The least standard deviation of the logarithms that counts: what hardly varies is not judged by its noise.
_LEAST = np.array([0.01, 0.1], np.float32)
_NAMES = ("loss", "gradient_norm")


# --- In the step ------------------------------------------------------------------------------------------------------


class Health(NamedTuple):
    """What the state keeps of the steps so far: counts, and the running range of the logarithms of `_NAMES`."""

    seen: jax.Array  # int32 [], good ones
    mean: jax.Array  # float32 [2]
    variance: jax.Array  # float32 [2]
    bad: jax.Array  # int32 []
    in_a_row: jax.Array  # int32 [], bad ones up to now

    def record(self) -> dict[str, Any]:
        """Itself as JSON values, exactly, for a checkpoint."""
        return {name: value.tolist() for name, value in jax.device_get(self)._asdict().items()}


def health(record: dict[str, Any] | None = None) -> Health:
    """That of a checkpoint's `record`, or of no step at all."""
    record = record or {"seen": 0, "mean": [0.0] * 2, "variance": [0.0] * 2, "bad": 0, "in_a_row": 0}
    kinds = {name: np.float32 if name in ("mean", "variance") else np.int32 for name in record}
    return Health(**{name: np.asarray(value, kinds[name]) for name, value in record.items()})


def judge(settings: BadSteps, before: Health, metrics: dict[str, jax.Array]) -> tuple[jax.Array, Health]:
    """Whether a step with these metrics is good, bool [], and the health after it. A bad one leaves the range alone."""
    metrics = jax.lax.optimization_barrier(metrics)  # what is judged is computed as if it were not
    values = jnp.log(jnp.maximum(jnp.stack([metrics[name] for name in _NAMES]), 1e-30))
    finite = jnp.isfinite(jnp.stack([*metrics.values()])).all()
    distance = values - before.mean
    far = distance > settings.deviations * jnp.maximum(jnp.sqrt(before.variance), _LEAST)
    good = finite & ~(far.any() & (before.seen >= settings.warmup))
    seen = before.seen + 1
    rate = jnp.maximum(1 / seen, 1 / settings.window)
    variance = (1 - rate) * (before.variance + rate * distance**2)
    after = Health(seen, before.mean + rate * distance, variance, before.bad, jnp.zeros_like(seen))
    return good, choose(good, after, before._replace(bad=before.bad + 1, in_a_row=before.in_a_row + 1))


def choose(good: jax.Array, after: Any, before: Any) -> Any:
    """`after` of a good step, `before` of a bad one: a selection in the loop that writes the update, nothing more."""
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)


# --- On the host ------------------------------------------------------------------------------------------------------


class RolledBack(Exception):
    """The run is to begin again at its last checkpoint."""


class Watch:
    """Writes down bad steps in `WORKDIR/bad_steps.jsonl`, and what is jumped over in `WORKDIR/rollbacks.json`.

    The latter is a list of `{"to": 100, "from": 123, "batch": 123}`: at step 123 the run went back to step 100, and the
    step after it takes batch 123 of the data, counted from 0, the next the one after that.
    """

    def __init__(self, workdir: pathlib.Path, config: Config) -> None:
        self._settings = config.bad_steps
        self._log, self._path = workdir / "bad_steps.jsonl", workdir / "rollbacks.json"
        self._changes = {step for source in config.data.sources.values() for step, _ in source.schedule}
        self._rollbacks = json.loads(self._path.read_text()) if self._path.exists() else []
        self.in_a_row = 0  # bad steps up to the last that was noted

    @property
    def skipped(self) -> int:
        """By how many batches the data is ahead of the steps."""
        return self._rollbacks[-1]["batch"] - self._rollbacks[-1]["to"] if self._rollbacks else 0

    def begin(self, step: int) -> int:
        """Begins at the checkpoint of a step, and forgets jumps after it; returns `skipped`."""
        if any(jump["to"] > step for jump in self._rollbacks):
            self._write([jump for jump in self._rollbacks if jump["to"] <= step])
        return self.skipped

    def health(self, step: int, record: dict[str, Any] | None) -> Health:
        """That of a checkpoint, without the bad steps for which the run came back to it.

        Another range begins if the mixture changes in what is jumped over.
        """
        if not any(jump["to"] == step for jump in self._rollbacks):
            return health(record)
        earlier = [jump["batch"] - jump["to"] for jump in self._rollbacks if jump["to"] < step]
        jumped = range(step + (earlier[-1] if earlier else 0), step + self.skipped)
        changes = {"in_a_row": 0} | ({"seen": 0} if any(number in jumped for number in self._changes) else {})
        return health(record and record | changes)

    def renew(self, number: int, before: Health) -> Health:
        """The health for batch `number`, which begins another range where another mixture of the data begins."""
        if number not in self._changes:
            return before
        return before._replace(seen=before.seen - before.seen)  # a 0 from the host is one that all processes compare

    def note(self, step: int, metrics: dict[str, float], batch: Batch) -> bool:
        """Writes down a step if it is bad; returns whether it is one too many in a row. All processes call it."""
        self.in_a_row = int(metrics["bad_steps/in_a_row"])
        if not self.in_a_row:
            return False
        values = {name: repr(value) for name, value in metrics.items() if not name.startswith("bad_steps/")}
        where = {"step": step, "batch": step - 1 + self.skipped}
        ids = [*itertools.chain(*processes.gather(batch.ids))]
        if processes.is_first():
            with self._log.open("a") as file:
                file.write(json.dumps(where | {"ids": ids, "metrics": values}) + "\n")
            shown = ", ".join(f"{name} {metrics[name]:.4g}" for name in _NAMES)
            print(f"bad step {step} ({shown}): no update; its batch is in {self._log}", file=sys.stderr, flush=True)
        return self.in_a_row >= self._settings.in_a_row

    def roll_back(self, step: int, checkpoint: int) -> None:
        """Decides that the run goes back from `step` to the checkpoint of another step, 0 being its beginning.

        Raises:
          RolledBack: when that is written down.
          UserError: if the run has come back to that checkpoint as often as it may.
        """
        tries = sum(jump["to"] == checkpoint for jump in self._rollbacks)
        if tries >= self._settings.rollbacks:
            raise UserError(
                f"{self._settings.in_a_row} bad steps in a row up to step {step}, after {tries} rollbacks to step "
                f"{checkpoint}: the run stops, its last checkpoint is intact, and losses, gradient norms and ids are "
                f"in {self._log}: mend the data, lower config.optimizer.learning_rate, or raise "
                "config.bad_steps.deviations."
            )
        self._write([*self._rollbacks, {"to": checkpoint, "from": step, "batch": step + self.skipped}])
        raise RolledBack(f"rolling back from step {step} to step {checkpoint}, and jumping over the batches between")

    def _write(self, rollbacks: list[dict[str, int]]) -> None:
        self._rollbacks = rollbacks
        if processes.is_first():
            with whole(self._path) as temporary, temporary.open("w") as file:
                json.dump(rollbacks, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
