"""Shards as files, local or remote: finding them, reading ranges of bytes, replacing whole files.

Remote paths are fsspec's. `etils.epath` reaches fewer stores, and through fsspec; it opens files, where fsspec also
reads a range in one request that leaves nothing open (threads and forked processes need not care), and lists sizes
together with names.
"""

import fnmatch
import itertools
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from mmcore_jax.config import UserError
from mmcore_jax.data.example import BadExample

INDEX_SUFFIX = ".index"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_RANGES = re.compile(r"\*?(?:\{\d+\.\.\d+\}\*?)+")  # with the stars beside them: `**` means something else
_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.[a-z_.]+$")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
_DANGLING = "dangling link"
_VERSIONS = ("mtime", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "created")


class Shard(NamedTuple):
    """A file of records; `version` changes whenever its content does."""

    path: str
    size: int  # bytes
    version: str


def find(name: str, patterns: str | Sequence[str]) -> list[Shard]:
    """The shards of a source: pattern after pattern, sorted by name within each, none twice.

    Raises:
      UserError: if a pattern matches nothing or cannot be listed, a shard of a range or numbered set is missing, or one
        is compressed.
    """
    patterns = patterns.split(",") if isinstance(patterns, str) else patterns
    shards = {shard.path: shard for pattern in patterns for shard in _list(name, pattern.strip())}
    _check_complete(name, shards)
    for path in shards:
        if path.endswith(_COMPRESSED):
            raise UserError(f"data source {name!r} cannot read {path}: random access needs it uncompressed; unpack it.")
    return list(shards.values())


def read(path: str, offset: int, size: int) -> bytes:
    """Reads `size` bytes.

    Raises:
      BadExample: if they are not there.
    """
    try:
        content = _read_local(path, offset, size) if _is_local(path) else _read_remote(path, offset, size)
    except OSError as error:
        raise BadExample(f"shard cannot be read ({type(error).__name__})") from error
    if len(content) < size:
        raise BadExample("shard is truncated")
    return content


def read_all(path: str) -> bytes:
    """Reads a whole remote file; raises `OSError`."""
    filesystem, inner = fsspec.url_to_fs(path)
    return filesystem.cat_file(inner)


def open_binary(path: str) -> BinaryIO:
    """Opens a file that is read from its beginning to its end."""
    return fsspec.open(path, "rb").open()


def replace(path: str, content: bytes) -> None:
    """Writes a whole file, which others see complete or not at all.

    Raises:
      OSError: if it cannot be written.
    """
    if not _is_local(path):
        filesystem, inner = fsspec.url_to_fs(path)
        filesystem.pipe_file(inner, content)  # object stores replace atomically
        return
    partial = f"{path}.{os.getpid()}{INDEX_SUFFIX}"
    with open(partial, "wb") as file:
        file.write(content)
    os.replace(partial, path)


def exists(path: str) -> bool:
    """Whether there is such a file."""
    filesystem, inner = fsspec.url_to_fs(path)
    return filesystem.exists(inner)


def absolute(path: str) -> str:
    """A path as shards have it: a local one from the root, a remote one with its protocol."""
    return _shown(*fsspec.url_to_fs(path))


def relative_names(paths: Iterable[str]) -> list[str]:
    """Paths below their common directory."""
    parts = [path.split("/") for path in paths]
    levels = zip(*(names[:-1] for names in parts))
    common = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, levels)))
    return ["/".join(names[common:]) for names in parts]


def _shown(filesystem: AbstractFileSystem, inner: str) -> str:
    return inner if isinstance(filesystem, LocalFileSystem) else filesystem.unstrip_protocol(inner)


def _is_local(path: str) -> bool:
    return "://" not in path


def _read_local(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def _read_remote(path: str, offset: int, size: int) -> bytes:
    filesystem, inner = fsspec.url_to_fs(path)
    return filesystem.cat_file(inner, offset, offset + size)


def _list(name: str, pattern: str) -> Iterator[Shard]:
    if set("{}") & set(_RANGE.sub("", pattern)):
        raise UserError(f"data source {name!r} has a brace that is no range such as {{00000..00999}} in {pattern}.")
    try:
        filesystem, stars = fsspec.url_to_fs(_RANGES.sub("*", pattern))
        listed = {path: _followed(info) for path, info in filesystem.glob(stars, detail=True).items()}
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"data source {name!r} cannot list {pattern}: {error}.") from error
    shards = (path for path in sorted(listed) if not path.endswith(INDEX_SUFFIX))
    found = {path: listed[path] for path in shards if listed[path]["type"] in ("file", _DANGLING)}
    if not found:
        raise UserError(
            f"data source {name!r} finds no shards at {pattern}: "
            "check the path, or make them with python -m mmcore_jax.prepare."
        )
    for path in _in_ranges(name, pattern, found):
        if found[path]["type"] == _DANGLING:
            raise _missing(name, path)
        version = next((str(found[path][key]) for key in _VERSIONS if found[path].get(key)), "")
        yield Shard(_shown(filesystem, path), found[path]["size"] or 0, version)


def _followed(info: dict) -> dict:
    """What is listed of a path; of a local link, which fsspec describes as it is, what lies where it leads."""
    if not info.get("islink"):
        return info
    try:
        there = os.stat(info["name"])
    except FileNotFoundError:
        return {**info, "type": _DANGLING}
    kind = "file" if stat.S_ISREG(there.st_mode) else "other"
    return {**info, "type": kind, "size": there.st_size, "mtime": there.st_mtime}


def _in_ranges(name: str, pattern: str, found: Iterable[str]) -> Iterator[str]:
    """Those of the files found that lie in the ranges of a pattern, in the order of the ranges."""
    texts = _RANGE.split(pattern)
    if len(texts) == 1:
        yield from found
        return
    ranges = [_numbers(first, last) for first, last in zip(texts[1::3], texts[2::3])]
    for numbers in itertools.product(*ranges):
        expected = texts[0] + "".join(number + text for number, text in zip(numbers, texts[3::3]))
        inner = fsspec.url_to_fs(expected)[1]
        matches = [inner] if inner in found else fnmatch.filter(found, inner)
        if not matches:
            raise _missing(name, expected)
        yield from matches


def _numbers(first: str, last: str) -> list[str]:
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _check_complete(name: str, paths: Collection[str]) -> None:
    """Raises `UserError` naming the first shard that a set `-00000-of-0000N` lacks."""
    matches = filter(None, map(_NUMBERED.search, paths))
    sets = dict.fromkeys((m.string[: m.start(1)], int(m[2]), m.string[m.end(1) :]) for m in matches)
    for prefix, total, suffix in sets:
        for number in range(total):
            expected = f"{prefix}{number:05d}{suffix}"
            if expected not in paths and not exists(expected):
                raise _missing(name, expected)


def _missing(name: str, path: str) -> UserError:
    return UserError(f"data source {name!r} lacks the shard {path}: copy it there or prepare the data again.")
