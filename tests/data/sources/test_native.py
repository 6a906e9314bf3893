"""Any source as native shards: the same examples in order, bad records counted, and what was finished is kept."""

import collections
import dataclasses
import subprocess
import sys
import textwrap

import pytest

from mmcore_jax.config import UserError
from mmcore_jax.data.sources import native, open_source
from tests.data.sources import formats
from tests.data.sources.formats import DOCUMENTS, PAIRS, SETTINGS, opened, settings, write_shards
from tests.tiny import REPOSITORY


def quiet(items, total, label):
    return items


def convert(source, directory, shards=3, workers=1):
    return native.convert(source, directory, shards, quiet, workers)


def read(directory, name):
    source = open_source(name, settings("array_record", f"{directory}/{name}-*.array_record"))
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_format_becomes_native(tmp_path, kind):
    source = opened(kind, write_shards(tmp_path / "given", kind, DOCUMENTS))
    assert convert(source, tmp_path / "made") == (5, {})
    assert read(tmp_path / "made", kind) == DOCUMENTS
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        *(f"{kind}-{shard:05d}-of-00003.array_record" for shard in range(3)),
        f"{kind}.json",
    ]


@pytest.fixture
def damaged(tmp_path):
    """A source of ten records in two tars, of which two are bad for one reason and one for another."""
    members = [formats.members(one) for one in [*PAIRS, *DOCUMENTS]]
    members[1] = members[1][:1]
    members[4] = members[4][:1]
    members[6][0] = ("b.json", b"{")
    (tmp_path / "0.tar").write_bytes(formats.tar(member for one in members[:5] for member in one))
    (tmp_path / "1.tar").write_bytes(formats.tar(member for one in members[5:] for member in one))
    return opened("some", settings("webdataset", tmp_path / "*.tar", task="test"))


GOOD = [one for number, one in enumerate([*PAIRS, *DOCUMENTS]) if number not in (1, 4, 6)]
BAD = {"a named image is missing": 2, "not JSON": 1}


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_are_counted(tmp_path, damaged, workers):
    assert convert(damaged, tmp_path / "made", workers=workers) == (7, collections.Counter(BAD))
    assert read(tmp_path / "made", "some") == GOOD
    before = stamps(tmp_path / "made")
    assert convert(damaged, tmp_path / "made") == (7, collections.Counter(BAD))
    assert stamps(tmp_path / "made") == before


def test_an_image_that_does_not_decode_is_left_out(tmp_path):
    """Its header is whole, so that reading alone finds nothing."""
    (key, picture), *rest = reversed(formats.members(PAIRS[0]))
    cut = [*reversed(rest), (key, picture[:-30])]
    (tmp_path / "0.tar").write_bytes(formats.tar([*cut, *formats.members(PAIRS[1])]))
    source = opened("some", settings("webdataset", tmp_path / "0.tar", task="test"))
    assert len([source[index] for index in range(2)]) == 2
    count, bad = convert(source, tmp_path / "made", shards=1)
    assert count == sum(bad.values()) == 1
    assert "does not decode" in next(iter(bad))
    assert read(tmp_path / "made", "some") == PAIRS[1:2]


def stamps(directory):
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.array_record")}


KILLED = """
    import sys, time
    sys.modules["torch"] = None
    from mmcore_jax.data.sources import native, open_source
    from tests.data.sources.formats import settings

    class Stuck:
        def __init__(self, source):
            self.name, self.fingerprint, self._source = source.name, source.fingerprint, source

        def __len__(self):
            return len(self._source)

        def __getitem__(self, index):
            if index == 5:
                print("stuck", flush=True)
                time.sleep(600)
            return self._source[index]

    source = open_source("some", settings("webdataset", sys.argv[1] + "/*.tar", task="test"))
    native.convert(Stuck(source), sys.argv[1] + "/made", 3, lambda items, total, label: items, 1)
"""


def test_killed_in_the_middle(tmp_path, damaged):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "stuck\n"
        process.kill()
    made = tmp_path / "made"
    first = "some-00000-of-00003.array_record"
    assert [path.suffix for path in sorted(made.iterdir())] == [".array_record", ".partial", ".json"]
    before = stamps(made)
    assert set(before) == {first}
    assert convert(damaged, made) == (7, collections.Counter(BAD))
    assert read(made, "some") == GOOD
    assert stamps(made)[first] == before[first]
    assert not list(made.glob("*.partial"))


def test_the_source_is_hashed_once(tmp_path, damaged, monkeypatch):
    """It is read for that, all of its shards."""
    hashed, fingerprint = [], type(damaged).fingerprint
    monkeypatch.setattr(type(damaged), "fingerprint", lambda source: hashed.append(source) or fingerprint(source))
    convert(damaged, tmp_path / "made")
    assert hashed == [damaged]


def test_a_lost_shard_is_written_again(tmp_path, damaged):
    convert(damaged, tmp_path / "made")
    (tmp_path / "made/some-00001-of-00003.array_record").unlink()
    assert convert(damaged, tmp_path / "made") == (7, collections.Counter(BAD))
    assert read(tmp_path / "made", "some") == GOOD


def test_another_conversion_is_not_overwritten(tmp_path, damaged):
    convert(damaged, tmp_path / "made")
    with pytest.raises(UserError, match=r"some.json is of another source or number of shards"):
        convert(damaged, tmp_path / "made", shards=4)
    other = open_source("some", dataclasses.replace(damaged._settings, task="other"))
    with pytest.raises(UserError, match=r"some.json is of another source or number of shards"):
        convert(other, tmp_path / "made")


def test_a_folder_that_cannot_be_written(tmp_path, damaged):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write .*/file/made .*: choose another directory"):
        convert(damaged, tmp_path / "file/made")


def test_a_full_disk(tmp_path, damaged, monkeypatch):
    """array_record's own error becomes a sentence, and the shard is not there."""

    class Full:
        def __init__(self, path, options):
            pass

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(native, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"cannot write .*/made \(write\(\) failed: No space left on device\): choose"):
        convert(damaged, tmp_path / "made")
    assert not stamps(tmp_path / "made")
