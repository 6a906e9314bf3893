"""Files are there as a whole or not at all."""

import contextlib

import pytest

from mmcore_jax.writing import whole, write_text


def test_what_is_there_is_replaced(tmp_path) -> None:
    for text in ("first", "second"):
        write_text(tmp_path / "file", text)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", text)]


def test_a_writer_that_fails_changes_nothing(tmp_path) -> None:
    write_text(tmp_path / "file", "first")
    with contextlib.suppress(ZeroDivisionError), whole(tmp_path / "file") as temporary:
        temporary.write_text("sec")
        assert (tmp_path / "file").read_text() == "first"
        raise ZeroDivisionError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "first")]
    with pytest.raises(OSError, match="No such file"):
        write_text(tmp_path / "nowhere/file", "")
