"""Time and memory of indexing and opening a synthetic set of tars, and how many records a second are read at random.

python -m tests.data.sources.index_scale --examples 1000000
"""

import argparse
import json
import os
import pathlib
import tempfile
import time

import numpy as np

from mmcore_jax.config import Column
from mmcore_jax.data.sources import index, open_source
from mmcore_jax.progress import progress
from tests.data.sources.formats import settings, tar

PER_TAR = 10_000
COLUMNS = (Column("text", "txt"), Column("image", "jpg", generate=True))


def write(directory: pathlib.Path, examples: int) -> None:
    """Writes tars of `PER_TAR` pairs."""
    for number in progress(range(examples // PER_TAR), examples // PER_TAR, "writing"):
        keys = [f"{number:05d}{i:06d}" for i in range(PER_TAR)]
        members = ((f"{key}.{column}", key.encode()) for key in keys for column in ("txt", "jpg"))
        (directory / f"{number:05d}.tar").write_bytes(tar(members))


def measure(directory: pathlib.Path, examples: int, workers: int) -> dict[str, float]:
    """Returns seconds (the build also in CPU time of all processes), bytes, and records a second."""
    given = settings(
        "webdataset", directory / f"{{00000..{examples // PER_TAR - 1:05d}}}.tar", task="t", segments=COLUMNS
    )
    start, cpu = time.monotonic(), sum(os.times()[:4])
    index.build_indexes("tars", given, progress, workers)
    built, cpu = time.monotonic(), sum(os.times()[:4]) - cpu
    before = _memory()
    opening = time.monotonic()
    source = open_source("tars", given)
    opened, memory = time.monotonic(), _memory() - before
    assert len(source) == examples
    order = np.random.default_rng(0).integers(0, examples, 20_000).tolist()
    reading = time.monotonic()
    for number in order:
        assert source[number]["segments"][0]["text"] == source[number]["id"]
    return {
        "build_seconds": built - start,
        "build_cpu_seconds": cpu,
        "index_bytes": sum(path.stat().st_size for path in directory.glob("*.index")),
        "open_seconds": opened - opening,
        "open_memory": memory,
        "memory_after_reading": _memory() - before,
        "records_per_second": len(order) / (time.monotonic() - reading),
    }


def _memory() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder), arguments.examples)
        print(json.dumps(measure(pathlib.Path(folder), arguments.examples, arguments.workers), indent=1))
