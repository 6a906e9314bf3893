"""Times contestants by turns, and compares what they compute before it compares how long they took."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmcore_jax.config import UserError
from mmcore_jax.progress import progress

OURS, EAGER, COMPILED = "ours", "PyTorch eager", "torch.compile"
CEILING = "decoder alone"  # does a part of the work, and competes with nobody
# How torch.compile fails without a C++ compiler, or where it does not know an operation.
COMPILATION_ERRORS = (RuntimeError, NotImplementedError, OSError)


class Contestant(NamedTuple):
    """Does the work once, from beginning to end, each time that it is called, and returns what it computed."""

    name: str
    run: Callable[[], np.ndarray]


class Comparison(NamedTuple):
    """What was measured on one network.

    seconds: of every repeat, by contestant. unavailable: why one could not run, by contestant. difference: the largest
    between an output of ours and of another, relative to the largest value.
    """

    network: str
    sizes: dict[str, Any]
    seconds: dict[str, list[float]]
    unavailable: dict[str, str]
    difference: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """Our median time over that of the faster of the others: below 1, ours is faster."""
        medians = {name: float(np.median(seconds)) for name, seconds in self.seconds.items() if name != CEILING}
        return medians.pop(OURS) / min(medians.values())

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return self._asdict() | {"ratio": self.ratio}


def compare(
    network: str,
    sizes: dict[str, Any],
    contestants: Sequence[Contestant],
    warmup: int,
    repeats: int,
    tolerance: float,
) -> Comparison:
    """Runs A, B, C, A, B, C, ...: `warmup` rounds that do not count, then `repeats` that do.

    Raises:
      UserError: if what they compute in any round differs by more than `tolerance`, so that the times mean nothing.
    """
    runners, unavailable, outputs = _prepare(contestants)
    seconds = {name: [] for name in runners}
    rounds = warmup - 1 + repeats
    for number in progress(range(rounds), rounds, f"{network}, rounds"):
        for name, run in runners.items():
            start = time.perf_counter()
            outputs[name].append(run())
            elapsed = time.perf_counter() - start
            if number >= warmup - 1:
                seconds[name].append(elapsed)
    others = [theirs for name, theirs in outputs.items() if name != OURS]
    difference = float(np.max([_difference(outputs[OURS], theirs) for theirs in others]))  # or not a number
    if not difference <= tolerance:
        raise UserError(
            f"{network}: ours and the others differ by {difference:.2g} of the largest value, more than "
            f"{tolerance:.2g}: they do not do the same work, so their times cannot be compared."
        )
    return Comparison(network, sizes, seconds, unavailable, difference, tolerance)


def _prepare(contestants: Sequence[Contestant]) -> tuple[dict[str, Callable], dict[str, str], dict[str, list]]:
    """Runs each once, which compiles it: who can run, why the others cannot, and the first outputs."""
    runners, unavailable, outputs = {}, {}, {}
    for name, run in contestants:
        try:
            outputs[name] = [run()]
        except COMPILATION_ERRORS as error:
            if name != COMPILED:
                raise
            unavailable[name] = next(line.strip() for line in str(error).splitlines() if line.strip())
        else:
            runners[name] = run
    return runners, unavailable, outputs


def _difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return float(np.max([np.max(np.abs(x - y)) / np.max(np.abs(y)) for x, y in zip(ours, theirs)]))
