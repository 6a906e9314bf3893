"""What frozen networks make of the examples of a source: computed once, kept beside its scan, read in every epoch.

Each kind has a folder in `config.data.index`, whose name stands for the examples and for the weights: what others have
made is never read. A folder holds Arrow files of `CHUNK` examples each, memory-mapped, and each there as a whole or not
at all. I images of a row, N query tokens, C context tokens, P values in a patch.
"""

import functools
import hashlib
import json
import pathlib
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa

from mmcore_jax.config import Config, UserError
from mmcore_jax.data.example import BadExample
from mmcore_jax.data.geometry import Geometry
from mmcore_jax.data.layout import Features, Item
from mmcore_jax.data.sources import files
from mmcore_jax.data.sources.sharded import Cache

CHUNK = 1024  # examples in a file
# Each kind of features: the parts that make it, and the fields of `Features` that it fills.
PARTS = {"latents": ("autoencoder",), "targets": ("vision_target",), "conditioning": ("vlm", "queries", "connector")}
FIELDS = {"latents": ("latents",), "targets": ("targets",), "conditioning": ("text", "visual")}

_OPEN_FILES = 256
_COMMAND = "python -m mmcore_jax.prepare --config={} --features"


def empty(rows: int, config: Config, sizes: Geometry, kinds: Collection[str]) -> Features:
    """Zeros for the features of a batch of `rows`, in the dtypes that the networks give them."""
    model, budgets = config.model, config.data.budgets
    queries, dtype = (rows, budgets.images, model.queries.grid**2), _dtype(config.execution.compute_dtype)
    makers = {
        "latents": lambda: np.zeros((rows, budgets.images, sizes.latent_capacity, _patch_values(config)), np.float32),
        "targets": lambda: np.zeros((*queries, model.vision_target.vision.width), np.float32),
        "text": lambda: np.zeros((rows, budgets.context_tokens, model.vlm.width), dtype),
        "visual": lambda: np.zeros((*queries, model.connector.width), dtype),
    }
    return Features(**{field: makers[field]() for kind in kinds for field in FIELDS[kind]})


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _patch_values(config: Config) -> int:
    return config.model.dit.patch_size**2 * config.model.dit.latent_channels


class Store:
    """One kind of features of one source. Goes to other processes as it is."""

    def __init__(self, directory: pathlib.Path, config: Config, sizes: Geometry, kind: str, examples: int) -> None:
        self.directory, self.kind, self.examples = directory, kind, examples
        self._like = {name: getattr(empty(0, config, sizes, [kind]), name) for name in FIELDS[kind]}
        self._open_files = Cache(self._open, _OPEN_FILES)

    @functools.cached_property
    def missing(self) -> list[int]:
        """The numbers of the files that are not there."""
        there = {path.name for path in self.directory.glob("*.arrow")}
        return [chunk for chunk in range(-(-self.examples // CHUNK)) if self._path(chunk).name not in there]

    def write(self, chunk: int, examples: Sequence[Sequence[Features] | str]) -> None:
        """Writes a file: the features of each image of each example, or why an example cannot be used.

        Raises:
          UserError: if it cannot be written.
        """
        reasons = [example if isinstance(example, str) else None for example in examples]
        frames = [[] if isinstance(example, str) else example for example in examples]
        columns = {"reason": pa.array(reasons, pa.string())}
        for name, like in self._like.items():
            values = [[_to_bytes(getattr(frame, name), like) for frame in example] for example in frames]
            columns[name] = pa.array(values, pa.list_(pa.large_binary()))
        batch, file = pa.record_batch(columns), pa.BufferOutputStream()
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            files.replace(str(self._path(chunk)), file.getvalue())
        except OSError as error:
            raise UserError(
                f"cannot write {self.directory} ({error.strerror}): name another place in config.data.index."
            ) from error

    def __getitem__(self, index: int) -> list[Features]:
        """The features of each image of an example; raises `BadExample` for one that cannot be used."""
        batch, row = self._open_files[index // CHUNK], index % CHUNK
        reason = batch["reason"][row].as_py()
        if reason is not None:
            raise BadExample(reason)
        fields = [
            [_from_buffer(value.as_buffer(), like) for value in batch[name][row].values]
            for name, like in self._like.items()
        ]
        return [Features(**dict(zip(self._like, values))) for values in zip(*fields)]

    def _path(self, chunk: int) -> pathlib.Path:
        return self.directory / f"{chunk:06d}.arrow"

    def _open(self, chunk: int) -> pa.RecordBatch:
        with pa.memory_map(str(self._path(chunk))) as file:
            return pa.ipc.open_file(file).get_batch(0)


def _to_bytes(values: np.ndarray | None, like: np.ndarray) -> bytes:
    return b"" if values is None else np.ascontiguousarray(values, like.dtype).tobytes()


def _from_buffer(buffer: pa.Buffer, like: np.ndarray) -> np.ndarray | None:
    """Of one image, `[patches, queries or tokens, values]`: the last axis is that of `like`."""
    return np.frombuffer(buffer, like.dtype).reshape(-1, like.shape[-1]) if buffer.size else None


def stores(config: Config, reader: Any, number: int, weights: Mapping[str, str]) -> list[Store]:
    """The stores of source `number`, whether they are there or not.

    Args:
      config: of the run.
      reader: of its sources.
      number: of a source.
      weights: what stands for the weights that make each kind.
    """
    source, index = reader.sources[number], pathlib.Path(config.data.index)
    keys = {kind: _key(config, reader, number, made_by) for kind, made_by in weights.items()}
    return [
        Store(index / f"{source.name}-{kind}-{key}", config, reader.sizes, kind, len(source))
        for kind, key in keys.items()
    ]


def check(config: Config, source: str, store: Store) -> None:
    """Raises `UserError` unless the features are there as a whole."""
    if not store.missing:
        return
    others = [path for path in store.directory.parent.glob(f"{source}-{store.kind}-*") if path != store.directory]
    fault = "is not complete" if store.directory.exists() else "was made by other weights or data" if others else ""
    command = _COMMAND.format(shlex.quote(f"configs/{config.stage}.py:{config.recipe}"))
    raise UserError(
        f"data source {source!r}: config.data.features asks for {store.kind!r}, which {fault or 'does not exist'} in "
        f"{config.data.index}: run {command}."
    )


def _key(config: Config, reader: Any, number: int, made_by: str) -> str:
    """Stands for all that features follow from."""
    policy = list(config.data.sources.values())[number].too_long
    given = [
        *reader.identities[number],
        repr(reader.sizes),
        policy,
        None if policy == "drop" else repr(config.data.budgets),  # what is shortened is seen otherwise
        made_by,
    ]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]


def joined(item: Item, found: Sequence[list[Features]]) -> list[Features]:
    """The features of each image of an item, of all kinds together."""
    merged: list[dict] = [{} for _ in item.frames]
    for kind in found:
        for fields, frame in zip(merged, kind, strict=True):
            fields |= {name: values for name, values in frame._asdict().items() if values is not None}
    return [Features(**fields) for fields in merged]
