"""Conversations with a painter that draws the seed, and notes what it was asked for."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from mmcore_jax.data import example, layout
from mmcore_jax.sampling import pictures
from mmcore_jax.sampling.session import Session, read_lines
from tests import rows


@pytest.fixture
def converse(tmp_path, capsys):
    """Runs a session in `tmp_path`, and returns its jobs, stdout and stderr."""

    def converse(*lines, most_images=3):
        jobs = []

        def paint(asked):
            for job in asked:
                jobs.append(job)
                image = np.full((4, 4, 3), job.seed, np.uint8)
                pictures.save(job.output, image, 2, {"seed": str(job.seed)})
                yield image

        Session(paint, tmp_path, 1, most_images).run(lines)
        return jobs, *capsys.readouterr()

    return converse


@pytest.fixture
def given(tmp_path):
    """The path of an image."""
    path = tmp_path / "a given one.png"
    path.write_bytes(rows.png(1))
    return path


def shown(job):
    """The segments of a request, images as the value of their first pixel."""
    for segment in job.request["segments"][:-1]:
        if segment["type"] == "text":
            yield segment["speaker"], segment["text"]
        else:
            yield segment["generate"], int(Image.open(io.BytesIO(segment["image"])).getpixel((0, 0))[0])


def test_a_turn_is_the_next_image_of_an_interleaved_document(converse, given):
    """The tokens and the images that it looks back at are those of the document that training would have."""
    jobs, said, _ = converse(f"/image {given}", "a cat", "/seed 7", "make it blue", most_images=9)
    drawn = [np.full((4, 4, 3), seed, np.uint8) for seed in (1, 7)]
    encoded = []
    for image in drawn:
        encoded.append(io.BytesIO())
        Image.fromarray(image).save(encoded[-1], "PNG")
    first, second = (example.image(file.getvalue(), generate=True) for file in encoded)
    segments = [example.image(rows.png(1)), example.text("a cat"), first, example.text("make it blue"), second]
    trained = layout.make_item({"id": "trained", "task": "interleaved", "segments": segments}, rows.CHAT, rows.SIZES)
    asked = layout.make_item(jobs[1].request, rows.CHAT, rows.SIZES)
    np.testing.assert_array_equal(asked.ids, trained.ids)
    np.testing.assert_array_equal(asked.kinds, trained.kinds)
    for ours, theirs in zip(asked.frames[:-1], trained.frames[:-1], strict=True):
        assert ours == theirs
    assert [(job.seed, job.output.name) for job in jobs] == [(1, "turn_01.png"), (7, "turn_02.png")]
    assert str(jobs[1].output) in said


def test_files_are_at_their_scale_but_the_conversation_is_not(converse):
    (job, after), _, _ = converse("a cat", "bluer")
    assert Image.open(job.output).size == (8, 8)
    assert Image.open(io.BytesIO(after.request["segments"][1]["image"])).size == (4, 4)


def test_undo_takes_back_images_and_then_turns(converse, given):
    lines = ["a cat", f"/image {given}", "/undo", "a dog", "/undo", "a cow", "/undo", "/undo", "/undo", "a fox"]
    jobs, _, errors = converse(*lines)
    assert [list(shown(job)) for job in jobs] == [
        [("user", "a cat")],
        [("user", "a cat"), (True, 1), ("user", "a dog")],
        [("user", "a cat"), (True, 1), ("user", "a cow")],
        [("user", "a fox")],
    ]
    assert [job.output.name for job in jobs] == [f"turn_{number:02d}.png" for number in (1, 2, 3, 4)]
    assert errors == "error: there is nothing to undo.\n"


def test_it_looks_back_as_far_as_the_run_was_trained(converse, given):
    jobs, said, _ = converse("/seed 5", "one", "/seed 6", "two", f"/image {given}", "three", "four")
    grey = rows.picture(1)[0, 0, 0]
    assert list(shown(jobs[1])) == [("user", "one"), (True, 5), ("user", "two")]
    assert list(shown(jobs[2])) == [("user", "two"), (True, 6), (False, grey), ("user", "three")]
    assert list(shown(jobs[3])) == [(False, grey), ("user", "three"), (True, 6), ("user", "four")]
    assert said.count("out of sight, 1 of 2") == said.count("out of sight, 2 of 3") == 1


def test_nothing_of_an_earlier_session_is_overwritten(converse, tmp_path):
    (first,), _, _ = converse("a cat")
    before = first.output.read_bytes()
    (second,), _, _ = converse("/seed 3", "a cat")
    assert second.output == tmp_path / "turn_02.png"
    assert first.output.read_bytes() == before


def test_save_copies_the_last_picture_with_its_metadata(converse, tmp_path):
    jobs, _, errors = converse("/save early.png", "a cat", "/seed 2", "a dog", f"/save {tmp_path / 'my dog.png'}")
    assert errors.count("\n") == 1
    assert "no picture to save" in errors
    assert (tmp_path / "my dog.png").read_bytes() == jobs[1].output.read_bytes()
    assert pictures.read_settings(tmp_path / "my dog.png") == {"seed": "2"}


def test_mistakes_do_not_end_it(converse, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    mistakes = {
        "/imagine": "no command /imagine",
        "/image": "/image needs the path",
        f"/image {tmp_path / 'nowhere.png'}": "nowhere.png cannot be read: No such file",
        f"/image {tmp_path / 'text.png'}": "text.png cannot be used: image has no header",
        "/seed": "/seed needs a number",
        "/seed -1": "/seed needs a number",
        f"/seed {2**32}": "from 0 to 4294967295",
        "/undo": "nothing to undo",
    }
    jobs, _, errors = converse(*mistakes, "", "a cat", "/save x.jpg", f"/save {tmp_path}/no/x.png", "/quit", "never")
    assert [list(shown(job)) for job in jobs] == [[("user", "a cat")]]
    expected = [*mistakes.values(), "x.jpg is not a .png", "does not exist"]
    for line, words in zip(errors.splitlines(), expected, strict=True):
        assert line.startswith("error: ")
        assert words in line


def test_more_images_than_the_run_was_trained_with(converse, given):
    jobs, _, errors = converse(*[f"/image {given}"] * 3, "both")
    assert errors == "error: the run was trained with 3 images at most, the one to draw among them.\n"
    assert [kind for kind, _ in shown(jobs[0])] == [False, False, "user"]


def test_lines_come_from_a_pipe(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a cat\n\xff\nlast"), "utf-8"))
    assert list(itertools.islice(read_lines(), 5)) == ["a cat", "\ufffd", "last"]
