"""One table a family, of (their name, our path, transform), read in both directions.

`{}` in a name counts the layers that our stack keeps on a leading axis. Several of our paths beside one of their names
mean that theirs is the concatenation along the output axis.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import SingleDeviceSharding

from mmcore_jax.config import UserError
from mmcore_jax.progress import progress

# XLA on CPU takes over a host buffer that is aligned so, where it would copy any other.
ALIGNMENT = 64
COPY_COLUMNS = 64

# --- Transforms -------------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    """Their array to ours, and back; a view wherever that is possible, so that slices are read and nothing else."""

    load: Callable[[np.ndarray], np.ndarray]
    export: Callable[[np.ndarray], np.ndarray]


def _swap_halves(x: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(x, 2, axis=-1)[::-1], axis=-1)


SAME = Transform(lambda x: x, lambda x: x)
TRANSPOSED = Transform(lambda x: x.T, lambda x: x.T)
FIRST = Transform(lambda x: x[0], lambda x: x[None])
SWAPPED = Transform(_swap_halves, _swap_halves)
TRANSPOSED_SWAPPED = Transform(lambda x: _swap_halves(x.T), lambda x: _swap_halves(x).T)


def patch_kernel(size: int, channels: int) -> Transform:
    """A convolution `[D, channel, row, column]` over whole patches, as a matrix over (row, column, channel)."""
    return Transform(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(size, size, channels, -1).transpose(3, 2, 0, 1),
    )


def video_patch_kernel(frames: int, size: int, channels: int) -> Transform:
    """A convolution `[D, channel, time, row, column]`, as a matrix over (time, row, column, channel)."""
    return Transform(
        lambda x: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(frames, size, size, channels, -1).transpose(4, 3, 0, 1, 2),
    )


# --- Entries ----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A line of a table; `layers` is how many `{}` counts, from `first` on, 0 without."""

    theirs: str
    ours: tuple[str, ...]
    transform: Transform
    layers: int = 0
    first: int = 0

    @property
    def names(self) -> list[str]:
        return [self.theirs.format(self.first + i) for i in range(max(self.layers, 1))]


def linear(theirs: str, *ours: str, layers: int = 0, bias: bool = True) -> Iterator[Entry]:
    """A matrix, stored transposed, and its bias."""
    yield Entry(f"{theirs}.weight", tuple(f"{path}/kernel" for path in ours), TRANSPOSED, layers)
    if bias:
        yield Entry(f"{theirs}.bias", tuple(f"{path}/bias" for path in ours), SAME, layers)


def swapped_linear(theirs: str, ours: str, layers: int = 0) -> Iterator[Entry]:
    """A linear layer of which theirs has the halves of the output in the other order."""
    yield Entry(f"{theirs}.weight", (f"{ours}/kernel",), TRANSPOSED_SWAPPED, layers)
    yield Entry(f"{theirs}.bias", (f"{ours}/bias",), SWAPPED, layers)


def rms_norm(theirs: str, ours: str, layers: int = 0) -> Iterator[Entry]:
    """A scale."""
    yield Entry(f"{theirs}.weight", (f"{ours}/scale",), SAME, layers)


def layer_norm(theirs: str, ours: str, layers: int = 0) -> Iterator[Entry]:
    """A scale and a bias."""
    yield Entry(f"{theirs}.weight", (f"{ours}/scale",), SAME, layers)
    yield Entry(f"{theirs}.bias", (f"{ours}/bias",), SAME, layers)


def layer_range(first: int, entries: Iterable[Entry]) -> Iterator[Entry]:
    """The same entries, whose layers theirs counts from `first` on."""
    return (entry._replace(first=first) for entry in entries)


# --- Theirs to ours ---------------------------------------------------------------------------------------------------


def load(
    entries: Iterable[Entry],
    tensors: Mapping[str, np.ndarray],
    like: Any,
    where: Callable[[str], str] = repr,
) -> Any:
    """Their tensors as a parameter tree of the structure, shapes, dtypes and shardings of `like`.

    Args:
      entries: the table.
      tensors: theirs by name; views of mapped files are read only where they are sliced.
      like: tree of `jax.ShapeDtypeStruct`; one without a sharding goes to the first device.
      where: describes one of their tensors in an error.

    Raises:
      UserError: naming a tensor that is left over on either side, or whose shape is another.
    """
    entries = list(entries)
    check(entries, tensors, flatten_dict(like, sep="/"), where)
    return read(entries, tensors, like)


