"""Dropout of the two pathways and of the condition images: its rates, and that each is drawn by itself."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.bridge.conditioning import Drop, DualPathway, draw_dropout
from mmcore_jax.config import Dropout, Execution, Ramp
from mmcore_jax.nn.masks import VISUAL, plain_meta

ROWS, FRAMES = 4000, 3
KEYS = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), jnp.arange(ROWS))


def draw(images: Ramp, step: int = 0, keys: jax.Array = KEYS):
    """With text and visual embeddings that have rates of their own."""
    return draw_dropout(Dropout(Ramp(0.5, 0.1, 100), Ramp(0.3, 0.3, 1), 0.1, images), keys, FRAMES, jnp.int32(step))


def test_text_and_visual_embeddings_are_dropped_by_their_rates_and_together():
    """Text from .5 to .1 in 100 steps, visual embeddings .3, and both at once .1 besides."""
    for step, text in ((0, 0.5), (50, 0.3), (100, 0.1), (900, 0.1)):
        dropped = draw(Ramp(0.0, 0.0, 1), step)
        np.testing.assert_allclose(dropped.text.mean(axis=0), 1 - 0.9 * (1 - text), atol=0.03)
        np.testing.assert_allclose(dropped.visual.mean(axis=0), 1 - 0.9 * 0.7, atol=0.03)
        np.testing.assert_allclose((dropped.text & dropped.visual).mean(axis=0), 0.1 + 0.9 * text * 0.3, atol=0.03)


def test_condition_images_have_a_rate_of_their_own():
    """It ramps, and is the same whatever a frame has lost besides; frames of a row do not go together."""
    for step, rate in ((0, 0.2), (50, 0.4), (100, 0.6), (900, 0.6)):
        dropped = draw(Ramp(0.2, 0.6, 100), step)
        np.testing.assert_allclose(dropped.images.mean(axis=0), rate, atol=0.03)
        for other in (dropped.text, dropped.visual, jnp.roll(dropped.images, 1, axis=1)):
            np.testing.assert_allclose(dropped.images[other].mean(), rate, atol=0.03)


def test_without_a_rate_nothing_is_drawn():
    """And everything else is what it is with one, bit by bit."""
    without, some = draw(Ramp(0.0, 0.0, 1)), draw(Ramp(0.5, 0.5, 1))
    assert without.images is None
    assert some.images.shape == (ROWS, FRAMES)
    chex.assert_trees_all_equal(without[:2], some[:2])


def test_a_row_draws_by_its_key_alone():
    some, later = Ramp(0.5, 0.5, 1), slice(7, 9)
    chex.assert_trees_all_equal(draw(some, keys=KEYS[later]).images, draw(some).images[later])


def test_pooled_conditions_do_not_grow():
    """However large the embeddings and the projection are; and a frame without tokens has none."""
    module = DualPathway(8, 6, Execution("float32", "float32", "dense", False, "none"))
    text, visual = (10.0 ** jnp.arange(2)[:, None, None] * jax.random.normal(key, (2, 5, 4)) for key in KEYS[:2])
    meta = plain_meta(jnp.ones((2, 5), bool))
    meta = meta._replace(kind=meta.kind.at[:, 3:].set(VISUAL))
    given = text, visual, meta, Drop(*jnp.zeros((2, 2, 2), bool))
    params = module.init(jax.random.key(0), *given)["params"]
    for size in (1.0, 100.0):
        params["pooled_projection"] = jax.tree.map(functools.partial(jnp.multiply, size), params["pooled_projection"])
        pooled = module.apply({"params": params}, *given).pooled
        np.testing.assert_allclose(jnp.square(pooled).mean(axis=-1), [[1, 0], [1, 0]], rtol=1e-3)


def test_visual_embeddings_have_a_place_where_they_are_not_dropped():
    """Their embeddings start at zero, and the text and the null embedding get none."""
    module = DualPathway(8, 0, Execution("float32", "float32", "dense", False, "none"), places=3)
    text, visual = (jax.random.normal(key, (1, 8, 4)) for key in KEYS[:2])
    visual = visual.at[:, 2:].set(visual[:, 2:3])
    meta = plain_meta(jnp.ones((1, 8), bool))
    meta = meta._replace(kind=meta.kind.at[:, 2:].set(VISUAL), frame=meta.frame.at[:, 5:].set(1))
    query = jnp.array([[0, 0, 0, 1, 2, 0, 1, 2]])
    given = text, visual, meta, Drop(jnp.zeros((1, 2), bool), jnp.array([[False, True]])), None, query
    params = module.init(jax.random.key(0), *given)["params"]
    at_first = module.apply({"params": params}, *given).context
    chex.assert_trees_all_equal(at_first[:, 2], at_first[:, 3], at_first[:, 4])
    params["query_positions"] = jax.random.normal(KEYS[2], (3, 8))
    context = module.apply({"params": params}, *given).context
    chex.assert_trees_all_close(context[0, 2:5] - at_first[0, 2:5], params["query_positions"], atol=1e-5)
    chex.assert_trees_all_equal(context[0, :2], at_first[0, :2])
    chex.assert_trees_all_equal(context[0, 5:], at_first[0, 5:])
