"""Every format gives the same examples, to any thread and process."""

import concurrent.futures
import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys

import fsspec
import numpy as np
import pytest

from mmcore_jax import config
from mmcore_jax.config import Column, UserError
from mmcore_jax.data.example import BadExample
from mmcore_jax.data.sources import open_source, sharded
from tests.data.sources import formats
from tests.data.sources.formats import COLUMNS, DOCUMENTS, PAIRS, SETTINGS, SUFFIX, opened, settings, write_shards
from tests.rows import png


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A source of each kind that holds `DOCUMENTS` in two shards."""
    directory = tmp_path_factory.mktemp("documents")
    return {kind: opened(kind, write_shards(directory / kind, kind, DOCUMENTS)) for kind in SETTINGS}


@pytest.mark.parametrize("kind", SETTINGS)
def test_documents_come_back(sources, kind):
    source = sources[kind]
    assert len(source) == 5
    assert [source[index] for index in range(5)] == DOCUMENTS
    assert source[np.int64(3)] == DOCUMENTS[3]
    assert f"data-00001-of-00002{SUFFIX[kind]}, " in source.where(4)
    for index in (5, -1):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_pickle(sources, kind):
    """It is small, holds nothing open, and reads on."""
    source = sources[kind]
    source[0]
    assert len(pickle.dumps(source)) < 2000
    assert pickle.loads(pickle.dumps(source))[3] == DOCUMENTS[3]  # noqa: S301


def test_a_forked_process_opens_its_own(sources, monkeypatch):
    source = sources["array_record"]
    reader = source._readers[0]
    assert source._readers[0] is reader
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert source._readers[0] is not reader
    assert source[4] == DOCUMENTS[4]


@pytest.mark.parametrize("kind", SETTINGS)
def test_many_threads(sources, kind):
    source = pickle.loads(pickle.dumps(sources[kind]))  # noqa: S301
    order = np.random.default_rng(0).integers(0, 5, 400).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(source.__getitem__, order)) == [DOCUMENTS[index] for index in order]


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_fingerprint(sources, kind, tmp_path):
    """It is that of names, sizes and mapping, wherever the shards lie and whatever their weight."""
    source, moved = sources[kind], write_shards(tmp_path / "elsewhere", kind, DOCUMENTS)
    assert opened("moved", dataclasses.replace(moved, weight=9.0)).fingerprint() == source.fingerprint()
    changed = [write_shards(tmp_path / "changed", kind, [*DOCUMENTS[:4], PAIRS[0]])]  # as many, maybe of one size
    if kind != "array_record":
        changed += [dataclasses.replace(moved, task="other"), dataclasses.replace(moved, segments=COLUMNS)]
    if kind == "json_lines":
        changed += [dataclasses.replace(moved, images=str(tmp_path / images)) for images in ("images", "elsewhere")]
    prints = {opened("changed", one).fingerprint() for one in changed}
    assert len(prints) == len(changed)
    assert source.fingerprint() not in prints


# --- Columns ----------------------------------------------------------------------------------------------------------


def mapped(kind, directory, records, columns, **changes):
    """A source of one shard of plain records, which a mapping turns into examples."""
    shard = directory / f"shard{SUFFIX[kind]}"
    if kind == "webdataset":
        content = formats.tar((f"{r['id']}.{column}", r[column]) for r in records for column in r if column != "id")
    elif kind == "parquet":
        content = formats.parquet(records)
    else:
        content = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    shard.write_bytes(content)
    return opened("mapped", settings(kind, shard, **{"task": "test", "segments": columns, **changes}))


def read(source):
    return [source[index] for index in range(len(source))]


def test_pairs_of_a_tar(tmp_path):
    records = [{"id": f"{i:03d}", "txt": f"caption {i}".encode(), "jpg": png(1 + i)} for i in range(3)]
    columns = (Column("text", "txt"), Column("image", "jpg", generate=True))
    assert read(mapped("webdataset", tmp_path, records, columns)) == [
        formats.document(f"{i:03d}", f"caption {i}", -(1 + i)) for i in range(3)
    ]


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_the_first_column_that_there_is(tmp_path, kind):
    records = [{"id": "1", "txt": b"one", "jpeg": png(1)}, {"id": "2", "txt": b"two", "jpeg": png(3)}]
    if kind == "webdataset":
        records[1]["jpg"] = png(2)
    columns = (Column("text", "txt"), Column("image", "jpg;jpeg", generate=True))
    found = read(mapped(kind, tmp_path, records, columns))
    assert found == [formats.document("1", "one", -1), formats.document("2", "two", -2 if kind == "webdataset" else -3)]
    with pytest.raises(BadExample, match="column 'gif;bmp' is missing"):
        read(mapped(kind, tmp_path, records, (*columns, Column("image", "gif;bmp"))))


def test_keys_inside_a_json_member(tmp_path):
    content = json.dumps({"caption": {"en": "a dot"}, "turns": [{"say": "one"}, {"say": "two"}]}).encode()
    records = [{"id": "a/b/7", "JSON": content, "seg.png": png(1)}]
    columns = (
        Column("image", "seg.png"),
        Column("text", "json.caption.en"),
        Column("text", "json.turns.say", speaker="assistant"),
    )
    (one,) = read(mapped("webdataset", tmp_path, records, columns))
    assert one == formats.document("a/b/7", 1, "a dot", ("assistant", "one"), ("assistant", "two"))


@pytest.mark.parametrize("image", [lambda content: content, lambda content: {"bytes": content, "path": "x.png"}])
def test_columns_of_a_table(tmp_path, image):
    records = [
        {"id": f"pair-{i}", "caption": f"caption {i}", "image": image(png(10 + i)), "url": "-"} for i in range(5)
    ]
    assert read(mapped("parquet", tmp_path, records, COLUMNS)) == PAIRS


def test_lists_and_nested_columns_of_a_table(tmp_path):
    records = [{"id": 7, "images": [{"bytes": png(1)}, {"bytes": png(2)}], "meta": {"text": {"en": "both"}}}]
    columns = (Column("image", "images"), Column("text", "meta.text.en"))
    assert read(mapped("parquet", tmp_path, records, columns)) == [formats.document("7", 1, 2, "both")]


def test_lines_and_a_folder_of_images(tmp_path):
    (tmp_path / "images/red").mkdir(parents=True)
    (tmp_path / "images/red/1.png").write_bytes(png(1))
    records = [{"caption": ["a", "b"], "image": "red/1.png", "task": "lines"}]
    (one,) = read(mapped("json_lines", tmp_path, records, COLUMNS))
    assert one == {**formats.document("shard/0", "a", "b", -1), "task": "lines"}


def test_a_record_without_a_task(tmp_path):
    source = mapped("json_lines", tmp_path, [{"caption": "a"}], (Column("text", "caption"),), task=None)
    with pytest.raises(BadExample, match="no task, neither in the record nor in the config"):
        source[0]


@pytest.mark.parametrize("kind", ["parquet", "json_lines"])
def test_null_for_id_and_task(tmp_path, kind):
    """Tables have every column in each row."""
    records = [{"id": None, "task": None, "caption": "a"}, {"id": "b", "task": "other", "caption": "b"}]
    found = read(mapped(kind, tmp_path, records, (Column("text", "caption"),)))
    assert [(one["id"], one["task"]) for one in found] == [("shard/0", "test"), ("b", "other")]
    segments = [{"type": "text", "text": "a", "speaker": "user"}]
    (one,) = read(mapped(kind, tmp_path, [{"id": None, "task": None, "segments": segments}], None))
    assert (one["id"], one["task"]) == ("shard/0", "test")


@pytest.mark.parametrize(
    ("identity", "expected"), [(7, "7"), (b"seven", "seven"), (0.5, "shard/0"), (b"\xff", "shard/0")]
)
def test_columns_that_are_called_id_and_task_by_chance(tmp_path, identity, expected):
    records = [{"id": identity, "task": 3, "caption": "a"}]
    (one,) = read(mapped("parquet", tmp_path, records, (Column("text", "caption"),)))
    assert (one["id"], one["task"]) == (expected, "test")


def test_a_byte_order_mark(tmp_path):
    (one,) = read(mapped("webdataset", tmp_path, [{"id": "a", "txt": b"\xef\xbb\xbfred"}], (Column("text", "txt"),)))
    assert one == formats.document("a", "red")


def test_only_the_columns_of_the_mapping_are_decoded(tmp_path):
    """A row group of wide tables is read in part, and stays in memory until others need the room."""
    records = [{"id": str(i), "caption": "x", "unused": "y" * 1000} for i in range(6)]
    source = mapped("parquet", tmp_path, records, (Column("text", "caption"),))
    assert source._groups[0, 1].column_names == ["id", "caption"]
    source._groups = sharded.Cache(source._groups._make, 100, lambda table: 40)
    read(source)
    assert list(source._groups._values) == [(0, 1), (0, 2)]


# --- TensorFlow datasets ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a TensorFlow dataset of the pairs."""
    import tensorflow_datasets
    from tensorflow_datasets import features
    from tensorflow_datasets.core import naming, splits

    spec = features.FeaturesDict(
        {"caption": features.Text(), "more": {"images": features.Sequence(features.Image(shape=(8, 8, 3)))}}
    )
    records = []
    for one in PAIRS:
        text, image = one["segments"]
        images = [io.BytesIO(image["image"]) for _ in range(2)]
        records.append(spec.serialize_example({"caption": text["text"], "more": {"images": images}}))
    folder = tmp_path_factory.mktemp("tfds")
    directory = folder / "pairs/1.0.0"
    directory.mkdir(parents=True)
    (directory / "pairs-train.array_record-00000-of-00001").write_bytes(formats.array_record(records))
    template = naming.ShardedFileTemplate(
        data_dir=directory, dataset_name="pairs", split="train", filetype_suffix="array_record"
    )
    tensorflow_datasets.folder_dataset.write_metadata(
        data_dir=directory,
        features=spec,
        split_infos=[splits.SplitInfo("train", [5], sum(map(len, records)), template)],
        check_data=False,
    )
    return folder


