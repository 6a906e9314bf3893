"""Sheets during training: a row for each example, in which every generated image is drawn in its turn."""

import numpy as np
import pytest
from PIL import Image as PillowImage

from mmcore_jax import train
from mmcore_jax.data.example import image, text
from tests import tiny


def example(task: str, *segments) -> dict:
    return {"id": task, "task": task, "segments": list(segments)}


RED, BLUE, GREEN = (tiny.drawing(colour, "square") for colour in ("red", "blue", "green"))
EXAMPLES = [
    example("text_to_image", text("a red square"), image(RED, True)),
    example("compose", image(RED), image(BLUE), text("combine them"), image(GREEN, True)),
    example("turns", text("draw a square"), image(RED, True), text("now"), text("blue"), image(BLUE, True)),
    example("answered", image(RED), text("make it green"), image(GREEN, True), text("done", "assistant")),
    example("caption", image(RED), text("what is this?"), text("a red square", "assistant")),
]


class Batches:
    tokenizer = None

    def examples(self, per_source: int) -> list[dict]:
        return EXAMPLES


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The rows of a sheet whose n-th generated image has the value n, and the requests that it was drawn by."""
    made, rows = [], []

    class Generator:
        def __init__(self, *given) -> None:
            pass

        def __call__(self, params, requests, settings, sizes):
            assert sizes == [(32, 32)] * len(requests)
            made.extend(requests)
            return np.stack([np.full((32, 32, 3), number, np.uint8) for number in range(len(requests))])

        def nearest_size(self, encoded):
            return 32, 32

    monkeypatch.setattr(train, "Generator", Generator)
    monkeypatch.setattr(train, "sheet", lambda given: rows.extend(given) or PillowImage.new("RGB", (1, 1)))
    config = train.config_lib.load(str(tiny.REPOSITORY / "configs/stage2.py"))
    train.Pictures(tmp_path, config, None, Batches()).draw(3, {})
    assert (tmp_path / "samples/step_000003.png").is_file()
    return rows, made


def test_rows(drawn) -> None:
    rows, _ = drawn
    assert [[caption for _, caption in row] for row in rows] == [
        ["a red square", "truth"],
        ["given", "given", "combine them", "truth"],
        ["draw a square", "truth", "now blue", "truth"],
        ["given", "make it green", "truth"],
    ]
    generated = [cell[0] for row in rows for cell in row if cell[1] not in ("given", "truth")]
    assert [int(picture.max()) for picture in generated] == [0, 1, 2, 3, 4]
    red, green = ([cell[0] for cell in row][at].mean(axis=(0, 1)).argmax() for row, at in ((rows[1], 0), (rows[1], 3)))
    assert (red, green) == (0, 1)


def test_each_turn_is_given_the_true_ones_before_it(drawn) -> None:
    _, requests = drawn
    assert [request["id"] for request in requests] == ["text_to_image", "compose", "turns", "turns", "answered"]
    assert requests[2]["segments"] == EXAMPLES[2]["segments"][:2]
    assert requests[3]["segments"] == EXAMPLES[2]["segments"]
    assert all(request["segments"][-1]["generate"] for request in requests)
