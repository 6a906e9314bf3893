"""Any source as native shards: in order, without its bad records, and resumable."""

import collections
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter

from mmcore_jax.config import UserError
from mmcore_jax.data import example as example_lib
from mmcore_jax.data import image as image_lib
from mmcore_jax.data import workers
from mmcore_jax.data.example import BadExample
from mmcore_jax.data.sources import RandomAccess
from mmcore_jax.data.sources.array_record import WRITER_OPTIONS
from mmcore_jax.progress import Progress
from mmcore_jax.writing import write_text


class Converted(NamedTuple):
    """How many examples were written, and how many records were skipped by reason."""

    examples: int
    bad: collections.Counter[str]


def convert(
    source: RandomAccess, directory: str | pathlib.Path, shards: int, progress: Progress, worker_count: int
) -> Converted:
    """Writes `NAME-00000-of-0000N.array_record`, and `NAME.json`, which says what is finished.

    Called again after it was stopped, it writes what is missing; a shard is there as a whole or not at all.

    Args:
      source: what to convert; `NAME` is its name.
      directory: where to, a local folder.
      shards: into how many files.
      progress: `(items, total, label)`; an item is a shard.
      worker_count: processes.

    Raises:
      UserError: if the directory holds another conversion of that name, or cannot be written.
    """
    identity = {"source": source.fingerprint(), "records": len(source), "shards": shards}
    job = _Job(source, pathlib.Path(directory), shards, identity)
    try:
        job.directory.mkdir(parents=True, exist_ok=True)
        finished = job.read_finished()
        for partial in job.directory.glob(f"{source.name}-*.partial"):  # of a run that was killed
            partial.unlink()
        todo = [shard for shard in range(shards) if str(shard) not in finished]
        done = workers.run(_write, job, todo, worker_count)
        for number, counts in progress(done, len(todo), f"converting {source.name}"):
            finished[str(todo[number])] = counts
            job.write_finished(finished)
    except OSError as error:
        raise UserError(f"cannot write {directory} ({error.strerror}): choose another directory.") from error
    bad = collections.Counter()
    for counts in finished.values():
        bad.update(counts["bad"])
    return Converted(sum(counts["examples"] for counts in finished.values()), bad)


class _Job(NamedTuple):
    source: RandomAccess
    directory: pathlib.Path
    shards: int
    identity: dict

    def path(self, shard: int) -> pathlib.Path:
        return self.directory / f"{self.source.name}-{shard:05d}-of-{self.shards:05d}.array_record"

    def manifest(self) -> pathlib.Path:
        return self.directory / f"{self.source.name}.json"

    def read_finished(self) -> dict[str, dict]:
        """Counts by shard, of those that are there."""
        if not self.manifest().is_file():
            self.write_finished({})
            return {}
        found = json.loads(self.manifest().read_text())
        if found["job"] != self.identity:
            raise UserError(
                f"{self.manifest()} is of another source or number of shards: delete it and its shards, or choose "
                "another directory."
            )
        return {shard: counts for shard, counts in found["finished"].items() if self.path(int(shard)).is_file()}

    def write_finished(self, finished: dict[str, dict]) -> None:
        write_text(self.manifest(), json.dumps({"job": self.identity, "finished": finished}))


def _write(job: _Job, shard: int) -> dict:
    """Writes one shard; returns its counts."""
    bad: collections.Counter[str] = collections.Counter()
    written, partial = 0, job.path(shard).with_suffix(f".{os.getpid()}.partial")
    try:
        writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        for record in _encode(job, shard, bad):
            writer.write(record)
            written += 1
        writer.close()
    except RuntimeError as error:  # of array_record, for example where the disk is full
        raise OSError(errno.EIO, str(error)) from error
    os.replace(partial, job.path(shard))
    return {"examples": written, "bad": bad}


def _encode(job: _Job, shard: int, bad: collections.Counter[str]) -> Iterator[bytes]:
    first, last = (len(job.source) * edge // job.shards for edge in (shard, shard + 1))
    for index in range(first, last):
        try:
            example = job.source[index]
            image_lib.check(example)
            yield example_lib.encode(example)
        except BadExample as reason:
            bad[str(reason)] += 1
