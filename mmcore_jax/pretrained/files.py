"""Files of published checkpoints: settings and headers checked, tensors mapped and never held, directories written
whole or not at all.

The format of safetensors: eight bytes of header length, a JSON header of {name: dtype, shape, data_offsets}, then the
bytes. Read here because the published reader has no bfloat16 in NumPy, nor slices that leave no pages behind.
"""

import contextlib
import dataclasses
import json
import math
import mmap
import os
import pathlib
import shutil
import struct
import tempfile
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mmcore_jax import config
from mmcore_jax.config import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9
_LENGTH = struct.Struct("<Q")
_AGAIN = "fetch the file again"

# --- Settings --------------------------------------------------------------------------------------------------------

Read = typing.TypeVar("Read", bound="Section")


class Settings(dict):
    """An object of a JSON file, which it keeps under `path`; a key that it lacks is a mistake that names the file."""

    def __init__(self, values: Mapping[str, Any], file: pathlib.Path, path: str = "") -> None:
        super().__init__(values)
        self.file, self._path = file, path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.file} has no {self.name(key)!r}: {_AGAIN}.")

    def name(self, key: str) -> str:
        """A key as the whole file has it."""
        return f"{self._path}{key}"

    def section(self, key: str) -> "Settings":
        """The object that a key holds."""
        if not isinstance(self[key], Settings):
            raise UserError(f"{self.name(key)} in {self.file} is {self[key]!r}, expected an object: {_AGAIN}.")
        return Settings(self[key], self.file, f"{self.name(key)}.")

    def read(self, expected: type[Read]) -> Read:
        """Converts the settings that `expected` names, and leaves all others aside.

        Raises:
          UserError: naming the file and the key, if one is missing or has another type, or none of the values, that
            `expected` allows.
        """
        types = typing.get_type_hints(expected, include_extras=True)
        _, *fields = dataclasses.fields(expected)
        keys = [field.name for field in fields if field.name in self or field.default is dataclasses.MISSING]
        values = {key: config.from_dict(types[key], self[key], self.name(key), self.file) for key in keys}
        return expected(self, **values)


@dataclasses.dataclass(frozen=True)
class Section:
    """What we read of `Settings`: subclasses name keys, their types, and what is meant where the file is silent."""

    source: Settings

    def require(self, key: str, fits: bool, expected: Any) -> None:
        """Raises `UserError` if the value of a key does not fit others."""
        if not fits:
            where = f"{self.source.name(key)} in {self.source.file}"
            raise UserError(f"{where} is {getattr(self, key)!r}, expected {expected}: {_AGAIN}.")

    def require_multiple(self, key: str, of: str) -> None:
        """Raises `UserError` if the value of a key is no multiple of that of another."""
        divisor = getattr(self, of)
        self.require(key, getattr(self, key) % divisor == 0, f"a multiple of {self.source.name(of)}, {divisor}")