def tfds(folder, **changes):
    columns = (Column("text", "caption"), Column("image", "more.images", generate=True))
    given = dict(
        kind="tfds", name="pairs", split="train", data_dir=str(folder), task="test", segments=columns, weight=1.0
    )
    return config.Tfds(**{**given, **changes})


def test_a_tensorflow_dataset(prepared):
    """Images stay as they were encoded."""
    source = open_source("pairs", tfds(prepared))
    images = [{**one["segments"][1]} for one in PAIRS]
    assert [source[i]["segments"] for i in range(5)] == [
        [PAIRS[i]["segments"][0], images[i], images[i]] for i in range(5)
    ]
    assert [source[1]["id"], source.where(1)] == ["pairs/1.0.0/train/1", "pairs/1.0.0/train, record 1"]
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert (copy[4], copy.fingerprint()) == (source[4], source.fingerprint())
    assert open_source("pairs", tfds(prepared, task="other")).fingerprint() != source.fingerprint()
    part = open_source("pairs", tfds(prepared, split="train[2:4]"))
    assert [len(part), part[1]["segments"]] == [2, source[3]["segments"]]


def test_mistakes_with_a_tensorflow_dataset(prepared):
    with pytest.raises(UserError, match="'pairs' needs `segments`"):
        open_source("pairs", tfds(prepared, segments=None))
    with pytest.raises(UserError, match=r"cannot open the split 'test' of 'pairs' in .*tfds"):
        open_source("pairs", tfds(prepared, split="test"))


