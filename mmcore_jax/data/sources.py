"""Where examples come from: random access over native shards (ArrayRecord files of msgpack examples)."""

import glob
import pathlib
import re

import grain

from mmcore_jax.config import UserError
from mmcore_jax.data import example as example_lib
from mmcore_jax.data.example import Example

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.[a-z_]+$")


class ShardSource:
    """The examples of all shards that a glob matches, in the order of their names."""

    def __init__(self, name: str, pattern: str) -> None:
        """Opens the shards.

        Raises:
          UserError: if nothing matches, or a shard of a numbered set is missing.
        """
        self.name = name
        self.paths = sorted(glob.glob(pattern))
        if not self.paths:
            raise UserError(
                f"data source {name!r} finds no shards at {pattern}: "
                "check the path, or make them with python -m mmcore_jax.prepare."
            )
        _check_complete(name, self.paths)
        try:
            self._records = grain.sources.ArrayRecordDataSource(self.paths)
        except Exception as error:  # array_record raises its own C++ status types
            raise UserError(f"data source {name!r} cannot read {pattern}: {error}") from error
        if not len(self._records):
            raise UserError(f"data source {name!r} is empty: the shards at {pattern} hold no records.")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        """Returns an example; raises `BadExample` for a record that is not one."""
        return example_lib.decode(self._records[index])

    def where(self, index: int) -> str:
        """What a message calls a record."""
        return f"record {index} of {self.name}"

    def fingerprint(self) -> str:
        """Stands for what the shards hold, by their names and sizes."""
        return repr([(pathlib.Path(path).name, pathlib.Path(path).stat().st_size) for path in self.paths])


def _check_complete(name: str, paths: list[str]) -> None:
    """Raises `UserError` naming the first shard that a set `-00000-of-0000N` lacks."""
    present = set(paths)
    for path in paths:
        match = _SHARD.search(path)
        if not match:
            continue
        for number in range(int(match[2])):
            expected = path[: match.start(1)] + f"{number:05d}" + path[match.end(1) :]
            if expected not in present and not pathlib.Path(expected).exists():
                raise UserError(
                    f"data source {name!r} lacks the shard {expected}: copy it there or prepare the data again."
                )
