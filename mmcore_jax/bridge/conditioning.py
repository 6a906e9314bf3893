"""Dual-pathway conditioning (MMCORE section 3.1.1 iii and 3.2): text and visual embeddings, each with its own
projection and its own learned null embedding, and the independent dropout of the two and of the condition images.

A frame that loses its condition images sees no CLEAN token of its document (InstructPix2Pix, arXiv:2211.09800, blanks
the latents of its one image); other frames see what they saw. What the VLM has made of the images stays: it is the
business of the two pathways, which have dropout of their own, and where these are dropped as well, as in the branch
that image guidance starts from, nothing of the images is left. That is then what text-to-image trains too, with both
pathways dropped: an image that is drawn from nothing.

B rows, L context tokens, I frames of a row, D width.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmcore_jax.config import Dropout, Execution, Ramp
from mmcore_jax.nn import masks
from mmcore_jax.nn.layers import Dense, RMSNorm, gather_tokens
from mmcore_jax.nn.masks import TokenMeta
from mmcore_jax.sharding import parameter


class Drop(NamedTuple):
    """Which frames lose their text, their visual embeddings and their condition images, bool `[B, I]` each.

    `images` None means that no frame does.
    """

    text: jax.Array
    visual: jax.Array
    images: jax.Array | None = None


class Condition(NamedTuple):
    """What the diffusion transformer is conditioned on; None where it takes no such thing.

    `alone`: frames without their condition images. `meta`: of the context, None where that is the one of the batch.
    `clean` is added to the clean patches of each frame.
    """

    context: jax.Array  # [B, L, width]
    pooled: jax.Array | None  # [B, I, pooled_width]
    alone: jax.Array | None = None  # bool [B, I]
    meta: TokenMeta | None = None  # [B, L]
    clean: jax.Array | None = None  # [B, I, clean_width]


class DualPathway(nn.Module):
    """Projects both pathways to the context of the diffusion transformer, and their means in each frame to `pooled`.

    `pooled` is normalised: what it adds to the timestep modulates every token, and where it may grow, some gradients
    come out a hundred times as large as the others. With a `clean_width`, what images look like to the VLM goes to
    `clean`, through a projection that starts at zero. With `places`, each of so many queries has an embedding that is
    added to its visual embedding.
    """

    width: int
    pooled_width: int
    execution: Execution
    clean_width: int = 0
    places: int = 0

    @nn.compact
    def __call__(
        self,
        text: jax.Array,
        visual: jax.Array,
        meta: TokenMeta,
        drop: Drop,
        images: jax.Array | None = None,
        query: jax.Array | None = None,
    ) -> Condition:
        """Returns the condition.

        Args:
          text: `[B, L, D_vlm]`, read where `meta.kind` is TEXT.
          visual: `[B, L, D_visual]`, read where it is VISUAL.
          meta: of the context tokens.
          drop: what each frame loses; tokens of a pathway become its null embedding.
          images: `[B, I, D_vlm]` of the images themselves, if they have a `clean_width`.
          query: `[B, L]`, which query a VISUAL token is of, if there are `places`.
        """
        dtype, clean = jnp.dtype(self.execution.compute_dtype), None
        if self.clean_width:
            project = Dense(
                self.clean_width, ("embed", None), True, dtype, nn.initializers.zeros, name="clean_projection"
            )
            clean = project(RMSNorm(name="clean_norm")(images))
        place = None
        if self.places:
            table = self.param(
                "query_positions", parameter(nn.initializers.zeros, None, "embed"), (self.places, self.width)
            )
            place = table[query]
        text = self._pathway(text, gather_tokens(drop.text, meta.frame), "text")
        visual = self._pathway(visual, gather_tokens(drop.visual, meta.frame), "visual", place)
        context = jnp.where((meta.kind == masks.VISUAL)[..., None], visual, text)
        if not self.pooled_width:
            return Condition(context, None, drop.images, clean=clean)
        frames = meta.frame[:, None] == jnp.arange(drop.text.shape[1])[:, None]
        means = [mean(context, frames & (meta.kind == kind)[:, None]) for kind in (masks.TEXT, masks.VISUAL)]
        pooled = Dense(self.pooled_width, ("embed", None), True, dtype, name="pooled_projection")
        pooled = RMSNorm(name="pooled_norm")(pooled(jnp.concatenate(means, axis=-1)))
        return Condition(context, pooled, drop.images, clean=clean)

    def _pathway(self, x: jax.Array, dropped: jax.Array, name: str, place: jax.Array | None = None) -> jax.Array:
        dtype = jnp.dtype(self.execution.compute_dtype)
        x = Dense(self.width, ("embed", None), True, dtype, name=f"{name}_projection")(RMSNorm(name=f"{name}_norm")(x))
        x = x if place is None else x + place
        null = self.param(f"{name}_null", parameter(nn.initializers.normal(1.0), None), (self.width,))
        return jnp.where(dropped[..., None], null.astype(jnp.float32), x).astype(dtype)


def mean(x: jax.Array, members: jax.Array) -> jax.Array:
    """Means of x `[B, L, D]` over each set of `members`, bool `[B, I, L]`; zero for an empty one."""
    weights = members / jnp.maximum(jnp.sum(members, axis=-1, keepdims=True), 1)
    return weights.astype(x.dtype) @ x


def ramp(schedule: Ramp, step: jax.Array) -> jax.Array:
    """The value of a linear schedule at a step, float32."""
    progress = jnp.clip(step / max(schedule.steps, 1), 0.0, 1.0)
    return schedule.start + (schedule.end - schedule.start) * progress


def draw_dropout(config: Dropout, keys: jax.Array, frames: int, step: jax.Array) -> Drop:
    """Draws what each of `frames` frames loses at this step; `keys` `[B]`, one a row."""
    draws = jax.vmap(lambda key: jax.random.uniform(key, (frames, 3)))(keys)
    joint = draws[..., 2] < config.joint
    return Drop(
        text=(draws[..., 0] < ramp(config.text, step)) | joint,
        visual=(draws[..., 1] < ramp(config.visual, step)) | joint,
        images=_draw_images(config.images, keys, frames, step),
    )


def _draw_images(schedule: Ramp, keys: jax.Array, frames: int, step: jax.Array) -> jax.Array | None:
    """From a key of its own, so that a rate of 0 leaves every other number as it is."""
    if schedule.start == schedule.end == 0:
        return None
    draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (frames,)))(keys)
    return draws < ramp(schedule, step)
