"""Images to patches and back."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def patchify(images: jax.Array, size: int) -> jax.Array:
    """`[..., height, width, channels] -> [..., patches, size * size * channels]`, patches row by row."""
    *lead, height, width, channels = images.shape
    x = images.reshape(*lead, height // size, size, width // size, size, channels)
    return jnp.moveaxis(x, -4, -3).reshape(*lead, -1, size * size * channels)


def unpatchify(patches: jax.Array, size: int, height: int, width: int) -> jax.Array:
    """Inverse of `patchify`; height and width are those of the image."""
    *lead, _, values = patches.shape
    x = patches.reshape(*lead, height // size, width // size, size, size, values // size**2)
    return jnp.moveaxis(x, -4, -3).reshape(*lead, height, width, -1)


def average_pool(features: jax.Array, grid: int) -> jax.Array:
    """Patches `[B, side * side, D]`, row by row, to cells `[B, grid * grid, D]`.

    A cell is the mean over the patches that it covers, whole or in part, as in PyTorch's `adaptive_avg_pool2d`.
    """
    batch, patches, width = features.shape
    side = math.isqrt(patches)
    first, patch = np.arange(grid)[:, None] * side, np.arange(side) * grid
    covered = (patch > first - grid) & (patch < first + side)
    weights = (covered / covered.sum(1, keepdims=True)).astype(features.dtype)
    pooled = jnp.einsum("rh,cw,bhwd->brcd", weights, weights, features.reshape(batch, side, side, width))
    return pooled.reshape(batch, grid * grid, width)
