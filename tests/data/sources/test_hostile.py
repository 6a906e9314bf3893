"""Damaged shards: no crash, exact counts by reason, every good record still there and in its place."""

import collections
import dataclasses
import io
import json
import pathlib
import struct
import tarfile
import zlib
from collections.abc import Callable

import msgpack
import pytest

from mmcore_jax.config import Column
from mmcore_jax.data import example as example_lib
from tests.data.sources import formats
from tests.data.sources.formats import COLUMNS, PAIRS, array_record, opened, outcomes, parquet, settings, tar
from tests.rows import png

IDS = [f"pair-{i}" for i in range(5)]
BAD = 2  # the record that is damaged


def with_bad(*outcome: str) -> list[str]:
    """All records, the damaged one replaced."""
    return [*IDS[:BAD], *outcome, *IDS[BAD + 1 :]]


def header_of(content: bytes, name: str) -> int:
    """Where the header of a tar member begins."""
    with tarfile.open(fileobj=io.BytesIO(content)) as reader:
        return reader.getmember(name).offset


def flip(content: bytes, position: int, count: int = 1) -> bytes:
    """Inverts bytes."""
    damaged = bytearray(content)
    damaged[position : position + count] = bytes(byte ^ 0xFF for byte in damaged[position : position + count])
    return bytes(damaged)


