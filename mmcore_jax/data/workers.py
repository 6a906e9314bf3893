"""Jobs in worker processes."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def run(function: Callable[[Any, Any], Any], state: Any, jobs: Sequence, workers: int) -> Iterator[tuple[int, Any]]:
    """Yields (number of the job, `function(state, job)`) as jobs finish.

    They run in `workers` processes, each of which unpickles `state` once, or in order in this one.
    """
    if workers < 2 or len(jobs) < 2:
        yield from ((number, function(state, job)) for number, job in enumerate(jobs))
        return
    spawn = multiprocessing.get_context("spawn")  # forking a process that has started JAX can hang
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _enter, (function, state)) as pool:
        futures = {pool.submit(_work, job): number for number, job in enumerate(jobs)}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_entered: list[tuple[Callable, Any]] = []  # in a worker process


def _enter(function: Callable, state: Any) -> None:
    _entered.append((function, state))


def _work(job: Any) -> Any:
    ((function, state),) = _entered
    return function(state, job)
