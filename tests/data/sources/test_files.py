"""Which files a pattern means."""

import os
import pathlib

import fsspec
import pytest

from mmcore_jax.config import UserError
from mmcore_jax.data.sources import files


@pytest.fixture
def folder(tmp_path):
    """Empty shards of two numbered sets, and things that are none."""
    names = [f"a-{number:02d}.tar" for number in range(13)] + [
        f"sub/b-{number:05d}-of-00003.tar" for number in range(3)
    ]
    for name in [*names, "a-00.tar.index", "a-00.tar.77.index", "notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "a-folder.tar").mkdir()
    return tmp_path


def names(patterns, folder):
    return [str(pathlib.Path(shard.path).relative_to(folder)) for shard in files.find("x", patterns)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-03.tar", ["a-03.tar"]),
        ("a-*.tar", [f"a-{number:02d}.tar" for number in range(13)]),
        ("a-0*", [f"a-{number:02d}.tar" for number in range(10)]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{0..1}{1..2}.tar", ["a-01.tar", "a-02.tar", "a-11.tar", "a-12.tar"]),
        ("*{04..05}*", ["a-04.tar", "a-05.tar"]),
        ("*/b-{00001..00002}-of-*.tar", ["sub/b-00001-of-00003.tar", "sub/b-00002-of-00003.tar"]),
        ("**/b-00001-of-00003.tar", ["sub/b-00001-of-00003.tar"]),
    ],
)
def test_patterns(folder, pattern, expected):
    """Folders and indices are no shards."""
    assert names(f"{folder}/{pattern}", folder) == expected


def test_several_patterns(folder):
    """In the order given, none twice; a tuple may hold paths with commas."""
    given = [f"{folder}/a-05.tar", f"{folder}/a-{{04..06}}.tar"]
    expected = ["a-05.tar", "a-04.tar", "a-06.tar"]
    assert names(", ".join(given), folder) == expected
    assert names(tuple(given), folder) == expected
    (folder / "x,y.tar").write_bytes(b"")
    assert names((f"{folder}/x,y.tar",), folder) == ["x,y.tar"]


def test_a_relative_pattern(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert names("a-{00..01}.tar", folder) == ["a-00.tar", "a-01.tar"]


def test_sizes_and_versions(folder):
    (before,) = files.find("x", f"{folder}/a-00.tar")
    assert before.size == len("a-00.tar")
    (folder / "a-00.tar").write_bytes(b"A-00.TAR")
    (after,) = files.find("x", f"{folder}/a-00.tar")
    assert (after.path, after.size) == (before.path, before.size)
    assert after.version != before.version


def test_a_remote_pattern():
    store = fsspec.filesystem("memory")
    for number in range(4):
        store.pipe_file(f"/remote/a-{number:05d}-of-00004.tar", b"x" * number)
    shards = files.find("x", "memory://remote/a-{00001..00003}-of-00004.tar")
    assert [shard.size for shard in shards] == [1, 2, 3]
    assert files.read(shards[2].path, 1, 2) == b"xx"
    store.rm("/remote/a-00000-of-00004.tar")
    with pytest.raises(UserError, match=r"'x' lacks the shard memory://.*remote/a-00000-of-00004.tar"):
        files.find("x", "memory://remote/*.tar")


def test_mistakes(folder):
    with pytest.raises(UserError, match=r"'x' finds no shards at .*/c-\*.tar: check the path"):
        files.find("x", f"{folder}/a-*.tar,{folder}/c-*.tar")
    with pytest.raises(UserError, match=r"'x' lacks the shard .*/a-13.tar"):
        files.find("x", f"{folder}/a-{{10..14}}.tar")
    with pytest.raises(UserError, match=r"brace that is no range such as \{00000..00999\} in .*a-\{00"):
        files.find("x", f"{folder}/a-{{00,01}}.tar")
    with pytest.raises(UserError, match="cannot list nowhere://x"):
        files.find("x", "nowhere://x/*.tar")
    (folder / "sub/b-00001-of-00003.tar").unlink()
    with pytest.raises(UserError, match=r"'x' lacks the shard .*/sub/b-00001-of-00003.tar"):
        files.find("x", f"{folder}/sub/b-*.tar")
    (folder / "c.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read .*c.tar.gz: random access needs it uncompressed"):
        files.find("x", f"{folder}/c.tar.gz")


def test_part_of_a_numbered_set(folder):
    """One shard may be named alone where the others lie beside it."""
    assert names(f"{folder}/sub/b-00001-of-00003.tar", folder) == ["sub/b-00001-of-00003.tar"]


def test_links(folder):
    """As Hugging Face keeps what it has downloaded; what a link leads to is what changes."""
    (folder / "links").mkdir()
    for number in range(2):
        (folder / f"links/{number}.tar").symlink_to(folder / f"a-{number:02d}.tar")
    (folder / "links/folder.tar").symlink_to(folder / "sub")
    assert names(f"{folder}/links/*.tar", folder) == ["links/0.tar", "links/1.tar"]
    (target,) = files.find("x", f"{folder}/a-00.tar")
    for pattern in ("links/*.tar", "links/0.tar"):
        assert files.find("x", f"{folder}/{pattern}")[0][1:] == target[1:]
    os.utime(target.path, ns=(1, 1))
    assert files.find("x", f"{folder}/links/*.tar")[0].version != target.version


def test_a_link_that_leads_nowhere(folder):
    (folder / "a-13.tar").symlink_to(folder / "gone")
    for pattern in ("a-*.tar", "a-{10..13}.tar"):
        with pytest.raises(UserError, match=r"'x' lacks the shard .*/a-13.tar"):
            files.find("x", f"{folder}/{pattern}")
    assert len(names(f"{folder}/a-{{00..12}}.tar", folder)) == 13


def test_each_of_a_numbered_set_is_looked_for_once(tmp_path, monkeypatch):
    """Sets have thousands of shards, and a remote store takes a while to answer."""
    for number in range(20):
        (tmp_path / f"a-{number:05d}-of-00020.tar").write_bytes(b"")
    asked, exists = [], files.exists
    monkeypatch.setattr(files, "exists", lambda path: asked.append(path) or exists(path))
    assert len(names(f"{tmp_path}/a-{{00003..00007}}-of-*.tar", tmp_path)) == 5
    assert len(asked) == len(set(asked)) == 15

    class Counted(dict):
        def __contains__(self, path):
            asked.append(path)
            return super().__contains__(path)

    asked.clear()
    files._check_complete("x", Counted.fromkeys(shard.path for shard in files.find("x", f"{tmp_path}/*.tar")))
    assert len(asked) == 20
