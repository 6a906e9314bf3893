"""Rotary codes: what they are built from, and that only relative positions count."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmcore_jax.nn import rotary

SECTIONS, THETA = (2, 3, 3), 1e6


def score(x, y, code_x, code_y):
    """The product of two rotated vectors `[C]`."""
    return float(jnp.sum(rotary.rotate(x[None, None, None], *code_x) * rotary.rotate(y[None, None, None], *code_y)))


def mrope(*position):
    return rotary.mrope(jnp.array([[position]]), SECTIONS, THETA)


def grid(row, col):
    return rotary.grid(jnp.array([[row]]), jnp.array([[col]]), 16)


@pytest.mark.parametrize("code", [mrope, lambda t, h, w: grid(h, w)])
def test_only_relative_positions_count(code):
    x, y = jax.random.normal(jax.random.key(0), (2, 16))
    near, far = (score(x, y, code(*(np.array([5, 2, 7]) + s)), code(*(np.array([1, 4, 3]) + s))) for s in (0, 300))
    assert abs(near - far) < 2e-3
    assert abs(near - score(x, y, code(5, 2, 7), code(1, 5, 3))) > 1e-2


def test_mrope_sections():
    """Frequency i follows time, row or column; the second half of the channels repeats the first."""
    cos, sin = mrope(3, 50, 700)
    frequencies = THETA ** (-np.arange(8) / 8)
    angles = np.array([3, 3, 50, 50, 50, 700, 700, 700]) * frequencies
    chex.assert_trees_all_close(cos[0, 0], np.cos(np.tile(angles, 2)).astype(np.float32), atol=1e-4)
    chex.assert_trees_all_close(sin[0, 0], np.sin(np.tile(angles, 2)).astype(np.float32), atol=1e-4)


def test_mrope_of_text_is_plain_rotary():
    cos, _ = mrope(11, 11, 11)
    expected = np.cos(11 * THETA ** (-np.arange(8) / 8))
    np.testing.assert_allclose(cos[0, 0, :8], expected, atol=1e-5)


def test_grid_halves():
    cos, _ = grid(3, 5)
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    expected = np.cos(np.tile(np.concatenate([3 * frequencies, 5 * frequencies]), 2))
    np.testing.assert_allclose(cos[0, 0], expected, atol=1e-6)


def test_rotation_keeps_length_and_type():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 16))
    code = rotary.mrope(jnp.arange(9).reshape(1, 3, 3), SECTIONS, THETA)
    turned = rotary.rotate(x, *code)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    assert rotary.rotate(x.astype(jnp.bfloat16), *code).dtype == jnp.bfloat16
    assert code[0].dtype == jnp.float32
