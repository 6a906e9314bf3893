"""WebDataset: tar files in which neighbouring members KEY.* are one record, the key ending at the name's first dot.

Extensions are compared in lower case. What follows damage is found again at the next header; what of the tar lies
between is one bad record, as nobody can tell how many it held.
"""

import array
import tarfile
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from mmcore_jax.config import UserError
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.sources import document, files
from mmcore_jax.data.sources.files import Shard
from mmcore_jax.data.sources.index import Indexed

_DAMAGED = "tar header is damaged"
_DUPLICATE = "duplicate member"
_CHUNK = 1 << 20  # bytes
_TORN = (tarfile.TarError, ValueError, LookupError, ArithmeticError, EOFError)  # what tarfile raises on damage


class Source(Indexed):
    """Records of indexed tar files. As documents they are KEY.json, which names its images KEY.0.jpg and so on."""

    def _read(self, shard: int, row: int) -> Example:
        batch = self._indices[shard]
        damage = batch.column("damage")[row].as_py()
        if damage:
            raise BadExample(damage)
        key = batch.column("key")[row].as_py()
        members = _Members(self.shards[shard].path, batch.column("members")[row].as_py())
        record = members if self._settings.segments is not None else _document(members)
        return document.make_example(record, self._settings, key, lambda name: members.named(key, name))

    def _label(self, shard: int, row: int) -> str:
        key = self._indices[shard].column("key")[row].as_py()
        return f"key {key}" if key else f"record {row}"


class _Members(Mapping):
    """The members of a record by extension, read when asked for."""

    def __init__(self, path: str, members: list[dict]) -> None:
        self._path = path
        self._places = {member["extension"]: (member["offset"], member["size"]) for member in members}

    def __getitem__(self, extension: str) -> bytes:
        return files.read(self._path, *self._places[extension])

    def __contains__(self, extension: object) -> bool:
        return extension in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def named(self, key: str, name: str) -> bytes:
        """The member of a name, which may leave out the directory of the key."""
        name = name.removeprefix("./")
        for prefix in (f"{key}.", f"{key.rpartition('/')[2]}."):
            if name.startswith(prefix) and name[len(prefix) :].lower() in self:
                return self[name[len(prefix) :].lower()]
        raise BadExample("a named image is missing")


def _document(members: _Members) -> dict:
    if "json" not in members:
        raise BadExample("member 'json' is missing")
    return document.parse_object(members["json"])


# --- The index --------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A member of a tar, or a stretch that is no tar: that has no name."""

    name: str
    offset: int
    size: int
    readable: bool  # a regular file


def index_shard(shard: Shard) -> pa.RecordBatch:
    """Reads the headers of a tar: a row (key, damage, members: [(extension, offset, size)]) for each record.

    Raises:
      UserError: if the tar is compressed.
    """
    rows, torn = _Rows(), False
    with files.open_binary(shard.path) as file:
        for entry in _entries(file, shard):
            key, extension, safe = _split(entry.name)
            if not entry.name:
                torn = True
            if not key or not extension:
                continue  # no member of a record, as webdataset has it
            if torn:
                rows.tear(key)
            torn = False
            rows.enter(key)
            if safe and entry.readable:  # else the record lacks it
                rows.add(extension, entry.offset, entry.size)
    if torn:
        rows.tear("")
    return rows.batch()


