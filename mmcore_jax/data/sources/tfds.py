"""TensorFlow datasets that are prepared in the ArrayRecord format. TensorFlow itself is not needed."""

from typing import Any

import numpy as np
import tensorflow_datasets
from tensorflow_datasets import decode

from mmcore_jax import config
from mmcore_jax.config import UserError
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.sources import document
from mmcore_jax.data.sources.sharded import Cache, fingerprint


class Source:
    """Records of one split."""

    def __init__(self, name: str, settings: config.Tfds) -> None:
        """Opens the dataset.

        Raises:
          UserError: if it is not prepared, or the settings do not say what becomes which segment.
        """
        self.name, self._settings = name, settings
        if settings.segments is None:
            raise UserError(f"data source {name!r} needs `segments`: they say what features of the dataset become.")
        self._opened = Cache(self._open)
        try:
            data = self._opened[None]
        except Exception as error:  # the library raises a dozen types
            raise UserError(
                f"data source {name!r} cannot open the split {settings.split!r} of {settings.name!r} in "
                f"{settings.data_dir or 'the default folder of tensorflow_datasets'}: {error}"
            ) from error
        info = data.dataset_info
        self._length, self._place = len(data), f"{info.full_name}/{settings.split}"
        self._bytes = int(info.splits[settings.split].num_bytes)

    def _open(self, _: None) -> Any:
        settings = self._settings
        images = [name for column in settings.segments if column.type == "image" for name in document.names(column)]
        return tensorflow_datasets.data_source(
            settings.name,
            split=settings.split,
            data_dir=settings.data_dir,
            download=False,
            decoders=_nested({name: _Encoded() for name in images}),
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        """Returns an example; raises `BadExample` for a record that is not one."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            record = self._opened[None][index]
        except Exception as error:  # array_record and protobuf raise types of their own
            raise BadExample("record cannot be read") from error
        return document.make_example(_plain(record), self._settings, f"{self._place}/{index}", _no_image)

    def where(self, index: int) -> str:
        """The dataset, its split, and the number of the record."""
        return f"{self._place}, record {index}"

    def fingerprint(self) -> str:
        """A hash of dataset, version, split and sizes, and of the settings that shape examples."""
        return fingerprint(self._settings, [self._place, self._length, self._bytes])


class _Encoded(decode.Decoder):
    """Leaves images encoded, also those of sequences, which the library's `SkipDecoding` cannot."""

    def decode_example(self, serialized_example: Any) -> Any:
        return serialized_example

    decode_batch_example_np = decode_ragged_example_np = decode_example_np = decode_example


def _nested(decoders: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` to `{"a": {"b": x}}`."""
    nested: dict[str, Any] = {}
    for name, decoder in decoders.items():
        *parents, leaf = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = decoder
    return nested


def _plain(value: Any) -> Any:
    """NumPy values as Python's."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return _plain(value.tolist()) if isinstance(value, (np.ndarray, np.generic)) else value


def _no_image(name: str) -> bytes:
    raise BadExample("an image has a name and no bytes")
