"""Measures on held-out examples during training, as `gauge/SOURCE/...`: has it learned, by heart, or forgotten?

What is measured follows from the stage:
  where the VLM trains, on examples with assistant text: `next_token`, the loss in nats a token, and `answer_accuracy`;
  `..._change` is against the start of the run (forgetting: the trade-off of MMCORE section 5);
  where it is aligned, on examples that generate an image: the centred `cosine`, and `retrieval` of the right image
  among the different ones of the source;
  where flow is matched: `flow/drop_WHAT/t_LOW_HIGH`, the loss by timestep and with pathways dropped.

An answer is right if each of its tokens, the end of the turn included, is the likeliest one behind the true ones before
it: it is then what greedy decoding writes.

B rows, one example each.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmcore_jax import sharding
from mmcore_jax.config import Alignment, Budgets, Config, UserError
from mmcore_jax.data import geometry, layout, packing
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.geometry import Geometry
from mmcore_jax.data.layout import Interleaved, Item, Picture
from mmcore_jax.data.sources import RandomAccess, open_sources
from mmcore_jax.evaluation import probes, scores
from mmcore_jax.generate import ROUNDING
from mmcore_jax.mmcore import MMCORE, Forward, Params
from mmcore_jax.objectives import alignment, next_token
from mmcore_jax.training.state import Plan

_TRIES = 100  # records that are looked at for a usable one
_CHANGING = ("next_token", "answer_accuracy")

Values = dict[str, Any]  # arrays, with an entry for each example
Measure = Callable[[Forward, jax.Array], Values]  # of a batch, with a random key


class Case(NamedTuple):
    """An example to measure on; `truth` is the last image that it generates, encoded."""

    source: str
    item: Item
    pictures: list[Picture]

    @property
    def truth(self) -> bytes | None:
        return next((frame.encoded for frame in self.item.frames[::-1] if frame.generate), None)


class Gauges:
    """The held-out measures of a run. They read its parameters only, and see the same examples and noise every time."""

    def __init__(
        self, config: Config, model: MMCORE, plan: Plan, mesh: Mesh, tokenizer: Any, record: dict | None = None
    ) -> None:
        """Reads the examples, unless `config.gauges` is off.

        Args:
          config: of the run.
          model: its parts.
          plan: of its parameters.
          mesh: the devices.
          tokenizer: of its data.
          record: that of an interrupted run.

        Raises:
          UserError: for missing data, or if there is nothing to measure.
        """
        self.record, self._config, self._mesh = record, config, mesh
        self._every = config.gauges.every if config.gauges else 0
        if not self._every:
            return
        if not (config.gauges.sources and _measures(config, plan)):
            raise UserError(
                f"config.gauges.every is {self._every}, but {config.stage} {config.recipe} has nothing to measure, or "
                "config.gauges.sources nothing to measure it on: give it sources, or set it to 0."
            )
        sources = open_sources(config.gauges.sources)
        self._sizes = geometry.derive(config.model, config.data)
        make = functools.partial(_make_case, config, layout.ChatFormat(tokenizer), self._sizes)
        self._cases = [case for source in sources for case in _choose(source, config.gauges.examples, make)]
        taken = np.array([layout.lengths(case.item, self._sizes) for case in self._cases])
        self._budgets = _fit(taken, config.data.budgets, mesh)
        unit = math.lcm(sharding.batch_shards(mesh), jax.process_count())
        most = config.batch_size // config.optimizer.accumulation
        self._rows = min(most, -(-len(self._cases) // unit) * unit)
        self._key = jax.device_put(jax.random.key(config.seed), sharding.replicated(mesh))
        measure = functools.partial(_measure, model, _measures(config, plan))
        self._measure = jax.jit(measure, out_shardings=sharding.replicated(mesh))
        self._identity = _identity(config, sources)
        if record and record["of"] != self._identity:
            self.record = None

    @property
    def starting(self) -> bool:
        """Whether the values at the start are still to be measured."""
        return bool(self._every) and self.record is None

    def due(self, step: int) -> bool:
        """Whether to measure after a step."""
        return bool(self._every) and (step % self._every == 0 or step == self._config.total_steps)

    def __call__(self, params: Params) -> dict[str, float]:
        """Measures by parameters of all parts of the stage; what is measured first is the start."""
        parts = [jax.device_get(self._measure(params, batch, self._key)) for batch in self._batches()]
        values = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(self._cases)], *parts)
        metrics: dict[str, float] = {}
        for name in self._config.gauges.sources:
            mine = np.array([case.source == name for case in self._cases])
            truths = [case.truth for case in self._cases if case.source == name]
            found = _summary(jax.tree.map(lambda x, mine=mine: x[mine], values), truths)
            metrics |= {f"gauge/{name}/{key}": float(value) for key, value in found.items()}
        if self.record is None:
            start = {key: value for key, value in metrics.items() if key.endswith(_CHANGING)}
            self.record = {"of": self._identity, "start": start}
        return metrics | {f"{key}_change": metrics[key] - value for key, value in self.record["start"].items()}

    def _batches(self) -> Iterator[Interleaved]:
        """Batches of one shape, of which each process has its part of the rows; the last one ends in empty rows."""
        size = self._rows // jax.process_count()
        for first in range(0, len(self._cases), self._rows):
            start = first + jax.process_index() * size
            cases = self._cases[start : start + size]
            rows = [[(case.item, case.pictures)] for case in cases] + [[]] * (size - len(cases))
            yield sharding.shard_batch(packing.assemble(rows, start, self._budgets, self._sizes), self._mesh)


# --- Cases ------------------------------------------------------------------------------------------------------------


def _choose(source: RandomAccess, count: int, make: Callable[[str, Example], Case]) -> list[Case]:
    """A usable example of each of `count` equal parts of a source, near its beginning."""
    edges, cases, reason = np.linspace(0, len(source), min(count, len(source)) + 1).astype(int), [], ""
    for first, last in itertools.pairwise(edges):
        for index in range(first, min(last, first + _TRIES)):
            try:
                cases.append(make(source.name, source[index]))
                break
            except BadExample as bad:
                reason = str(bad)
    if not cases:
        raise UserError(f"config.gauges.sources.{source.name} has no example that can be used: {reason}.")
    return cases


def _make_case(config: Config, chat: layout.ChatFormat, sizes: Geometry, source: str, example: Example) -> Case:
    """Raises `BadExample` as training would, which leaves out what no row has room for."""
    item = layout.make_item(example, chat, sizes)
    excess = layout.exceeded(layout.lengths(item, sizes), config.data.budgets)
    if excess:
        raise BadExample(excess)
    return Case(source, item, [layout.picture(frame, sizes) for frame in item.frames])


def _fit(taken: np.ndarray, budgets: Budgets, mesh: Mesh) -> Budgets:
    """Budgets of rows that hold any one of the examples; lengths are split over the mesh as those of training are."""
    unit = ROUNDING * mesh.shape["context"]
    lengths = zip(map(int, taken.max(axis=0)), dataclasses.astuple(budgets))
    fitting = Budgets(*(min(-(-most // unit) * unit, budget) for most, budget in lengths))
    return dataclasses.replace(fitting, images=int(taken.max(axis=0)[-1]))


def _identity(config: Config, sources: Sequence[RandomAccess]) -> str:
    """Stands for the examples: values of others cannot be compared."""
    given = [(source.name, source.fingerprint()) for source in sources]
    return hashlib.sha256(repr((config.gauges.examples, given)).encode()).hexdigest()[:16]


# --- Measures ---------------------------------------------------------------------------------------------------------


def _measures(config: Config, plan: Plan) -> list[Measure]:
    """What there is to measure of a stage."""
    measures = []
    if any(path.startswith("vlm/") for path in plan.trainable):
        measures.append(_next_token)
    if config.objectives.alignment:
        measures.append(functools.partial(_alignment, config.objectives.alignment))
    if config.objectives.flow_matching:
        measures.append(_flow_matching)
    return measures


def _measure(model: MMCORE, measures: Sequence[Measure], params: Params, batch: Interleaved, key: jax.Array) -> Values:
    forward = Forward(model, params, batch)
    return dict(itertools.chain(*(measure(forward, key).items() for measure in measures)))


def _next_token(forward: Forward, key: jax.Array) -> Values:
    losses, right = next_token.by_token(forward)
    learned = forward.batch.tokens.targets >= 0
    return {"loss": losses.sum(-1), "tokens": learned.sum(-1), "answered": jnp.all(right == learned, axis=-1)}


def _alignment(settings: Alignment, forward: Forward, key: jax.Array) -> Values:
    images = probes.centred(forward, settings), forward.targets
    predicted, targets = (probes.of_last_generated(values, forward.batch) for values in images)
    cosine = alignment.cosine(predicted, targets).mean(-1)
    return {"predicted": predicted, "targets": targets, "cosine": cosine}


def _flow_matching(forward: Forward, key: jax.Array) -> Values:
    return {"flow": probes.flow_losses_of_rows(forward, key)}


def _summary(values: Values, truths: list[bytes | None]) -> dict[str, float]:
    """Means over the examples of a source that each measure is about."""
    found: dict[str, float] = {}
    if "tokens" in values and values["tokens"].any():
        with_answer = values["tokens"] > 0
        found["next_token"] = values["loss"].sum() / values["tokens"].sum()
        found["answer_accuracy"] = values["answered"][with_answer].mean()
    drawn = np.array([truth is not None for truth in truths])
    if "cosine" in values and drawn.any():
        found["cosine"] = values["cosine"][drawn].mean()
        found["retrieval"] = _retrieval(
            values["predicted"][drawn], values["targets"][drawn], list(filter(None, truths))
        )
    if "flow" in values and drawn.any():
        for dropped, losses in zip(probes.DROPPED, values["flow"][drawn].mean(axis=0)):
            found |= {f"flow/drop_{dropped}/{name}": loss for name, loss in zip(probes.timestep_bins(), losses)}
    return found


def _retrieval(predicted: np.ndarray, targets: np.ndarray, truths: list[bytes]) -> float:
    """How many predictions are nearest, by cosine, to the right one of the different images."""
    first = {truth: number for number, truth in reversed(list(enumerate(truths)))}
    candidates = {truth: number for number, truth in enumerate(first)}
    flat, known = predicted.reshape(len(predicted), -1), targets[list(first.values())].reshape(len(first), -1)
    return scores.is_nearest(-scores.cosines(flat, known), np.array([candidates[truth] for truth in truths])).mean()
