"""Parquet files; a row is read with its row group, which is the unit that parquet compresses.

Shuffled reading decodes about a row group for each row once the row groups outgrow the cache: convert large sets into
native shards.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmcore_jax import config
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.sources import document, files
from mmcore_jax.data.sources.sharded import Cache, Sharded

_CACHE_BYTES = 1 << 28
_FOOTER, _GROUP = "parquet footer is damaged", "parquet row group is damaged"
_DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)  # what Arrow raises on it


class Source(Sharded):
    """Rows of parquet files."""

    def __init__(self, name: str, settings: config.Parquet) -> None:
        """Reads the footers; raises `UserError` as `open_source` does."""
        self._groups = Cache(self._decode, _CACHE_BYTES, _size)
        self._group_ends: dict[int, np.ndarray] = {}  # by shard: how many rows come before the end of each group
        super().__init__(name, settings)

    def _open(self, shard: int) -> pq.ParquetFile:
        path = self.shards[shard].path
        return pq.ParquetFile(path if "://" not in path else files.open_binary(path), page_checksum_verification=True)

    def _count(self, shard: int) -> int:
        try:
            with self._open(shard) as file:
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                total = file.metadata.num_rows
        except _DAMAGE as error:
            raise BadExample(_FOOTER) from error
        if sum(rows) != total or min(rows, default=0) < 0:
            raise BadExample(_FOOTER)
        self._group_ends[shard] = np.cumsum(rows)
        return total

    def _decode(self, key: tuple[int, int]) -> pa.Table | None:
        """The columns of a row group that examples need; None if it is damaged."""
        shard, group = key
        try:
            with self._open(shard) as file:
                names = [name for name in file.schema_arrow.names if self._needs(name)]
                return file.read_row_group(group, names, use_threads=False)
        except _DAMAGE:
            return None

    def _needs(self, column: str) -> bool:
        segments = self._settings.segments
        wanted = (
            ["segments"] if segments is None else [name for segment in segments for name in document.names(segment)]
        )
        return any(name == column or name.startswith(f"{column}.") for name in ["id", "task", *wanted])

    def _read(self, shard: int, row: int) -> Example:
        ends = self._group_ends[shard]
        group = int(np.searchsorted(ends, row, side="right"))
        table, offset = self._groups[shard, group], row - (int(ends[group - 1]) if group else 0)
        if table is None or offset >= table.num_rows:
            raise BadExample(_GROUP)
        try:
            (record,) = table.slice(offset, 1).to_pylist()
        except UnicodeDecodeError as error:
            raise BadExample("text is not UTF-8") from error
        return document.make_example(record, self._settings, self._id(shard, row), _no_image)


def _size(table: pa.Table | None) -> int:
    return table.nbytes if table is not None else 0


def _no_image(name: str) -> bytes:
    raise BadExample("an image has a path and no bytes")
