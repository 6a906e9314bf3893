"""Classifier-free guidance over the condition images and two pathways, with separate scales.

The guided velocity is a weighted sum over branches, each of which drops some of what conditions the image. They are
nested as in InstructPix2Pix (arXiv:2211.09800): none + image_scale (images - none) + visual_scale (visual - images) +
text_scale (both - visual), where "images" keeps the condition images alone, "visual" the visual embeddings too, and
"both" everything.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.diffusion.solver import Velocity

# What each branch drops: text, visual embeddings, condition images.
_DROPS = {
    "none": (True, True, True),
    "images": (True, True, False),
    "visual": (True, False, False),
    "text": (False, True, False),
    "both": (False, False, False),
}


class Branches(NamedTuple):
    """R branches: what each drops, and its weight. `drop_images` may be None where none does."""

    drop_text: np.ndarray  # bool [R]
    drop_visual: np.ndarray  # bool [R]
    drop_images: np.ndarray | None  # bool [R]
    weight: np.ndarray  # float32 [R], sums to 1


def branches(
    pathways: str, text_scale: float, visual_scale: float, image_scale: float = 1.0, keep_conditional: bool = False
) -> Branches:
    """The branches that guide towards `pathways` ("both", "text" or "visual"); those of weight 0 are left out.

    Args:
      pathways: what conditions the image beside the condition images.
      text_scale, visual_scale: of the pathways.
      image_scale: of the condition images; at 1 every branch keeps them.
      keep_conditional: the last branch is the one that drops nothing of `pathways`, though its weight be 0.
    """
    if pathways == "both":
        chain = {"images": image_scale, "visual": visual_scale, "both": text_scale}
    else:
        chain = {"images": image_scale, pathways: text_scale if pathways == "text" else visual_scale}
    weights = dict(zip(("none", *chain), -np.diff([1.0, *chain.values(), 0.0])))
    used = [name for name, weight in weights.items() if weight or (keep_conditional and name == pathways)]
    drops = np.array([_DROPS[name] for name in used])
    return Branches(*drops.T, weight=np.array([weights[name] for name in used], np.float32))


def combine(velocities: jax.Array, weight: jax.Array) -> jax.Array:
    """The weighted sum of velocities `[R, ...]`."""
    return jnp.tensordot(weight, velocities, axes=1)


def renormalise(guided: jax.Array, conditional: jax.Array, strength: float) -> jax.Array:
    """Takes the norm of the guided velocity to that of the conditional one, each sample `[B, ...]` by itself.

    A guided velocity that is too long oversaturates. `strength` goes from 0, as it is, to 1, the conditional norm;
    values that are not to count are 0 in both.
    """
    axes = tuple(range(1, guided.ndim))
    lengths = [jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (conditional, guided)]
    ratio = lengths[0] / jnp.where(lengths[1] > 0, lengths[1], 1.0)
    return guided * (1.0 + strength * (ratio - 1.0))


def within(interval: tuple[float, float], guided: Velocity, conditional: Velocity) -> Velocity:
    """The velocity that is `guided` where low <= t <= high (arXiv:2404.07724) and `conditional` elsewhere.

    Of the two, only the one that is needed runs; t is a scalar.
    """
    low, high = interval

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        return jax.lax.cond((low <= t) & (t <= high), guided, conditional, x, t)

    return velocity
