"""JSON-lines with a folder of images: one object a line, whose image paths start in that folder."""

import array
import pathlib

import fsspec
import pyarrow as pa

from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.sources import document, files, sharded
from mmcore_jax.data.sources.files import Shard
from mmcore_jax.data.sources.index import Indexed


class Source(Indexed):
    """Records of indexed files of JSON lines."""

    def fingerprint(self) -> str:
        """As of other shards, and of where the folder of images lies as seen from them."""
        beside = files.relative_names([self.shards[0].path, files.absolute(self._settings.images)])
        return sharded.fingerprint(self._settings, [super().fingerprint(), beside])

    def _read(self, shard: int, row: int) -> Example:
        offsets, (path, size, _) = self._indices[shard].column("offset"), self.shards[shard]
        offset = offsets[row].as_py()
        end = offsets[row + 1].as_py() if row + 1 < len(offsets) else size
        record = document.parse_object(files.read(path, offset, end - offset))
        return document.make_example(record, self._settings, self._id(shard, row), self._image)

    def _image(self, name: str) -> bytes:
        path = pathlib.PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise BadExample("an image path leaves the folder of images")
        try:
            with fsspec.open(f"{self._settings.images}/{path}", "rb") as file:
                return file.read()
        except FileNotFoundError as error:
            raise BadExample("a named image is missing") from error
        except (OSError, ValueError) as error:
            raise BadExample(f"a named image cannot be read ({type(error).__name__})") from error


def index_shard(shard: Shard) -> pa.RecordBatch:
    """Where the lines begin that are not blank."""
    offsets, position = array.array("q"), 0
    with files.open_binary(shard.path) as file:
        for line in file:
            if line.strip():
                offsets.append(position)
            position += len(line)
    return pa.record_batch([pa.array(offsets, pa.int64())], ["offset"])
