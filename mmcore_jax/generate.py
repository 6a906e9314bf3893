"""Text and images in, images out: the sampler behind `sample`, `evaluate` and the pictures during training.

A request is an `Example` whose last segment is the image to generate; the bytes of that segment are not looked at.
B requests of a batch, I frames of a row, T latent tokens, S patches of an image, P values in a patch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.bridge.conditioning import Condition, Drop
from mmcore_jax.config import Budgets, Config, Sampling, UserError
from mmcore_jax.data import layout
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.layout import Interleaved, Item, Picture
from mmcore_jax.diffusion import guidance, solver
from mmcore_jax.mmcore import MMCORE, Forward, Params
from mmcore_jax.nn import masks
from mmcore_jax.nn.patches import unpatchify

# Token budgets are rounded up to multiples of this, so that few shapes are compiled.
ROUNDING = 16


class Generator:
    """Generates the last image of each request."""

    def __init__(self, config: Config, model: MMCORE, tokenizer: Any) -> None:
        self._model = model
        self._sizes = layout.geometry(config.model, config.data)
        self._format = layout.ChatFormat(tokenizer)
        self._denoise = jax.jit(functools.partial(_denoise, model))

    def __call__(
        self,
        params: Params,
        requests: Sequence[Example],
        settings: Sampling,
        seed: int = 0,
        pathways: str = "both",
        batch_size: int = 32,
    ) -> np.ndarray:
        """Returns uint8 images `[len(requests), size, size, 3]`.

        Args:
          params: of all parts of the stage.
          requests: in any order; the noise of each follows from `seed` and its position.
          settings: of the sampler.
          pathways: what conditions the image: "both", "text" or "visual".
          batch_size: how many are generated at once.
        """
        items, pictures = zip(*map(self._prepare, requests))
        budgets = self._budgets(items)
        branches = guidance.branches(pathways, settings.text_scale, settings.visual_scale)
        timesteps = solver.timesteps(settings.steps, settings.timestep_shift, settings.timestep_spacing)
        batch_size = min(batch_size, len(items))
        images = []
        for first in range(0, len(items), batch_size):
            chosen = [min(first + offset, len(items) - 1) for offset in range(batch_size)]
            batch = layout.assemble([[(items[i], pictures[i])] for i in chosen], first, budgets, self._sizes)
            outputs = self._denoise(params, batch, _last_image(batch), branches, jax.random.key(seed), timesteps)
            images.append(np.asarray(outputs)[: len(items) - first])
        return np.round(np.concatenate(images) * 255).astype(np.uint8)

    def _prepare(self, request: Example) -> tuple[Item, list[Picture]]:
        """A request as tokens, and the images that it gives; the image to come starts blank."""
        try:
            item = layout.make_item(request, self._format, self._sizes)
            return item, [layout.picture(frame, self._sizes) for frame in item.frames[:-1]] + [Picture()]
        except BadExample as bad:
            raise UserError(f"an input image of {request['id']!r} cannot be used: {bad}.") from bad

    def _budgets(self, items: list[Item]) -> Budgets:
        most = np.max([layout.lengths(item, self._sizes) for item in items], axis=0)
        budgets = Budgets(*(int(count) for count in most))
        return dataclasses.replace(
            budgets,
            vlm_tokens=-(-budgets.vlm_tokens // ROUNDING) * ROUNDING,
            context_tokens=-(-budgets.context_tokens // ROUNDING) * ROUNDING,
        )


def _denoise(
    model: MMCORE,
    params: Params,
    batch: Interleaved,
    last: jax.Array,
    branches: guidance.Branches,
    key: jax.Array,
    timesteps: jax.Array,
) -> jax.Array:
    """Integrates the guided flow over `timesteps`; returns the last image of each row, float32 in [0, 1].

    `last` holds the tokens of that image, `[B, S]`.
    """
    forward = Forward(model, params, batch)
    shape = batch.images.generated.shape

    def condition(drop_text: jax.Array, drop_visual: jax.Array) -> Condition:
        drop = Drop(jnp.full(shape, drop_text), jnp.full(shape, drop_visual))
        return forward.model.condition(forward.text_embeddings, forward.visual_embeddings, batch, drop)

    conditions = [condition(*dropped) for dropped in zip(branches.drop_text, branches.drop_visual)]
    conditions = jax.tree.map(lambda *branch: jnp.stack(branch), *conditions)
    clean = forward.latents
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch.row)
    noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:]))(keys)
    tokens = integrate(
        forward.model, conditions, branches, forward.model.latent_tokens(clean, noise, batch), batch, timesteps
    )
    size = batch.images.pixels.shape[-2] // model.config.autoencoder.downsampling
    patches = tokens[jnp.arange(tokens.shape[0])[:, None], last]
    return forward.model.autoencoder.decode(unpatchify(patches, model.config.dit.patch_size, size, size))


def integrate(
    model: MMCORE,
    conditions: Condition,
    branches: guidance.Branches,
    tokens: jax.Array,
    batch: Interleaved,
    timesteps: jax.Array,
) -> jax.Array:
    """Carries the noised ones of `tokens` `[B, T, P]` along the guided flow, over `timesteps`.

    `conditions` has a leading axis of branches; `model` is bound to its parameters.
    """
    shape = batch.images.generated.shape
    is_noised = (batch.diffusion.latent_meta.kind == masks.NOISED)[..., None]

    def velocity(tokens: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.full(shape, t)
        velocities = jax.vmap(lambda condition: model.velocity(tokens, condition, t, batch))(conditions)
        return is_noised * guidance.combine(velocities, branches.weight)

    return solver.euler(velocity, tokens, timesteps)


def _last_image(batch: Interleaved) -> np.ndarray:
    """Where the noised tokens of each row's last image stand, `[B, S]`."""
    meta = batch.diffusion.latent_meta
    noised = meta.kind == masks.NOISED
    last = np.where(noised, meta.frame, -1).max(axis=1, keepdims=True)
    return np.stack([np.flatnonzero(row) for row in noised & (meta.frame == last)])
