"""Rotary position embeddings, in float32, in the rotate-half convention of Qwen2.5-VL. C channels per head."""

import jax
import jax.numpy as jnp
import numpy as np


def mrope(positions: jax.Array, sections: tuple[int, int, int], theta: float) -> tuple[jax.Array, jax.Array]:
    """Multimodal rotary code of Qwen2.5-VL: each frequency follows time, row or column.

    Args:
      positions: `[B, L, 3]`, (time, row, column).
      sections: how many of the C / 2 frequencies follow each.
      theta: base of the frequencies.

    Returns:
      cos and sin, `[B, L, C]` each.
    """
    channels = 2 * sum(sections)
    frequencies = theta ** (-np.arange(0, channels, 2, dtype=np.float32) / channels)
    axis = np.repeat(np.arange(3), sections)
    angles = positions.astype(jnp.float32)[..., axis] * frequencies
    return _cos_sin(angles)


def grid(row: jax.Array, col: jax.Array, channels: int, theta: float = 10_000.0) -> tuple[jax.Array, jax.Array]:
    """Two-dimensional rotary code: half of the frequencies follow the row, half the column.

    Args:
      row, col: `[B, L]`.
      channels: C, a multiple of 4.

    Returns:
      cos and sin, `[B, L, C]` each.
    """
    half = channels // 2
    frequencies = theta ** (-np.arange(0, half, 2, dtype=np.float32) / half)
    angles = jnp.stack([row, col], axis=-1).astype(jnp.float32)[..., None] * frequencies
    return _cos_sin(angles.reshape(*row.shape, half))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Applies the code to x `[B, L, H, C]`, in float32, and returns x's dtype.

    The halves of a head change places in a product: to concatenate 40 channels and 40 costs a TPU twice that.
    """
    turn = np.kron([[0, 1], [-1, 0]], np.eye(x.shape[-1] // 2)).astype(x.dtype)
    highest = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    turned = jnp.einsum("blhc,cd->blhd", x, turn, **highest)
    return (x.astype(jnp.float32) * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)


def _cos_sin(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)
