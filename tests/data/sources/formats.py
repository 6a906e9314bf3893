"""The same documents as shards of every format, and readers of what comes back."""

import io
import json
import pathlib
import tarfile
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter

from mmcore_jax import config
from mmcore_jax.data import example as example_lib
from mmcore_jax.data import image as image_lib
from mmcore_jax.data.example import BadExample
from mmcore_jax.data.sources import index, open_source
from tests.rows import document

SETTINGS = {
    "array_record": config.ArrayRecord,
    "webdataset": config.WebDataset,
    "parquet": config.Parquet,
    "json_lines": config.JsonLines,
}
SUFFIX = {"array_record": ".array_record", "webdataset": ".tar", "parquet": ".parquet", "json_lines": ".jsonl"}

DOCUMENTS = [
    document("a", 1, "make it blue", -2, ("assistant", "done")),
    document("b", "ein rötlicher Kreis", -3),
    document("c", 4, 5, "both", -6, "now red", -7),
    document("d", "what is this?", ("assistant", "nothing")),
    document("e", "red", -8),
]
"""Of all shapes."""

PAIRS = [document(f"pair-{i}", f"caption {i}", -(10 + i)) for i in range(5)]
"""A caption and an image each."""

COLUMNS = (config.Column("text", "caption"), config.Column("image", "image", generate=True))


def bytes_of(kind: str, examples: list, images: pathlib.Path | None = None) -> bytes:
    """A shard whose records are documents; JSON lines name files that are written to `images`."""
    if kind == "webdataset":
        return tar(member for one in examples for member in members(one))
    if kind == "parquet":
        return parquet([{**one, "segments": [struct(segment) for segment in one["segments"]]} for one in examples])
    if kind == "json_lines":
        return "".join(json.dumps(named(one, images)) + "\n" for one in examples).encode()
    return array_record([example_lib.encode(one) for one in examples])


def array_record(records: list[bytes]) -> bytes:
    """An ArrayRecord file."""

    with tempfile.NamedTemporaryFile() as file:
        writer = ArrayRecordWriter(file.name, "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        return pathlib.Path(file.name).read_bytes()


def tar(entries, **options) -> bytes:
    """A tar of (name, content), or of `tarfile.TarInfo`, which has none."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **{"format": tarfile.USTAR_FORMAT, **options}) as writer:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                writer.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            writer.addfile(info, io.BytesIO(entry[1]))
    return file.getvalue()


def members(example: dict) -> list[tuple[str, bytes]]:
    """KEY.json, and the images that it names."""
    named_segments, images = [], []
    for segment in example["segments"]:
        if segment["type"] == "image":
            name = f"{example['id']}.{len(images)}.png"
            images.append((name, segment["image"]))
            segment = {**segment, "image": name}
        named_segments.append(segment)
    content = json.dumps({"task": example["task"], "segments": named_segments}, ensure_ascii=False)
    return [(f"{example['id']}.json", content.encode()), *images]


def named(example: dict, images: pathlib.Path) -> dict:
    """The document with names of images, which are written to that folder."""
    segments = []
    for number, segment in enumerate(example["segments"]):
        if segment["type"] == "image":
            path = f"{example['id']}/{number}.png"
            (images / path).parent.mkdir(parents=True, exist_ok=True)
            (images / path).write_bytes(segment["image"])
            segment = {**segment, "image": path}
        segments.append(segment)
    return {**example, "segments": segments}


def struct(segment: dict) -> dict:
    """A segment as a row of typed columns, the image as Hugging Face writes it."""
    columns = {"type": None, "text": None, "speaker": None, "image": None, "generate": None, **segment}
    return {**columns, "image": {"bytes": segment.get("image"), "path": None}}


def parquet(rows: list[dict], **options) -> bytes:
    """A parquet file with two rows in a group."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, **{"row_group_size": 2, **options})
    return file.getvalue()


def settings(kind: str, shards, **changes) -> config.Source:
    """Settings of a source of documents, unless `segments` say otherwise."""
    given = {"kind": kind, "shards": str(shards), "weight": 1.0, **changes}
    if kind == "json_lines":
        given.setdefault("images", str(pathlib.Path(str(shards)).parent / "images"))
    return SETTINGS[kind](**given)


def opened(name: str, given: config.Source, workers: int = 1):
    """The source, indexed where its format needs that."""
    index.build_indexes(name, given, lambda items, total, label: items, workers)
    return open_source(name, given)


def write_shards(directory: pathlib.Path, kind: str, examples: list) -> config.Source:
    """Writes documents as two shards; returns the settings of the source."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((examples[:3], examples[3:])):
        content = bytes_of(kind, part, directory / "images")
        (directory / f"data-{number:05d}-of-00002{SUFFIX[kind]}").write_bytes(content)
    return settings(kind, directory / f"data-*{SUFFIX[kind]}")


def outcomes(source) -> list[str]:
    """The ids of the good records and the reasons of the bad ones, in their order; images are decoded."""
    found = []
    for number in range(len(source)):
        try:
            example = source[number]
            for segment in example["segments"]:
                if segment["type"] == "image":
                    image_lib.open_rgb(segment["image"])
            found.append(example["id"])
        except BadExample as bad:
            found.append(str(bad))
    return found
