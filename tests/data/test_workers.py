"""Worker processes: values in order, errors where they belong, and none of the libraries that make starting slow."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mmcore_jax.config import UserError
from mmcore_jax.data import pipeline, workers
from tests.data import test_pipeline

data = test_pipeline.data


def square(state, job):
    """Of the last job it says so late."""
    time.sleep(0.05 * (job == 0))
    return os.getpid(), np.full(1000, job**2), state


def divide(state, job):
    if job == 3:
        raise UserError("three is too much")
    return state / job


def die(_, job):
    if job == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


@pytest.mark.parametrize("threads", [1, 2])
def test_values_come_in_order_from_several_processes(threads):
    values = list(workers.stream(square, "state", range(9), workers=2, ahead=2, threads=threads))
    assert [int(array[0]) for _, array, _ in values] == [job**2 for job in range(9)]
    assert len({process for process, _, _ in values} - {os.getpid()}) == 2
    assert {state for _, _, state in values} == {"state"}


def test_arrays_stay_when_the_workers_are_gone():
    arrays = [array for _, array, _ in workers.run(square, None, range(4), 2)]
    for job, array in enumerate(arrays):
        assert array.ctypes.data % 64 == 0
        array += 1
        np.testing.assert_array_equal(array, job**2 + 1)


def test_no_more_jobs_are_taken_than_asked_for():
    taken = []
    values = workers.stream(square, None, (taken.append(job) or job for job in range(100)), workers=2, ahead=1)
    next(values)
    assert len(taken) == 5
    values.close()


def test_what_a_job_raises_is_raised_in_its_place():
    values = workers.stream(divide, 6, iter([1, 2, 3]), workers=2, ahead=0)
    assert [next(values), next(values)] == [6.0, 3.0]
    with pytest.raises(UserError, match="three is too much"):
        next(values)


def test_a_worker_that_is_killed_is_named():
    with pytest.raises(UserError, match=r"ended with code -9.*use fewer workers"):
        list(workers.run(die, None, [1, 2, 3], 2))


def test_nothing_is_left_of_workers_that_are_not_asked_any_more():
    values = workers.stream(square, None, range(100), workers=1, ahead=1)
    process = next(values)[0]
    del values
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize("layout", ["interleaved", "pairs"])
def test_preparing_a_batch_needs_neither_jax_nor_transformers(data, tmp_path, layout):
    batches = pipeline.Batches(test_pipeline.make_config(data, layout=layout))
    (tmp_path / "job").write_bytes(pickle.dumps((pipeline._make, batches._reader, batches._plan(0))))
    code = (
        "import pickle, sys\n"
        "make, reader, planned = pickle.load(open(sys.argv[1], 'rb'))\n"
        "batch = make(reader, planned)\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'transformers', 'torch', 'grain'} & set(sys.modules)\n"
        "print(sorted(heavy), batch.ids == eval(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "job", repr(batches[0].ids)]
    assert subprocess.check_output(command, text=True, cwd=test_pipeline.ROOT).strip() == "[] True"


def test_workers_start_at_once_and_agree_with_threads(data):
    settings = test_pipeline.make_config(data)
    expected = [batch.ids for batch in pipeline.Batches(settings)]
    for workers_, threads in ((0, 2), (2, 1), (1, 2)):
        changed = dataclasses.replace(settings.data, workers=workers_, threads=threads)
        batches = pipeline.Batches(dataclasses.replace(settings, data=changed)).iterate(0)
        assert [batch.ids for batch in batches] == expected