class _Rows:
    """The rows of an index, column by column."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._damage: list[str | None] = []
        self._firsts, self._codes = array.array("i"), array.array("i")
        self._offsets, self._sizes = array.array("q"), array.array("q")
        self._extensions: dict[str, int] = {}
        self._present: set[str] = set()

    def enter(self, key: str, damage: str | None = None) -> None:
        """Begins another record, unless the last one is of this key."""
        if self._keys and self._keys[-1] == key:
            return
        self._keys.append(key)
        self._damage.append(damage)
        self._firsts.append(len(self._codes))
        self._present.clear()

    def tear(self, key: str) -> None:
        """Notes damage before a member of `key`: inside that record, or a bad record of its own."""
        if self._keys and self._keys[-1] == key:
            self._damage[-1] = _DAMAGED
        else:
            self.enter("", _DAMAGED)

    def add(self, extension: str, offset: int, size: int) -> None:
        """Gives the last record a member."""
        if extension in self._present:
            self._damage[-1] = self._damage[-1] or _DUPLICATE
        self._present.add(extension)
        self._codes.append(self._extensions.setdefault(extension, len(self._extensions)))
        self._offsets.append(offset)
        self._sizes.append(size)

    def batch(self) -> pa.RecordBatch:
        """Returns the columns."""
        extensions = pa.array(list(self._extensions), pa.string())
        members = {
            "extension": pa.DictionaryArray.from_arrays(_column(self._codes), extensions),
            "offset": _column(self._offsets),
            "size": _column(self._sizes),
        }
        members = pa.StructArray.from_arrays(list(members.values()), list(members))
        self._firsts.append(len(self._codes))
        return pa.record_batch(
            {
                "key": pa.array(self._keys, pa.string()),
                "damage": pa.array(self._damage, pa.string()),
                "members": pa.ListArray.from_arrays(_column(self._firsts), members),
            }
        )


def _column(values: array.array) -> pa.Array:
    kind = pa.int32() if values.typecode == "i" else pa.int64()
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _split(name: str) -> tuple[str, str, bool]:
    """Key and extension of a member, and whether its path stays inside the shard."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    safe = ".." not in parts and not name.startswith("/")
    parts = [part for part in parts if part != ".."] or [""]
    stem, _, extension = parts[-1].partition(".")
    return "/".join([*parts[:-1], stem]) if stem else "", extension.lower(), safe


def _entries(file: BinaryIO, shard: Shard) -> Iterator[_Entry]:
    """The members of a tar that are no directories, and what lies between them."""
    if file.read(2) == b"\x1f\x8b":
        raise UserError(f"{shard.path} is compressed: random access needs a plain tar; unpack it with gunzip.")
    position = 0  # where the next header is due
    resume = 0  # where to look for it
    while resume < shard.size:
        file.seek(resume)
        try:
            # Zeros are passed over: tars may be concatenated, and a header after damage has to be searched for.
            tar = tarfile.TarFile(fileobj=file, ignore_zeros=True, encoding="utf-8", errors="surrogateescape")
            while member := tar.next():
                tar.members.clear()
                if member.offset > position and _is_torn(file, position, member.offset):
                    yield _Entry("", position, 0, False)
                if tar.offset <= member.offset:  # a size below zero, which would lead back here
                    resume = member.offset
                    raise tarfile.ReadError("negative size")
                if not member.isdir():
                    size = min(member.size, max(shard.size - member.offset_data, 0) + 1)  # what tells that it is cut
                    readable = member.isreg() and not member.issparse()
                    yield _Entry(_printable(member.name), member.offset_data, size, readable)
                position = resume = tar.offset
                if position > shard.size:  # the tar ends in this member, or it lies about its size
                    position, resume = shard.size, member.offset_data
                    break
            else:
                resume = shard.size
        except _TORN:
            resume += tarfile.BLOCKSIZE
    if not shard.size or _is_torn(file, position, shard.size):
        yield _Entry("", position, 0, False)


def _is_torn(file: BinaryIO, start: int, end: int) -> bool:
    """Whether a stretch between members is more than padding and a global header."""
    file.seek(start)
    if file.read(tarfile.BLOCKSIZE)[156:157] == tarfile.XGLTYPE:
        return False
    file.seek(start)
    return any(file.read(min(_CHUNK, end - at)).strip(b"\0") for at in range(start, end, _CHUNK))


def _printable(name: str) -> str:
    if name.isascii():
        return name
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
