"""Indices beside tar and JSON-lines shards: what they hold, when they are refused, how they are built."""

import io
import os
import pathlib
import tarfile

import pytest

from mmcore_jax.config import Column, UserError
from mmcore_jax.data.sources import index, open_source
from mmcore_jax.data.sources.files import INDEX_SUFFIX
from tests.data.sources import formats
from tests.data.sources.formats import COLUMNS, DOCUMENTS, PAIRS, SUFFIX, opened, settings, write_shards
from tests.rows import png


def build(given, workers=1):
    """How many shards were indexed."""
    return index.build_indexes("x", given, lambda items, total, label: items, workers)


@pytest.fixture(params=index.KINDS)
def source(request, tmp_path):
    """Settings of a source of two shards that is not indexed yet."""
    return write_shards(tmp_path, request.param, DOCUMENTS)


def shard(given, number=0):
    return given.shards.replace("*", f"{number:05d}-of-00002")


def test_without_an_index(source):
    with pytest.raises(
        UserError,
        match=rf"'x': the index of .* does not exist: run python -m mmcore_jax.prepare --index {source.kind} ",
    ):
        open_source("x", source)


def test_only_what_is_stale_is_built(source):
    assert build(source) == 2
    assert build(source) == 0
    os.utime(shard(source, 1), ns=(1, 1))
    assert build(source) == 1
    assert [open_source("x", source)[number] for number in range(5)] == DOCUMENTS


@pytest.mark.parametrize("change", ["longer", "rewritten", "index damaged", "index empty"])
def test_a_stale_index_is_refused(source, change):
    build(source)
    path = shard(source)
    if change == "longer":
        with open(path, "ab") as file:
            file.write(bytes(512))
    if change == "rewritten":
        os.utime(path, ns=(1, 1))
    if change.startswith("index"):
        length = os.path.getsize(path + INDEX_SUFFIX) if change == "index damaged" else 0
        pathlib.Path(path + INDEX_SUFFIX).write_bytes(b"x" * length)
    with pytest.raises(UserError, match=r"the index of .*00000-of-00002.* is of another version of it: run python"):
        open_source("x", source)
    assert build(source) == 1
    assert len(open_source("x", source)) >= 5


def test_several_processes(source, tmp_path):
    assert build(source, workers=2) == 2
    assert open_source("x", source)[4] == DOCUMENTS[4]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(f".{os.getpid()}{INDEX_SUFFIX}")]


def test_an_index_that_cannot_be_read(source):
    """The system's words, of too many maps for example: to build it again would not help."""
    build(source)
    path = shard(source) + INDEX_SUFFIX
    os.remove(path)
    os.mkdir(path)
    for read in (lambda: open_source("x", source), lambda: build(source)):
        with pytest.raises(UserError, match=r"cannot read the index .*\.index: Expected file path, but .* a directory"):
            read()


def test_a_folder_that_cannot_be_written(source):
    for number in range(2):
        os.mkdir(f"{shard(source, number)}{INDEX_SUFFIX}.{os.getpid()}{INDEX_SUFFIX}")
    with pytest.raises(UserError, match=r"cannot write .*\.index .*an index lies beside its shard"):
        build(source)


def test_a_compressed_tar(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(UserError, match=r"a.tar is compressed: random access needs a plain tar"):
        build(settings("webdataset", path))


NAMES = {
    "short": "a.png",
    "prefix": f"{'folder/' * 20}a.png",
    "long": f"{'x' * 300}/{'y' * 300}.png",
    "letters": "bücher/größe.png",
    "dots": "./v1.2/a.seg.png",
}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", NAMES)
def test_names_of_every_tar_format(tmp_path, form, name):
    """Key and extension are split at the first dot of the last part, as webdataset does."""
    if form == tarfile.USTAR_FORMAT and name == "long":
        return
    member, path = NAMES[name], tmp_path / "a.tar"
    stem, extension = member.rsplit("/", 1) if "/" in member else ("", member)
    key = f"{stem}/{extension.split('.')[0]}".strip("/").removeprefix("./")
    path.write_bytes(formats.tar([("z.png", png(1)), (member, png(2))], format=form, pax_headers={"comment": "x"}))
    columns = (Column("image", extension.partition(".")[2]),)
    source = opened("x", settings("webdataset", path, task="t", segments=columns))
    assert source[1] == {"id": key, "task": "t", "segments": [{"type": "image", "image": png(2), "generate": False}]}


def test_names_that_are_not_utf8(tmp_path):
    """Records whose names differ in such bytes alone stay apart."""
    content = formats.tar([("a1.png", png(1)), ("a2.png", png(2))])
    fixed = bytearray(content)
    for old, new in ((b"a1.png", b"a\xff.png"), (b"a2.png", b"a\xfe.png")):
        start = fixed.index(old)
        fixed[start : start + len(old)] = new
        block = fixed[start : start + 512]
        fixed[start + 148 : start + 156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * ord(" "))
    (tmp_path / "a.tar").write_bytes(fixed)
    columns = (Column("image", "png"),)
    source = opened("x", settings("webdataset", tmp_path / "a.tar", task="t", segments=columns))
    assert [(source[i]["id"], source[i]["segments"][0]["image"]) for i in range(2)] == [
        (r"a\xff", png(1)),
        (r"a\xfe", png(2)),
    ]


def test_offsets_are_those_of_tarfile(tmp_path):
    """Thousands of members of all sizes."""
    entries = [(f"{i // 3:04d}.{i % 3}", os.urandom(i % 1500)) for i in range(3000)]
    (tmp_path / "a.tar").write_bytes(formats.tar(entries))
    source = opened("x", settings("webdataset", tmp_path / "a.tar"))
    rows = source._indices[0].to_pylist()
    ours = [(row["key"], *member.values()) for row in rows for member in row["members"]]
    with tarfile.open(tmp_path / "a.tar") as reader:
        theirs = [(*one.name.split("."), one.offset_data, one.size) for one in reader.getmembers()]
    assert ours == theirs


def test_lines_of_every_end(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(png(1))
    records = [b'{"caption": "%d", "image": "1.png"}' % number for number in range(4)]
    path = tmp_path / f"a{SUFFIX['json_lines']}"
    path.write_bytes(b"\n" + records[0] + b"\r\n\n" + records[1] + b"\n  \n" + records[2] + b"\n" + records[3])
    source = opened("x", settings("json_lines", path, task="t", segments=COLUMNS))
    assert [source[i]["segments"][0]["text"] for i in range(len(source))] == ["0", "1", "2", "3"]


def test_the_whole_of_an_index_is_replaced(tmp_path, monkeypatch):
    """A reader never sees half of one."""
    path = tmp_path / "a.tar"
    path.write_bytes(formats.bytes_of("webdataset", PAIRS))
    source = opened("x", settings("webdataset", path))
    before = (tmp_path / "a.tar.index").read_bytes()
    os.utime(path, ns=(1, 1))
    monkeypatch.setattr(os, "replace", lambda old, new: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(UserError, match="cannot write"):
        build(settings("webdataset", path))
    assert (tmp_path / "a.tar.index").read_bytes() == before
    assert source[0] == PAIRS[0]
    assert io.BytesIO(before).read(6) == b"ARROW1"
