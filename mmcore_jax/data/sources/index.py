"""Indices beside shards whose format has none: an Arrow file of one row a record, memory-mapped where it is local.

An index knows the size and version of its shard, and is refused beside any other.
"""

import importlib
import shlex

import pyarrow as pa

from mmcore_jax import config
from mmcore_jax.config import UserError
from mmcore_jax.data import workers
from mmcore_jax.data.sources import files
from mmcore_jax.data.sources.files import INDEX_SUFFIX, Shard
from mmcore_jax.data.sources.sharded import Cache, Sharded
from mmcore_jax.progress import Progress

KINDS = ("webdataset", "json_lines")
_COMMAND = "python -m mmcore_jax.prepare --index {} {}"
_LAYOUT = "1"  # of the index files


def build_indexes(name: str, settings: config.Source, progress: Progress, worker_count: int) -> int:
    """Indexes the shards of a source that need an index and have none, or a stale one; returns how many those were.

    Raises:
      UserError: if the shards are not found or not of that format, or an index beside them cannot be read or written.
    """
    if settings.kind not in KINDS:
        return 0
    todo = [shard for shard in files.find(name, settings.shards) if _load(shard) is None]
    done = workers.run(_build, settings.kind, todo, worker_count)
    return len(list(progress(done, len(todo), "indexing")))


def load(name: str, settings: config.WebDataset | config.JsonLines, shard: Shard) -> pa.RecordBatch:
    """The index of a shard.

    Raises:
      UserError: if there is none, it cannot be read, or it is of another version of the shard.
    """
    batch = _load(shard)
    if batch is not None:
        return batch
    patterns = settings.shards if isinstance(settings.shards, str) else ",".join(settings.shards)
    command = _COMMAND.format(settings.kind, shlex.quote(patterns))
    fault = "is of another version of it" if files.exists(shard.path + INDEX_SUFFIX) else "does not exist"
    raise UserError(f"data source {name!r}: the index of {shard.path} {fault}: run {command}.")


class Indexed(Sharded):
    """A source of shards that have an index."""

    def __init__(self, name: str, settings: config.WebDataset | config.JsonLines) -> None:
        """Opens the indices; raises `UserError` as `open_source` does."""
        self._indices = Cache(self._open_index)
        super().__init__(name, settings)

    def _open_index(self, shard: int) -> pa.RecordBatch:
        return load(self.name, self._settings, self.shards[shard])

    def _count(self, shard: int) -> int:
        return self._indices[shard].num_rows


def _load(shard: Shard) -> pa.RecordBatch | None:
    path = shard.path + INDEX_SUFFIX
    try:
        opened = pa.memory_map(path) if "://" not in path else pa.BufferReader(files.read_all(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        if isinstance(error, PermissionError) and "://" in path:  # what some stores say of what is not there
            return None
        raise UserError(f"cannot read the index {path}: {error}.") from error
    try:
        with opened as file:
            batch = pa.ipc.open_file(file).get_batch(0)  # stays mapped, without a descriptor
    except (OSError, pa.ArrowInvalid):  # what Arrow raises on damage
        return None
    return batch if batch.schema.metadata == _metadata(shard) else None


def _build(kind: str, shard: Shard) -> None:
    batch = importlib.import_module(f"mmcore_jax.data.sources.{kind}").index_shard(shard)
    batch = batch.replace_schema_metadata(_metadata(shard))
    file = pa.BufferOutputStream()
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    path = shard.path + INDEX_SUFFIX
    try:
        files.replace(path, file.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}): an index lies beside its shard.") from error


def _metadata(shard: Shard) -> dict[bytes, bytes]:
    return {b"layout": _LAYOUT.encode(), b"size": str(shard.size).encode(), b"version": shard.version.encode()}
