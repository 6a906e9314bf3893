"""The one record that every data source yields: an interleaved document of text and images.

Text-to-image, editing, captioning, visual question answering and interleaved documents are all the same thing:
a list of segments in reading order. An image with `generate` is predicted from everything before it, and whatever
comes later may look back at it. Text with speaker "assistant" carries the next-token loss.

On disk an example is one msgpack map, which holds the encoded image bytes as they are.
"""

from typing import Any, TypedDict

import msgpack


class Text(TypedDict):
    type: str  # "text"
    text: str
    speaker: str  # "user" | "assistant"


class Image(TypedDict):
    type: str  # "image"
    image: bytes  # encoded (PNG, JPEG, ...)
    generate: bool


class Example(TypedDict):
    id: str
    task: str
    segments: list[Text | Image]


class BadExample(ValueError):
    """A record that cannot be used. The message is the reason under which it is counted, and so the same for many."""


def text(content: str, speaker: str = "user") -> Text:
    """Returns a text segment."""
    return {"type": "text", "text": content, "speaker": speaker}


def image(encoded: bytes, generate: bool = False) -> Image:
    """Returns an image segment from encoded bytes."""
    return {"type": "image", "image": encoded, "generate": generate}


_TYPES = {
    "text": {"type": str, "text": str, "speaker": str},
    "image": {"type": str, "image": bytes, "generate": bool},
}


def validate(example: Any) -> Example:
    """Returns `example` unchanged if it is well formed.

    Raises:
      BadExample: naming the first thing that is wrong.
    """
    _require(example, {"id": str, "task": str, "segments": list}, "example")
    if not example["segments"]:
        raise BadExample("no segments")
    for segment in example["segments"]:
        kind = segment.get("type") if isinstance(segment, dict) else None
        if not isinstance(kind, str) or kind not in _TYPES:
            raise BadExample("unknown segment type")
        _require(segment, _TYPES[kind], f"{kind} segment")
        if kind == "text" and segment["speaker"] not in ("user", "assistant"):
            raise BadExample("unknown speaker")
        if kind == "text" and not segment["text"].strip():
            raise BadExample("empty text")
        if kind == "image" and not segment["image"]:
            raise BadExample("empty image")
    if example["segments"][0].get("generate"):
        raise BadExample("an image is generated from nothing")
    return example


def _require(record: Any, types: dict[str, type], what: str) -> None:
    if not isinstance(record, dict):
        raise BadExample(f"{what} is {type(record).__name__}, expected a map")
    if missing := types.keys() - record.keys():
        raise BadExample(f"{what} lacks {', '.join(sorted(missing))}")
    if len(record) > len(types):
        raise BadExample(f"{what} holds more than {', '.join(types)}")
    for key, expected in types.items():
        if not isinstance(record[key], expected):
            raise BadExample(f"{what}: {key} is {type(record[key]).__name__}, expected {expected.__name__}")


def encode(example: Example) -> bytes:
    """Serialises a valid example for a native shard."""
    return msgpack.packb(validate(example))


def decode(record: bytes) -> Example:
    """Inverse of `encode`.

    Raises:
      BadExample: if the bytes are not a well-formed example.
    """
    try:
        example = msgpack.unpackb(record)
    except UnicodeDecodeError as error:
        raise BadExample("text is not UTF-8") from error
    except ValueError as error:
        raise BadExample(f"not a msgpack record ({type(error).__name__})") from error
    return validate(example)
