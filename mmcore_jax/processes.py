"""Several processes of one run: how they meet, and what they agree on besides arrays.

`jax.distributed` joins them. TPU pods, GKE, SLURM and Open MPI are recognised by what JAX finds there; elsewhere the
environment says who is who: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from mmcore_jax.config import TryAgain, UserError

START_TIMEOUT = 600.0  # seconds that the processes of a run wait for each other at its start
_PATIENCE = 24 * 3600 * 1000  # milliseconds that they do later: one may scan new data, the others wait

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_VERDICT = "mmcore_jax"  # begins it
_calls = itertools.count()


def start(timeout: float = START_TIMEOUT) -> None:
    """Joins the processes of this run, if there are several. Comes before anything that asks JAX for devices.

    Raises:
      UserError: if some have not come after `timeout` seconds, naming them; or if the environment contradicts itself.
    """
    address, count, index, local = _whereabouts(timeout)
    if count is None or jax.distributed.is_initialized():
        return
    if count > 1:
        roll_call(address, count, index, timeout)
    jax.distributed.initialize(address, count, index, local, shutdown_timeout_seconds=60)


def _whereabouts(timeout: float) -> tuple[str | None, int | None, int | None, Any]:
    """Address of the coordinator, number of processes, which one this is, and its devices; None where it is alone."""
    given = {name: os.environ.get(name) for name in _VARIABLES}
    if given["JAX_NUM_PROCESSES"] is None and given["JAX_PROCESS_ID"] is None:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout))
        return (given["JAX_COORDINATOR_ADDRESS"] or found[0], *found[1:])
    try:
        address, count, index = given[_VARIABLES[0]], *(int(given[name]) for name in _VARIABLES[1:])
        fits = 0 <= index < count and ":" in address
    except (TypeError, ValueError):
        fits = False
    if not fits:
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{shown}: expected host:port, a number of processes, and one below it, in every process.")
    return address, count, index, None


def roll_call(address: str, count: int, index: int, timeout: float) -> None:
    """Waits until all `count` processes are there. JAX itself would abort after its timeout, and name nobody.

    Process 0 listens on the port of the coordinator, which is not up yet, and tells the others who is missing.

    Raises:
      TryAgain: in all that came, with the same sentence.
    """
    deadline = time.monotonic() + timeout
    if index:
        _answer(address, index, timeout, deadline)
        return
    port, present = int(address.rpartition(":")[2]), {0: socket.gethostname()}
    with contextlib.ExitStack() as stack:
        server, there = stack.enter_context(_listen(port)), []
        while len(present) < count and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(10)
                number, _, host = connection.makefile("r").readline().strip().partition(" ")
                present[int(number)] = host
                there.append(connection)
        missing = [str(number) for number in range(count) if number not in present]
        verdict = ""
        if missing:
            here = ", ".join(f"{number} on {host}" for number, host in sorted(present.items()))
            verdict = (
                f"process {', '.join(missing)} of {count} did not come to {address} within {timeout:g} s (here are "
                f"{here}): see whether it runs, and whether it can reach that address."
            )
        for connection in there:
            with contextlib.suppress(OSError):
                connection.sendall(f"{_VERDICT} {verdict}\n".encode())
    if missing:
        raise TryAgain(verdict)


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=1024
    )


def _answer(address: str, index: int, timeout: float, deadline: float) -> None:
    """Reports to process 0, and waits for its verdict."""
    host, _, port = address.rpartition(":")
    problem = "nobody listens there"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as connection:
                connection.settimeout(left + 10)
                connection.sendall(f"{index} {socket.gethostname()}\n".encode())
                heard, _, verdict = connection.makefile("r", errors="replace").readline().partition(" ")
        except OSError as error:
            heard, problem = "", error.strerror or str(error)
        if heard == _VERDICT:
            if verdict.strip():
                raise TryAgain(verdict.strip())
            return
        time.sleep(0.2)
    raise TryAgain(
        f"process 0 did not come to {address} within {timeout:g} s, says process {index} on {socket.gethostname()} "
        f"({problem}): see whether it runs, and whether this host can reach that address."
    )


# --- What they agree on -----------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process is the one that writes what there is one of."""
    return jax.process_index() == 0


def gather(value: Any) -> list:
    """What each process gives, in their order: JSON values. Every process calls it, in the same order of calls."""
    client = distributed.global_state.client
    if client is None:
        return [value]
    call = next(_calls)
    place = f"mmcore_jax/{call}"
    client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(value))
    client.wait_at_barrier(place, _PATIENCE)
    found = {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(f"{place}/")}
    if is_first() and call:
        client.key_value_delete(f"mmcore_jax/{call - 1}/")  # all have read it, since all are here
    return [json.loads(text) for _, text in sorted(found.items())]


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """The first process does this before the others, who find what it has written."""
    if not is_first():
        gather(None)
    try:
        yield
    finally:
        if is_first():
            gather(None)


class StopSignal:
    """SIGTERM, at any of the processes; the loop looks at it between steps."""

    def __init__(self) -> None:
        self._noted, self._asked = False, False
        if not jax.distributed.is_initialized():  # which listens itself
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self._noted = True

    def reached(self, step: int) -> bool:
        """Whether to stop after a step: the same one in all processes, each of which asks after every step."""
        # JAX agrees on the step after the latest that anybody has asked for: on 1 while nobody has.
        early = not self._asked and multihost_utils.reached_preemption_sync_point(1)
        self._asked = True
        return self._noted or early or multihost_utils.reached_preemption_sync_point(step)