# --- Elsewhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "json_lines"])
def test_a_remote_store(tmp_path, kind):
    local = write_shards(tmp_path, kind, DOCUMENTS)
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path), f"/{kind}", recursive=True)
    changes = {"images": f"memory://{kind}/images"} if kind == "json_lines" else {}
    remote = opened("remote", dataclasses.replace(local, shards=f"memory://{kind}/data-*{SUFFIX[kind]}", **changes))
    assert read(remote) == DOCUMENTS
    assert remote.where(0).startswith("memory://")
    store.rm(f"/{kind}", recursive=True)


def test_array_record_cannot_read_every_store():
    fsspec.filesystem("memory").pipe_file("/native/a.array_record", b"x")
    with pytest.raises(UserError, match="array_record opens local files and gs:// only"):
        open_source("native", settings("array_record", "memory://native/a.array_record"))


def test_few_files_stay_open(tmp_path):
    """Readers are closed as others are opened, and indices are mapped without a descriptor."""
    for kind in ("array_record", "webdataset"):
        for number in range(40):
            (tmp_path / f"{number}{SUFFIX[kind]}").write_bytes(formats.bytes_of(kind, PAIRS[:1]))
        before = len(os.listdir("/proc/self/fd"))
        source = opened(kind, settings(kind, tmp_path / f"*{SUFFIX[kind]}"))
        if kind == "array_record":
            source._readers = sharded.Cache(source._readers._make, 5)
        assert read(source) == PAIRS[:1] * 40
        assert len(os.listdir("/proc/self/fd")) - before <= (5 if kind == "array_record" else 0)


def test_importing_is_quick():
    """No source pays for the library of another."""
    code = "import sys; import mmcore_jax.data.sources as s; print([m for m in {} if m in sys.modules])"

    names = ["jax", "pyarrow", "tensorflow_datasets", "array_record", "grain"]
    assert subprocess.check_output([sys.executable, "-c", code.format(names)], text=True).strip() == "[]"
