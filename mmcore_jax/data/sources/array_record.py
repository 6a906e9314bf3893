"""Native shards: ArrayRecord files of msgpack examples, group_size 1."""

from array_record.python.array_record_module import ArrayRecordReader

from mmcore_jax import config
from mmcore_jax.config import UserError
from mmcore_jax.data import example as example_lib
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.sources.sharded import Cache, Sharded

WRITER_OPTIONS = "group_size:1,uncompressed"  # images are compressed already, and unpacking takes time all the same
_OPEN_FILES = 256
_OPTIONS = dict(options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)


class Source(Sharded):
    """Native shards. The library reads local files and gs://."""

    def __init__(self, name: str, settings: config.ArrayRecord) -> None:
        """Opens the footers; raises `UserError` as `open_source` does, and for stores that array_record cannot read."""
        self._readers = Cache(self._open, _OPEN_FILES)
        super().__init__(name, settings)

    def _open(self, shard: int) -> ArrayRecordReader:
        path = self.shards[shard].path
        if "://" in path and not path.startswith("gs://"):
            raise UserError(
                f"data source {self.name!r} cannot read {path}: array_record opens local files and gs:// only; copy "
                "the shards, or mount the store."
            )
        try:
            reader = ArrayRecordReader(path, **_OPTIONS)
        except RuntimeError as error:
            raise BadExample("shard does not open") from error
        if not reader.ok():  # a damaged footer raises nothing: the shard only looks empty
            raise BadExample("shard does not open")
        return reader

    def _count(self, shard: int) -> int:
        return self._open(shard).num_records()

    def _read(self, shard: int, row: int) -> Example:
        try:
            (record,) = self._readers[shard].read([row])
        except RuntimeError as error:
            raise BadExample("record cannot be read") from error
        return example_lib.decode(record)
