"""Sampling through all rooms, on random weights."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from mmcore_jax.data import layout
from mmcore_jax.data.text import load_tokenizer
from mmcore_jax.generate import Generator
from mmcore_jax.mmcore import MMCORE
from tests import tiny


@pytest.fixture(scope="module")
def generate(tmp_path_factory):
    """Images of requests, by a tiny stage 2 of which every parameter is random."""
    config = tiny.config("stage2", tiny.write_dataset(tmp_path_factory.mktemp("data")), "--config.sampling.steps=2")
    model, rng = MMCORE(config.model, config.execution), np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), layout.placeholder(config)))["params"]
    params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    generator = Generator(config, model, load_tokenizer(config.data.tokenizer))
    return lambda *requests: generator(params, requests, config.sampling).astype(int)


def test_text_alone(generate):
    """A batch without an input image has no vision patches; each image is that of a batch which has some."""
    tasks = tiny.examples()
    first, second, edit = tasks["text_to_image"][0], tasks["text_to_image"][1], tasks["edit_colour"][0]
    alone = generate(first, second)
    assert alone.shape == (2, 16, 16, 3)
    assert alone.std() > 1
    assert np.abs(alone - generate(second, first)).max() > 10, "the text does not matter"
    mixed = generate(first, second, edit)
    assert np.abs(alone - mixed[:2]).max() <= 1
    assert np.abs(mixed[0] - mixed[1]).max() > 10
