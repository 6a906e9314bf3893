"""Classifier-free guidance over two pathways with separate scales.

The guided velocity is a weighted sum over branches, each of which drops some of the pathways:
none + visual_scale (visual - none) + text_scale (both - visual), where a branch is named by what it keeps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Branches(NamedTuple):
    """R branches: what each drops, and its weight."""

    drop_text: np.ndarray  # bool [R]
    drop_visual: np.ndarray  # bool [R]
    weight: np.ndarray  # float32 [R], sums to 1


def branches(pathways: str, text_scale: float, visual_scale: float) -> Branches:
    """The branches that guide towards `pathways` ("both", "text" or "visual"); those of weight 0 are left out."""
    if pathways == "both":
        weights = {"none": 1 - visual_scale, "visual": visual_scale - text_scale, "both": text_scale}
    else:
        scale = text_scale if pathways == "text" else visual_scale
        weights = {"none": 1 - scale, pathways: scale}
    used = {name: weight for name, weight in weights.items() if weight}
    return Branches(
        drop_text=np.array([name in ("none", "visual") for name in used]),
        drop_visual=np.array([name in ("none", "text") for name in used]),
        weight=np.array(list(used.values()), np.float32),
    )


def combine(velocities: jax.Array, weight: jax.Array) -> jax.Array:
    """The weighted sum of velocities `[R, ...]`."""
    return jnp.tensordot(weight, velocities, axes=1)
