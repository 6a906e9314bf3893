"""Where examples come from: random access to records of several formats, a file a format.

A record that is none is a `BadExample` at its place: it never shifts the others.
"""

import importlib
from collections.abc import Mapping
from typing import Protocol

from mmcore_jax.config import Source, Tfds, UserError
from mmcore_jax.data.example import Example
from mmcore_jax.data.sources import files


class RandomAccess(Protocol):
    """What every source offers. It pickles in a few kilobytes, and any number of threads may read it."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Returns an example; raises `BadExample` for a record that is not one."""

    def where(self, index: int) -> str:
        """The place of a record, for people: its file and its key or number there."""

    def fingerprint(self) -> str:
        """A hash of shard names (below their common directory), sizes, ends, and the settings that shape examples."""


def open_sources(settings: Mapping[str, Source]) -> list[RandomAccess]:
    """Opens all of `config.data.sources`, or of `config.gauges.sources`; raises as `open_source` does."""
    return [open_source(name, source) for name, source in settings.items()]


def check_found(settings: Mapping[str, Source]) -> None:
    """Raises `UserError` for a source that there is nothing of, or not all shards."""
    for name, source in settings.items():
        if isinstance(source, Tfds):
            open_source(name, source)
        else:
            files.find(name, source.shards)


def open_source(name: str, settings: Source) -> RandomAccess:
    """Opens a source of `config.data.sources`.

    Raises:
      UserError: if there are no shards, one of a numbered set is missing, or one has no index of its present content.
    """
    # A format's library is imported with its first source: some take a second.
    source = importlib.import_module(f"{__name__}.{settings.kind}").Source(name, settings)
    if not len(source):
        raise UserError(f"data source {name!r} is empty: the shards at {settings.shards} hold no records.")
    return source
