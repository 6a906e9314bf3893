"""What is read of a conversation, and that it is what reading all of it gives."""

import jax
import numpy as np
import pytest

from mmcore_jax import reading
from mmcore_jax.data import example as example_lib
from mmcore_jax.data import geometry, layout, packing
from mmcore_jax.data.text import load_tokenizer
from mmcore_jax.generate import fit, prepare
from mmcore_jax.mmcore import Forward
from mmcore_jax.nn.masks import TEXT
from mmcore_jax.reading import Reader
from tests import tiny
from tests.test_generate import PICTURES, load

A, B = (
    [example_lib.text(words), example_lib.image(PICTURES[n], generate=True)] for n, words in enumerate(("one", "2"))
)
GIVEN = example_lib.image(PICTURES[5])
TURNS = {
    "first": ["one"],
    "second": [*A, "make it blue"],
    "again": [*A, "make it blue"],
    "with an image": [*A, *B, GIVEN, "and this one"],
    "undone": [*A, "make it a dot"],
    "another": [GIVEN, *B, "make it blue"],
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return load(tiny.write_dataset(tmp_path_factory.mktemp("data")))


def prepared(config, segments):
    """The item and the one-row batch of a request that ends in the words `segments[-1]`."""
    chat = layout.ChatFormat(load_tokenizer(config.data.tokenizer))
    sizes = geometry.derive(config.model, config.data)
    asked = [*segments[:-1], example_lib.text(segments[-1]), example_lib.image(b"to come", generate=True)]
    item, pictures = prepare({"id": "", "task": "", "segments": asked}, chat, sizes)
    return item, packing.assemble([[(item, pictures)]], 0, fit([item], sizes), sizes)


def difference(model, params, batch, read):
    """The largest, of the text and of the visual embeddings of the last image."""
    forward = Forward(model, params, batch)
    text = batch.diffusion.context_meta.kind == TEXT
    last = batch.images.generated
    assert last.sum() == 1
    differences = (
        (read.features.text - forward.text_embeddings)[text],
        (read.features.visual - forward.visual_embeddings)[last],
    )
    return max(np.abs(each).max() for each in differences)


@pytest.fixture
def shapes(monkeypatch):
    """The tokens and patches that a reader runs, request after request."""
    found, whole = [], reading.rest

    def rest(*arguments):
        part = whole(*arguments)
        found.append((part.tokens.ids.shape[1], part.patches.values.shape[1]))
        return part

    monkeypatch.setattr(reading, "rest", rest)
    return found


def test_conversation(stage, shapes, monkeypatch):
    monkeypatch.setattr(reading, "ROUNDING", 1)
    config, model, params = stage
    reader = Reader(model)
    for name, segments in TURNS.items():
        item, batch = prepared(config, segments)
        assert difference(model, params, batch, reader(params, item, batch)) < 1e-5, name
        known = name in ("second", "again", "with an image", "undone")
        assert (shapes[-1][0] < batch.tokens.ids.shape[1] - 16) == known, name
    image = config.model.vlm.vision.merge_size**2 * 4
    assert [patches / image for _, patches in shapes] == [0, 1, 0, 2, 0, 2]


def test_other_parameters_read_anew(stage):
    config, model, params = stage
    reader, (item, batch) = Reader(model), prepared(config, TURNS["second"])
    reader(params, item, batch)
    other = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    assert difference(model, other, batch, reader(other, item, batch)) < 1e-5


def test_what_only_looks_the_same_is_caught(stage, monkeypatch):
    """As if images did not count, or the words of the last turn."""
    config, model, params = stage
    for before, after in (("another", "with an image"), ("second", "undone")):
        reader = Reader(model)
        reader(params, *prepared(config, TURNS[before]))
        monkeypatch.setattr(reading, "common", lambda first, second: len(first.ids))
        item, batch = prepared(config, TURNS[after])
        assert difference(model, params, batch, reader(params, item, batch)) > 0.01
        monkeypatch.undo()