def read(entries: Iterable[Entry], tensors: Mapping[str, np.ndarray], like: Any) -> Any:
    """`load` of what has been checked; `like` may name some of the parameters only.

    One parameter after another is put together on the host, by the slices that the devices of this process hold.
    """
    expected = flatten_dict(like, sep="/")
    leaves = [(entry, i) for entry in entries for i, path in enumerate(entry.ours) if path in expected]
    tree = {}
    for entry, i in progress(leaves, len(leaves), "loading parameters"):
        path = entry.ours[i]
        tree[path] = _load_leaf(entry, i, tensors, expected[path])
    return unflatten_dict(tree, sep="/")


def check(
    entries: list[Entry], tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any], where: Callable[[str], str]
) -> None:
    """Raises `UserError` unless both sides have the same tensors, of the same shapes."""
    known = {name for entry in entries for name in entry.names}
    for name in sorted(known - set(tensors)):
        raise UserError(f"the tensor {where(name)} is missing: fetch the checkpoint anew, or correct its config.json.")
    for name in sorted(set(tensors) - known):
        raise UserError(f"the tensor {where(name)} is left over: this network has no such parameter.")
    ours = {path for entry in entries for path in entry.ours}
    if ours != set(expected):
        raise ValueError(f"the table and the network differ in {sorted(ours ^ set(expected))}")
    for entry in entries:
        shape = exported_shape(entry, expected)
        for name in entry.names:
            if tensors[name].shape != shape:
                raise UserError(
                    f"the tensor {where(name)} has the shape {tensors[name].shape}, but config.json makes it {shape}."
                )


def paths(entries: Iterable[Entry]) -> list[str]:
    """Our paths."""
    return [path for entry in entries for path in entry.ours]


def stored_dtypes(entries: Iterable[Entry], tensors: Mapping[str, np.ndarray]) -> dict[str, np.dtype]:
    """The dtype of each of our parameters that holds what is stored; for a stack, of all its layers."""
    dtypes = {}
    for entry in entries:
        found = [tensors[name].dtype for name in entry.names if name in tensors]
        dtypes |= dict.fromkeys(entry.ours, np.result_type(*(found or [np.float32])))
    return dtypes


def _load_leaf(entry: Entry, part: int, tensors: Mapping[str, np.ndarray], like: Any) -> jax.Array:
    """One of our parameters, whose slices are made once for all devices that hold the same."""
    slices: dict[tuple, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, like.shape))
        if bounds not in slices:
            shape = [stop - start for start, stop in bounds]
            slices[bounds] = _read_slice(entry, part, tensors, index, shape, like.dtype)
        return slices[bounds]

    sharding = like.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.block_until_ready(jax.make_array_from_callback(like.shape, sharding, read))


def _read_slice(
    entry: Entry, part: int, tensors: Mapping[str, np.ndarray], index: tuple, shape: list[int], dtype: np.dtype
) -> np.ndarray:
    out = _aligned(shape, dtype)
    names = entry.names[index[0]] if entry.layers else entry.names
    for layer, name in enumerate(names):
        ours = entry.transform.load(np.split(tensors[name], len(entry.ours))[part])
        if entry.layers:
            _copy(out[layer], ours[index[1:]])
        else:
            _copy(out, ours[index])
    return out


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _copy(out: np.ndarray, x: np.ndarray) -> None:
    """`out[...] = x`; a transposed matrix goes by blocks of columns, three times as fast as at once."""
    if x.ndim != 2 or x.flags.c_contiguous:
        out[...] = x
        return
    for start in range(0, x.shape[1], COPY_COLUMNS):
        out[:, start : start + COPY_COLUMNS] = x[:, start : start + COPY_COLUMNS]


# --- Ours to theirs ---------------------------------------------------------------------------------------------------


def export(entries: Iterable[Entry], params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (their name, their tensor), the inverse of `load`, one layer at a time."""
    ours = flatten_dict(params, sep="/")
    for entry in entries:
        for i, name in enumerate(entry.names):
            parts = [np.asarray(ours[path][i] if entry.layers else ours[path]) for path in entry.ours]
            parts = [entry.transform.export(part) for part in parts]
            yield name, np.concatenate(parts) if len(parts) > 1 else parts[0]


def exported_shape(entry: Entry, shapes: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of each tensor that an entry exports; `shapes` maps our paths to what has a shape."""

    def shape(path: str) -> tuple[int, ...]:
        ours = shapes[path].shape[1:] if entry.layers else shapes[path].shape
        return entry.transform.export(np.broadcast_to(np.zeros((), np.uint8), ours)).shape

    parts = [shape(path) for path in entry.ours]
    return (sum(part[0] for part in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]