def read_json(file: pathlib.Path) -> Settings:
    """Reads a JSON object.

    Raises:
      UserError: if it is missing or damaged; and later, for a key that it lacks.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: fetch it, and put it beside the weights.")
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_hook=lambda values: Settings(values, file))
    except ValueError as error:
        raise UserError(f"{file} is no valid JSON: {_AGAIN}.") from error
    if not isinstance(value, Settings):
        raise UserError(f"{file} holds no JSON object: {_AGAIN}.")
    return value


# --- Reading ----------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Where a tensor lies, and its name there."""

    name: str
    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint by name, as views of mapped files.

    Asking for one gives back the pages of the one before, which would count as memory of this process.
    """

    def __init__(self, stored: dict[str, Stored]) -> None:
        self._stored, self._maps, self._last = stored, {}, None
        for file in {tensor.file for tensor in stored.values()}:
            with file.open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._stored[name]
        self._give_back(tensor)
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"the tensor {self.where(name)} has the dtype {tensor.dtype}, which is none of {', '.join(DTYPES)}: "
                "convert it to one of them."
            )
        return np.ndarray(tensor.shape, DTYPES[tensor.dtype], self._maps[tensor.file], tensor.start)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def where(self, name: str) -> str:
        """The name of a tensor, and the file that it lies in, or the file or directory that it is missing from."""
        if name in self._stored:
            return f"{self._stored[name].name!r} of {self._stored[name].file}"
        files = {tensor.file for tensor in self._stored.values()}
        return f"{name!r} of {min(files) if len(files) == 1 else min(files).parent}"

    def _give_back(self, following: Stored) -> None:
        if self._last:
            start = self._last.start - self._last.start % mmap.PAGESIZE
            self._maps[self._last.file].madvise(mmap.MADV_DONTNEED, start, self._last.stop - start)
        self._last = following

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """The tensors that `names` maps to new names."""
        return Tensors({new: self._stored[old] for old, new in names.items()})


def open_tensors(directory: pathlib.Path, stem: str) -> Tensors:
    """Opens `STEM.safetensors`, or the shards that `STEM.safetensors.index.json` lists.

    Raises:
      UserError: if there is neither, a shard is missing, or a file is damaged.
    """
    whole, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if index.is_file():
        return Tensors(_read_shards(index))
    if whole.is_file():
        return Tensors(read_header(whole))
    if pickles := sorted(path.name for path in directory.glob("*.bin")):
        raise UserError(
            f"{directory} has its weights as a pickle only ({pickles[0]}), which can run code when it is opened: "
            f"fetch {whole.name} instead."
        )
    raise UserError(f"{directory} has no weights: fetch {whole.name}, or {index.name} and the shards that it lists.")


@dataclasses.dataclass(frozen=True)
class _Index(Section):
    weight_map: dict[str, str]


def _read_shards(index: pathlib.Path) -> dict[str, Stored]:
    listed = read_json(index).read(_Index)
    weight_map, stored = listed.weight_map, {}
    listed.require("weight_map", bool(weight_map), "at least one tensor")
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise UserError(f"{index.parent / shard} is missing, which {index.name} lists: {_AGAIN}.")
        stored |= read_header(index.parent / shard)
    for name, shard in weight_map.items():
        if name not in stored or stored[name].file.name != shard:
            raise UserError(
                f"the tensor {name!r} is not in {index.parent / shard}, where {index.name} puts it: {_AGAIN}."
            )
    return stored


def read_header(file: pathlib.Path) -> dict[str, Stored]:
    """Returns what a safetensors file holds.

    Raises:
      UserError: if its header cannot be read, or promises other bytes than there are.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        prefix = opened.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else size
        if _LENGTH.size + length > size:
            raise UserError(f"{file} is cut short or no safetensors file: {_AGAIN}.")
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            begin = _LENGTH.size + length
            stored = {name: _stored(name, file, begin, **fields) for name, fields in header.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{file} has a header that is damaged: {_AGAIN}.") from error
    if not stored:
        raise UserError(f"{file} holds no tensor: {_AGAIN}.")
    _check_extent(file, stored, begin, size)
    return stored


def _stored(name: str, file: pathlib.Path, begin: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Stored:
    start, stop = data_offsets
    return Stored(name, file, dtype, tuple(shape), begin + start, begin + stop)


def _check_extent(file: pathlib.Path, stored: dict[str, Stored], begin: int, size: int) -> None:
    for name, tensor in stored.items():
        if not begin <= tensor.start <= tensor.stop <= size:
            raise UserError(f"{file} is cut short, its tensor {name!r} goes beyond the end: {_AGAIN}.")
        if (
            tensor.dtype in DTYPES
            and math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize != tensor.stop - tensor.start
        ):
            raise UserError(f"{file} is damaged, its tensor {name!r} has another size than its shape: {_AGAIN}.")
    if max(tensor.stop for tensor in stored.values()) != size:
        raise UserError(f"{file} is damaged, it goes on after its last tensor: {_AGAIN}.")


# --- Writing ----------------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    directory: pathlib.Path, stem: str, specs: Sequence[Spec], arrays: Iterable[np.ndarray], shard_bytes: int
) -> None:
    """Writes tensors as they come, in one file or in shards of at most `shard_bytes` (or one tensor) with an index."""
    shards, arrays = _split(specs, shard_bytes), iter(arrays)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {spec.name: name for name, shard in zip(names, shards) for spec in shard}
        index = {"metadata": {"total_size": sum(spec.bytes for spec in specs)}, "weight_map": weight_map}
        write_json(directory / f"{stem}.safetensors.index.json", index)
    for name, shard in zip(names, shards):
        _write_file(directory / name, shard, arrays)


def _split(specs: Sequence[Spec], shard_bytes: int) -> list[list[Spec]]:
    shards: list[list[Spec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + spec.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    return shards


def _write_file(file: pathlib.Path, specs: Sequence[Spec], arrays: Iterator[np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in specs:
        offsets = [at, at := at + spec.bytes]
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as opened:
        opened.write(_LENGTH.pack(len(encoded)) + encoded)
        for spec, array in zip(specs, arrays):
            array = np.asarray(array, spec.dtype, order="C")
            if array.shape != spec.shape:
                raise ValueError(f"{spec.name} has the shape {array.shape}, announced was {spec.shape}")
            opened.write(array.reshape(-1).view(np.uint8).data)


def write_json(file: pathlib.Path, value: dict) -> None:
    """Writes indented JSON."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_new(target: pathlib.Path) -> None:
    """Raises `UserError` if something is there already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already: delete it, or choose another directory.")


@contextlib.contextmanager
def new_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary sibling to write into; it becomes `target` at the end, or goes where the writing fails.

    Raises:
      UserError: if `target` is there already, or cannot be written.
    """
    check_new(target)
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.absolute().parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