def huge_png(width: int, height: int) -> bytes:
    """A PNG that claims such a size."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


# --- Tar --------------------------------------------------------------------------------------------------------------

TAR_COLUMNS = (Column("text", "txt"), Column("image", "png", generate=True))
CAPTION, PICTURE = PAIRS[BAD]["segments"][0]["text"].encode(), PAIRS[BAD]["segments"][1]["image"]


def pair(number: int) -> list[tuple[str, bytes]]:
    text, image = PAIRS[number]["segments"]
    return [(f"pair-{number}.txt", text["text"].encode()), (f"pair-{number}.png", image["image"])]


def pairs_tar(*bad, **options) -> bytes:
    """The pairs as a tar, with these entries in the place of the damaged one."""
    good = [pair(number) for number in range(5)]
    return tar([*good[0], *good[1], *bad, *good[3], *good[4]], **options)


BASE = pairs_tar(*pair(BAD))


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "pair-1.png"
    return info


def lying_size(field: bytes) -> bytes:
    """A header whose checksum is right and whose size is not."""
    content = bytearray(BASE)
    start = header_of(BASE, "pair-2.png")
    content[start + 124 : start + 136] = field
    block = content[start : start + 512]
    content[start + 148 : start + 156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * ord(" "))
    return bytes(content)


def broken_continuation(kind: bytes) -> bytes:
    """A long name, or its PAX form, with garbage behind its header."""
    content = pairs_tar(*pair(BAD))
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, 512
    inserted = info.tobuf(tarfile.USTAR_FORMAT) + b"\xee" * 1024
    start = header_of(content, "pair-2.txt")
    return content[:start] + inserted + content[start:]


MISSING = "column 'png' is missing"
TORN = "tar header is damaged"
DECODE, UNKNOWN = "image does not decode ({})", "image has no header of a known format"
TAR = {
    "good": (BASE, IDS),
    "member missing": (pairs_tar(pair(BAD)[0]), with_bad(MISSING)),
    "text empty": (pairs_tar(("pair-2.txt", b""), pair(BAD)[1]), with_bad("empty text")),
    "text blank": (pairs_tar(("pair-2.txt", b" \n"), pair(BAD)[1]), with_bad("empty text")),
    "text not UTF-8": (pairs_tar(("pair-2.txt", b"\xff\xfe"), pair(BAD)[1]), with_bad("text is not UTF-8")),
    "image empty": (pairs_tar(pair(BAD)[0], ("pair-2.png", b"")), with_bad("empty image")),
    "image cut": (pairs_tar(pair(BAD)[0], ("pair-2.png", PICTURE[:60])), with_bad(DECODE.format("OSError"))),
    "image is text": (
        pairs_tar(pair(BAD)[0], ("pair-2.png", b"<html>404</html>")),
        with_bad(UNKNOWN),
    ),
    "image 50,000 pixels wide": (
        pairs_tar(pair(BAD)[0], ("pair-2.png", huge_png(50_000, 1_500))),
        with_bad("image has too many pixels"),
    ),
    "image that bursts": (
        pairs_tar(pair(BAD)[0], ("pair-2.png", huge_png(50_000, 50_000))),
        with_bad("image has too many pixels"),
    ),
    "image of no height": (
        pairs_tar(pair(BAD)[0], ("pair-2.png", huge_png(8, 0))),
        with_bad(UNKNOWN),
    ),
    "member twice": (pairs_tar(*pair(BAD), ("pair-2.png", png(3))), with_bad("duplicate member")),
    "member twice, in capitals": (pairs_tar(*pair(BAD), ("pair-2.PNG", png(3))), with_bad("duplicate member")),
    "key twice": (pairs_tar(*pair(BAD), *pair(1)), [*IDS[:3], "pair-1", *IDS[3:]]),
    "path upwards": (pairs_tar(pair(BAD)[0], ("../pair-2.png", PICTURE)), with_bad(MISSING)),
    "path from the root": (pairs_tar(pair(BAD)[0], ("/pair-2.png", PICTURE)), with_bad(MISSING)),
    "path upwards beside a good one": (pairs_tar(*pair(BAD), ("../../pair-2.png", b"evil")), IDS),
    "symbolic link": (pairs_tar(pair(BAD)[0], special("pair-2.png", tarfile.SYMTYPE)), with_bad(MISSING)),
    "hard link": (pairs_tar(pair(BAD)[0], special("pair-2.png", tarfile.LNKTYPE)), with_bad(MISSING)),
    "device": (pairs_tar(pair(BAD)[0], special("pair-2.png", tarfile.CHRTYPE)), with_bad(MISSING)),
    "directory": (pairs_tar(pair(BAD)[0], special("pair-2.png", tarfile.DIRTYPE)), with_bad(MISSING)),
    "only a link": (pairs_tar(special("pair-2.txt", tarfile.SYMTYPE)), with_bad("column 'txt' is missing")),
    "members of no record": (
        pairs_tar(("README", b"x"), *pair(BAD), (".DS_Store", b"x"), ("a/._b.png", b"x")),
        IDS,
    ),
    "first header of a record damaged": (
        flip(BASE, header_of(BASE, "pair-2.txt")),
        with_bad(TORN, "column 'txt' is missing"),
    ),
    "header inside a record damaged": (
        flip(pairs_tar(*pair(BAD), ("pair-2.cls", b"7")), header_of(BASE, "pair-2.png")),
        with_bad(TORN),
    ),
    "last header damaged": (flip(BASE, header_of(BASE, "pair-4.png")), [*IDS[:4], MISSING, TORN]),
    "headers of a whole record damaged": (
        flip(flip(BASE, header_of(BASE, "pair-2.txt")), header_of(BASE, "pair-2.png")),
        with_bad(TORN),
    ),
    "blocks overwritten": (
        BASE[: header_of(BASE, "pair-2.txt")]
        + b"\xee" * (header_of(BASE, "pair-3.txt") - header_of(BASE, "pair-2.txt"))
        + BASE[header_of(BASE, "pair-3.txt") :],
        with_bad(TORN),
    ),
    "size beyond the end": (lying_size(b"77777777777\0"), with_bad("shard is truncated")),
    "size beyond 64 bits": (lying_size(b"\x80" + b"\xff" * 11), with_bad("shard is truncated")),
    "size below zero": (lying_size(b"\xff" * 10 + b"\xf0\x00"), with_bad(MISSING, TORN)),
    "long name without end": (broken_continuation(tarfile.GNUTYPE_LONGNAME), [*IDS[:BAD], TORN, *IDS[BAD:]]),
    "PAX header that is none": (broken_continuation(tarfile.XHDTYPE), [*IDS[:BAD], TORN, *IDS[BAD:]]),
    "cut in a member": (BASE[: header_of(BASE, "pair-4.png") + 600], [*IDS[:4], "shard is truncated"]),
    "cut in a header": (BASE[: header_of(BASE, "pair-4.png") + 100], [*IDS[:4], MISSING, TORN]),
    "cut before the end mark": (BASE[: header_of(BASE, "pair-4.png") + 1024], IDS),
    "two tars in one": (tar(pair(0)) + tar([*pair(1), *pair(2)]) + tar([*pair(3), *pair(4)]), IDS),
    "no tar": (b"\xee" * 5000, [TORN]),
    "no bytes": (b"", [TORN]),
}

# --- Documents --------------------------------------------------------------------------------------------------------


def text(content: str = "x", **changes) -> dict:
    return {"type": "text", "text": content, "speaker": "user", **changes}


NAMED = {"type": "image", "image": "pair-2.0.png", "generate": True}


def document_tar(content) -> bytes:
    """The documents as a tar, with this JSON in the place of the damaged one."""
    content = content if isinstance(content, bytes) else json.dumps({"task": "t", "segments": content}).encode()
    documents = [formats.members(one) for one in PAIRS]
    documents[BAD][0] = ("pair-2.json", content)
    return tar(member for members in documents for member in members)


DOCUMENT_TAR = {
    "good": (document_tar([text(), NAMED]), IDS),
    "not JSON": (document_tar(b"{'a': 1}"), with_bad("not JSON")),
    "JSON cut": (document_tar(b'{"segments": ['), with_bad("not JSON")),
    "JSON too deep": (document_tar(b"[" * 100_000), with_bad("not JSON")),
    "JSON not UTF-8": (document_tar(b'{"segments": "\xff"}'), with_bad("text is not UTF-8")),
    "JSON list": (document_tar(b"[]"), with_bad("not a JSON object")),
    "no segments": (document_tar(b'{"task": "t"}'), with_bad("no list of segments")),
    "segments no list": (document_tar({"type": "text"}), with_bad("no list of segments")),
    "segments empty": (document_tar([]), with_bad("no segments")),
    "segment no object": (document_tar(["red"]), with_bad("segment is str, expected an object")),
    "segment of an unknown type": (document_tar([text(type="video")]), with_bad("unknown segment type")),
    "segment whose type is a list": (document_tar([text(type=["text"])]), with_bad("unknown segment type")),
    "unknown speaker": (document_tar([text(speaker="system")]), with_bad("unknown speaker")),
    "segment lacks a key": (document_tar([{"type": "text", "text": "x"}]), with_bad("text segment lacks speaker")),
    "segment has another key": (
        document_tar([text(colour="red")]),
        with_bad("text segment holds more than type, text, speaker"),
    ),
    "text no text": (document_tar([text(text=5)]), with_bad("text segment: text is int, expected str")),
    "half of a surrogate pair": (document_tar([text("\ud800")]), with_bad("text is not UTF-8")),
    "image that is not there": (
        document_tar([text(), {**NAMED, "image": "pair-2.9.png"}]),
        with_bad("a named image is missing"),
    ),
    "image of another record": (
        document_tar([text(), {**NAMED, "image": "pair-1.0.png"}]),
        with_bad("a named image is missing"),
    ),
    "image outside": (document_tar([text(), {**NAMED, "image": "../../passwd"}]), with_bad("a named image is missing")),
    "image a number": (
        document_tar([text(), {**NAMED, "image": 7}]),
        with_bad("image is int, expected bytes or a name"),
    ),
    "image generated from nothing": (document_tar([NAMED]), with_bad("an image is generated from nothing")),
    "id no text": (
        document_tar(b'{"id": [1], "task": "t", "segments": [{"type": "text", "text": "x", "speaker": "user"}]}'),
        with_bad("example: id is list, expected str"),
    ),
    "task no text": (
        document_tar(b'{"task": 5, "segments": [{"type": "text", "text": "x", "speaker": "user"}]}'),
        with_bad("example: task is int, expected str"),
    ),
}

# --- JSON lines -------------------------------------------------------------------------------------------------------


def line(number: int, **changes) -> bytes:
    record = {"id": f"pair-{number}", "caption": f"caption {number}", "image": f"{number}.png", **changes}
    return json.dumps(record).encode() + b"\n"


def lines(*bad: bytes) -> bytes:
    return b"".join([line(0), line(1), *bad, line(3), line(4)])


LINES = {
    "good": (lines(line(BAD)), IDS),
    "blank lines": (lines(b"\n", line(BAD), b"   \r\n\n"), IDS),
    "byte order mark": (b"\xef\xbb\xbf" + lines(line(BAD)), IDS),
    "line cut": (lines(line(BAD)[:20] + b"\n"), with_bad("not JSON")),
    "last line cut": (lines(line(BAD))[:-20], [*IDS[:4], "not JSON"]),
    "line of zeros": (lines(b"\0" * 100 + b"\n"), with_bad("not JSON")),
    "line a number": (lines(b"5\n"), with_bad("not a JSON object")),
    "number without end": (lines(b"1" * 10_000 + b"\n"), with_bad("not JSON")),
    "key missing": (lines(b'{"id": "pair-2", "image": "2.png"}\n'), with_bad("column 'caption' is missing")),
    "null": (lines(line(BAD, caption=None)), with_bad("column 'caption' is null")),
    "null in a list": (lines(line(BAD, caption=["a", None])), with_bad("column 'caption' is null")),
    "number for text": (lines(line(BAD, caption=3)), with_bad("column 'caption' is int, expected text")),
    "image missing": (lines(line(BAD, image="9.png")), with_bad("a named image is missing")),
    "image outside": (lines(line(BAD, image="../secret.png")), with_bad("an image path leaves the folder of images")),
    "image from the root": (
        lines(line(BAD, image="/etc/passwd")),
        with_bad("an image path leaves the folder of images"),
    ),
    "image a folder": (lines(line(BAD, image=".")), with_bad("a named image cannot be read (IsADirectoryError)")),
    "image with a zero": (lines(line(BAD, image="\0")), with_bad("a named image cannot be read (ValueError)")),
    "image of a long name": (lines(line(BAD, image="x" * 5000)), with_bad("a named image cannot be read (OSError)")),
}

# --- Parquet ----------------------------------------------------------------------------------------------------------


def rows(**changes) -> list[dict]:
    made = [
        {"id": f"pair-{i}", "caption": f"caption {i}", "image": {"bytes": png(10 + i), "path": None}} for i in range(5)
    ]
    made[BAD] |= changes
    return made


PLAIN = dict(compression="none", use_dictionary=False, write_statistics=False)
TABLE = parquet(rows(), write_page_checksum=True, **PLAIN)
GROUP = "parquet row group is damaged"
PARQUET = {
    "good": (TABLE, IDS),
    "null": (parquet(rows(caption=None)), with_bad("column 'caption' is null")),
    "null image": (parquet(rows(image=None)), with_bad("column 'image' is null")),
    "image of a path only": (
        parquet(rows(image={"bytes": None, "path": "/etc/passwd"})),
        with_bad("an image has a path and no bytes"),
    ),
    "text not UTF-8": (
        parquet(rows(caption="\x01\x02\x03"), **PLAIN).replace(b"\x01\x02\x03", b"\xff\xfe\xfd"),
        with_bad("text is not UTF-8"),
    ),
    "column missing": (
        parquet([{key: row[key] for key in ("id", "image")} for row in rows()]),
        ["column 'caption' is missing"] * 5,
    ),
    "column of another type": (
        parquet([{**row, "caption": 1} for row in rows()]),
        ["column 'caption' is int, expected text"] * 5,
    ),
    "page damaged": (flip(TABLE, TABLE.index(png(12)) + 20, 30), [*IDS[:2], GROUP, GROUP, "pair-4"]),
    "footer damaged": (flip(TABLE, len(TABLE) - 200, 150), ["parquet footer is damaged"]),
    "cut": (TABLE[:-100], ["parquet footer is damaged"]),
    "no parquet": (b"hello" * 100, ["parquet footer is damaged"]),
    "no bytes": (b"", ["parquet footer is damaged"]),
}

# --- ArrayRecord ------------------------------------------------------------------------------------------------------

RECORDS = [example_lib.encode(one) for one in PAIRS]


def native(bad: bytes) -> bytes:
    return array_record([*RECORDS[:BAD], bad, *RECORDS[BAD + 1 :]])


def packed(**changes) -> bytes:
    return msgpack.packb({**PAIRS[BAD], **changes})


NATIVE = array_record(RECORDS)
ARRAY_RECORD = {
    "good": (NATIVE, IDS),
    "record damaged": (flip(NATIVE, NATIVE.index(b"pair-2") + 4, 3), with_bad("record cannot be read")),
    "not msgpack": (native(b"\xc1"), with_bad("not a msgpack record (FormatError)")),
    "record cut": (native(RECORDS[BAD][:-5]), with_bad("not a msgpack record (ValueError)")),
    "bytes behind the record": (native(RECORDS[BAD] + b"x"), with_bad("not a msgpack record (ExtraData)")),
    "record empty": (native(b""), with_bad("not a msgpack record (ValueError)")),
    "text not UTF-8": (
        native(packed(task="\x01\x02").replace(b"\x01\x02", b"\xff\xfe")),
        with_bad("text is not UTF-8"),
    ),
    "no map": (native(msgpack.packb([1])), with_bad("example is list, expected a map")),
    "key missing": (native(msgpack.packb({"id": "x", "segments": []})), with_bad("example lacks task")),
    "another key": (native(packed(license="x")), with_bad("example holds more than id, task, segments")),
    "footer damaged": (flip(NATIVE, 1 << 16, 1 << 10), ["shard does not open"]),
    "cut": (NATIVE[: len(NATIVE) // 2], ["shard does not open"]),
    "no array_record": (b"hello" * 100, ["shard does not open"]),
    "no bytes": (b"", ["shard does not open"]),
}


@dataclasses.dataclass(frozen=True)
class Damage:
    """Shards of a kind by the name of what is wrong with them, and what becomes of their records."""

    kind: str
    shards: dict[str, tuple[bytes, list[str]]]
    settings: dict


ALL = {
    "webdataset": Damage("webdataset", TAR, dict(task="pairs", segments=TAR_COLUMNS)),
    "webdataset-documents": Damage("webdataset", DOCUMENT_TAR, {}),
    "json_lines": Damage("json_lines", LINES, dict(task="pairs", segments=COLUMNS)),
    "parquet": Damage("parquet", PARQUET, dict(task="pairs", segments=COLUMNS)),
    "array_record": Damage("array_record", ARRAY_RECORD, {}),
}


def test_there_are_many():
    assert sum(len(damage.shards) - 1 for damage in ALL.values()) == 102


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[Damage], pathlib.Path]:
    """Writes the shards of a kind, numbered in the order of the table."""

    def write(damage: Damage) -> pathlib.Path:
        directory = tmp_path_factory.mktemp(damage.kind)
        for number, (content, _) in enumerate(damage.shards.values()):
            (directory / f"{number:03d}{formats.SUFFIX[damage.kind]}").write_bytes(content)
        (directory / "images").mkdir()
        (directory / "secret.png").write_bytes(png(1))
        for number in range(5):
            (directory / f"images/{number}.png").write_bytes(png(10 + number))
        return directory

    return write


@pytest.mark.parametrize("name", ALL)
def test_all_damage_at_once(folder, name):
    """One source of all shards: each record is where its shard has it, whatever the shards before it hold."""
    damage = ALL[name]
    shards = folder(damage) / f"*{formats.SUFFIX[damage.kind]}"
    source = opened("hostile", settings(damage.kind, shards, **damage.settings))
    found = outcomes(source)
    places = [source.where(index) for index in range(len(source))]
    for number, (case, (_, expected)) in enumerate(damage.shards.items()):
        shard = f"{number:03d}{formats.SUFFIX[damage.kind]}"
        assert [one for one, place in zip(found, places) if shard in place] == expected, case
    expected = [one for _, outcome in damage.shards.values() for one in outcome]
    assert found == expected
    reasons = collections.Counter(one for one in found if one not in IDS)
    assert reasons == collections.Counter(one for one in expected if one not in IDS)
