"""Records of foreign formats to examples: by a mapping of columns, or as documents that name their images."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmcore_jax import config
from mmcore_jax.config import Column
from mmcore_jax.data import example as example_lib
from mmcore_jax.data.example import BadExample, Example

FindImage = Callable[[str], bytes]
"""Returns the encoded image of a name in a record, or raises `BadExample`."""

_MISSING = object()


def make_example(record: Mapping, settings: config.Source, name: str, find_image: FindImage) -> Example:
    """Returns the example that a record holds; `name` is its id if it has no "id" itself.

    Raises:
      BadExample: naming the first thing that is wrong.
    """
    if settings.segments is None:
        segments = _document(record, find_image)
    else:
        segments = [segment for column in settings.segments for segment in _mapped(record, column, find_image)]
    identity, task = record.get("id"), record.get("task")
    identity = str(identity) if isinstance(identity, int) else identity
    if settings.segments is not None:  # columns of other meanings may have these names
        identity, task = _text_or_none(identity), _text_or_none(task)
    identity = name if identity is None else identity
    task = settings.task if task is None else task
    if task is None:
        raise BadExample("no task, neither in the record nor in the config")
    return example_lib.validate({"id": _utf8(identity), "task": _utf8(task), "segments": segments})


def parse_json(content: bytes) -> Any:
    """Parses JSON; raises `BadExample`."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadExample("text is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadExample("not JSON") from error


def parse_object(content: bytes) -> dict:
    """Parses a JSON object; raises `BadExample`."""
    record = parse_json(content)
    if not isinstance(record, dict):
        raise BadExample("not a JSON object")
    return record


def names(column: Column) -> list[str]:
    """The columns of a record in which a segment may be: the first that there is."""
    return column.column.split(";")


def _mapped(record: Mapping, column: Column, find_image: FindImage) -> Iterator[dict]:
    found = (_lookup(record, name) for name in names(column))
    value = next((value for value in found if value is not _MISSING), _MISSING)
    if value is _MISSING:
        raise BadExample(f"column {column.column!r} is missing")
    for item in _flat(value):
        if item is None:
            raise BadExample(f"column {column.column!r} is null")
        if column.type == "image":
            yield example_lib.image(_image(item, find_image), column.generate)
        elif isinstance(item, (str, bytes)):
            yield example_lib.text(_utf8(item), column.speaker)
        else:
            raise BadExample(f"column {column.column!r} is {type(item).__name__}, expected text")


def _lookup(record: Any, column: str) -> Any:
    """The value of a dotted column: names may have dots themselves, and the longest that exists wins."""
    if isinstance(record, list):
        return [_lookup(item, column) for item in record]
    if isinstance(record, bytes):  # a JSON member of a tar
        record = parse_json(record)
    if not isinstance(record, Mapping):
        return _MISSING
    parts = column.split(".")
    for end in range(len(parts), 0, -1):
        name, rest = ".".join(parts[:end]), ".".join(parts[end:])
        if name in record:
            return _lookup(record[name], rest) if rest else record[name]
    return _MISSING


def _flat(value: Any) -> Iterator[Any]:
    if not isinstance(value, list):
        yield None if value is _MISSING else value
        return
    for item in value:
        yield from _flat(item)


def _document(record: Mapping, find_image: FindImage) -> list[dict]:
    segments = record.get("segments")
    if not isinstance(segments, list):
        raise BadExample("no list of segments")
    return [_segment(segment, find_image) for segment in segments]


def _segment(segment: Any, find_image: FindImage) -> dict:
    """A segment of a document; where columns are typed, it has nulls for what it lacks."""
    if not isinstance(segment, Mapping):
        raise BadExample(f"segment is {type(segment).__name__}, expected an object")
    segment = {key: value for key, value in segment.items() if not _is_null(value)}
    if "image" in segment:
        segment["image"] = _image(segment["image"], find_image)
    if "text" in segment:
        segment["text"] = _utf8(segment["text"])
    return segment


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(item is None for item in value.values()))


def _image(value: Any, find_image: FindImage) -> bytes:
    """Encoded bytes, from themselves, from a struct of bytes and path, or from a name."""
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value = path if content is None else content
    if isinstance(value, str):
        return find_image(value)
    if not isinstance(value, bytes):
        raise BadExample(f"image is {type(value).__name__}, expected bytes or a name")
    return value


def _text_or_none(value: Any) -> str | None:
    """Text, also as UTF-8; None for what is none."""
    try:
        value = _utf8(value)
    except BadExample:
        return None
    return value if isinstance(value, str) else None


def _utf8(value: Any) -> Any:
    """Text from bytes, without a byte order mark.

    Text that no UTF-8 can hold is refused, what is no text passes on to be refused by its type.
    """
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8-sig")
        if isinstance(value, str):
            value.encode()
    except UnicodeError as error:
        raise BadExample("text is not UTF-8") from error
    return value
