"""Dropout of the two pathways and of the condition images: its rates, and that each is drawn by itself."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.bridge.conditioning import draw_dropout
from mmcore_jax.config import Dropout, Ramp

ROWS, FRAMES = 4000, 3
KEYS = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), jnp.arange(ROWS))


def draw(images: Ramp, step: int = 0, keys: jax.Array = KEYS):
    """With text and visual embeddings that have rates of their own."""
    return draw_dropout(Dropout(Ramp(0.5, 0.1, 100), Ramp(0.3, 0.3, 1), 0.1, images), keys, FRAMES, jnp.int32(step))


def test_condition_images_have_a_rate_of_their_own():
    """It ramps, and is the same whatever a frame has lost besides; frames of a row do not go together."""
    for step, rate in ((0, 0.2), (50, 0.4), (100, 0.6), (900, 0.6)):
        dropped = draw(Ramp(0.2, 0.6, 100), step)
        np.testing.assert_allclose(dropped.images.mean(axis=0), rate, atol=0.03)
        for other in (dropped.text, dropped.visual, jnp.roll(dropped.images, 1, axis=1)):
            np.testing.assert_allclose(dropped.images[other].mean(), rate, atol=0.03)
    np.testing.assert_allclose(dropped.text.mean(), 1 - 0.9 * 0.9, atol=0.02)


def test_without_a_rate_nothing_is_drawn():
    """And everything else is what it is with one, bit by bit."""
    without, some = draw(Ramp(0.0, 0.0, 1)), draw(Ramp(0.5, 0.5, 1))
    assert without.images is None
    assert some.images.shape == (ROWS, FRAMES)
    chex.assert_trees_all_equal(without[:2], some[:2])


def test_a_row_draws_by_its_key_alone():
    some, later = Ramp(0.5, 0.5, 1), slice(7, 9)
    chex.assert_trees_all_equal(draw(some, keys=KEYS[later]).images, draw(some).images[later])
