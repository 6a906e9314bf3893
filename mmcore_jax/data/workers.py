"""Jobs in worker processes.

A worker imports what unpickling needs, and nothing of `__main__`: a door imports JAX and the networks. Values come back
in memory that is mapped, not copied: `pickle` hands out arrays apart from the rest. A worker ends when its socket
closes, as that of a parent does which is killed.
"""

import collections
import contextlib
import itertools
import mmap
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from mmcore_jax.config import UserError

_START = "import sys; sys.path[:] = sys.argv[2:]; from mmcore_jax.data import workers; workers.serve(int(sys.argv[1]))"
_ALIGNMENT = 64  # bytes: JAX on the CPU takes arrays that are aligned without copying them


def run(function: Callable[[Any, Any], Any], state: Any, jobs: Sequence, workers: int) -> Iterator[Any]:
    """Yields `function(state, job)` for job after job, in `workers` processes or, where one is enough, in this one."""
    if workers < 2 or len(jobs) < 2:
        yield from (function(state, job) for job in jobs)
    else:
        yield from stream(function, state, jobs, min(workers, len(jobs)), 1)


def stream(
    function: Callable[[Any, Any], Any], state: Any, jobs: Iterable, workers: int, ahead: int, threads: int = 1
) -> Iterator[Any]:
    """Starts worker processes at once; yields `function(state, job)` for job after job.

    Args:
      function: of a module, as is all that goes to workers.
      state: what each worker unpickles once.
      jobs: taken as values are asked for.
      workers: how many processes.
      ahead: how many jobs, at most, each has beyond the one whose value comes next.
      threads: in each process.

    Raises:
      UserError: if a worker is ended from outside. What a job raises, this raises.
    """
    values = _stream(function, state, iter(jobs), workers, ahead, threads)
    next(values)
    return values


def in_order(executor: Executor, function: Callable[[Any], Any], jobs: Iterable, ahead: int) -> Iterator[Any]:
    """Yields `function(job)` for job after job, and has `ahead` of them in work beyond the one that comes next."""
    with executor:
        jobs = iter(jobs)
        pending = collections.deque(executor.submit(function, job) for job in itertools.islice(jobs, ahead + 1))
        try:
            while pending:
                value = pending.popleft().result()
                pending.extend(executor.submit(function, job) for job in itertools.islice(jobs, 1))
                yield value
        finally:
            for future in pending:
                future.cancel()


def serve(descriptor: int) -> None:
    """What a worker process does: jobs come through a socket until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes the socket
    connection, answers = socket.socket(fileno=descriptor), queue.SimpleQueue()
    threading.Thread(target=_answer, args=(connection, answers), daemon=True).start()
    function, state, threads = _receive(connection)
    pool = ThreadPoolExecutor(threads)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            answers.put(pool.submit(_try, function, state, _receive(connection)))
    os._exit(0)  # at once, whatever is in work


def _answer(connection: socket.socket, answers: queue.SimpleQueue[Future]) -> None:
    """Sends what jobs return, in order."""
    try:
        while True:
            with _pack(answers.get().result()) as message:
                _send(connection, message)
    except ConnectionError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _try(function: Callable, state: Any, job: Any) -> tuple[Any, Exception | None]:
    try:
        return function(state, job), None
    except Exception as error:
        error.add_note(traceback.format_exc())
        return None, error


def _stream(function: Callable, state: Any, jobs: Iterator, workers: int, ahead: int, threads: int) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        pool = [stack.enter_context(_Worker()) for _ in range(workers)]
        with _pack((function, state, threads)) as start:
            for worker in pool:
                worker.send(start)
        turns, pending = itertools.cycle(pool), collections.deque()

        def submit(count: int) -> None:
            for job in itertools.islice(jobs, count):
                pending.append(next(turns))
                with _pack(job) as message:
                    pending[-1].send(message)

        yield
        submit(workers * (1 + ahead))
        while pending:
            value = pending.popleft().receive()
            submit(1)
            yield value


class _Worker:
    """A process with a socket to it."""

    def __enter__(self) -> "_Worker":
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        return self

    def __exit__(self, *_: Any) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait()

    def send(self, message: BinaryIO) -> None:
        with self._lost():
            _send(self._socket, message)

    def receive(self) -> Any:
        with self._lost():
            value, error = _receive(self._socket)
        if error:
            raise error
        return value

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            raise UserError(
                f"a worker process ended with code {self._process.wait()}: see what it printed, or, if it was killed "
                "(-9), use fewer workers, which takes less memory."
            ) from error


# --- Messages ---------------------------------------------------------------------------------------------------------


def _pack(value: Any) -> BinaryIO:
    """The parts of a value, aligned, in a file without a name: nothing is left of it when all who have it open end."""
    if hasattr(os, "memfd_create"):  # which /dev/shm, of 64 MiB in containers, does not bound
        file = os.fdopen(os.memfd_create("message"), "wb")
    else:
        file = tempfile.TemporaryFile("wb")  # noqa: SIM115
    arrays: list[pickle.PickleBuffer] = []
    sizes, rest = [], pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    for part in (rest, *(array.raw() for array in arrays)):
        file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
        file.write(part)
        sizes.append(len(part))
    file.write(struct.pack(f"<{len(sizes) + 1}Q", *sizes, len(sizes)))
    file.flush()
    return file


def _unpack(memory: memoryview) -> Any:
    (count,) = struct.unpack_from("<Q", memory, len(memory) - 8)
    parts, at = [], 0
    for size in struct.unpack_from(f"<{count}Q", memory, len(memory) - 8 * (count + 1)):
        at += -at % _ALIGNMENT
        parts.append(memory[at : at + size])
        at += size
    return pickle.loads(parts[0], buffers=parts[1:])  # noqa: S301, from a process of our own


def _send(connection: socket.socket, message: BinaryIO) -> None:
    socket.send_fds(connection, [b"."], [message.fileno()])


def _receive(connection: socket.socket) -> Any:
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        raise EOFError
    with open(descriptors[0], "rb+") as file:
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        return _unpack(memoryview(mmap.mmap(file.fileno(), 0, flags)))
