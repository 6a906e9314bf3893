"""Text and images in, images out: the sampler behind `sample`, `evaluate` and the pictures during training.

A request is an `Example` whose last segment is the image to generate; the bytes of that segment are not looked at.
Earlier images are clean inputs, whoever made them, cropped to the shape of the image to come. They see neither the text
nor what is being drawn, so that all steps and branches share their keys and values, computed once.

B requests of a batch, I frames of a row, S patches of an image, M = (I - 1) S clean tokens, P values in a patch.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.bridge.conditioning import Condition, Drop
from mmcore_jax.config import Budgets, Config, Sampling, UserError
from mmcore_jax.data import layout
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.layout import ChatFormat, Diffusion, Geometry, Interleaved, Item, Picture
from mmcore_jax.diffusion import guidance, solver
from mmcore_jax.mmcore import MMCORE, Forward, Params
from mmcore_jax.models.mmdit import Memory
from mmcore_jax.nn.layers import gather_tokens
from mmcore_jax.nn.masks import CLEAN, NOISED, PAD
from mmcore_jax.nn.patches import unpatchify

# Token budgets are rounded up to multiples of this, so that few shapes are compiled.
ROUNDING = 16

Size = tuple[int, int]  # height and width in pixels


class Generator:
    """Generates the last image of each request."""

    def __init__(self, config: Config, model: MMCORE, tokenizer: Any) -> None:
        self._config, self._model = config, model
        self._sizes = layout.geometry(config.model, config.data)
        self._format = ChatFormat(tokenizer)
        self._denoise = jax.jit(functools.partial(denoise, model), static_argnames="settings")

    def __call__(
        self,
        params: Params,
        requests: Sequence[Example],
        settings: Sampling,
        seed: int | Sequence[int] = 0,
        pathways: str = "both",
        batch_size: int = 32,
        sizes: Sequence[Size] | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """Returns uint8 images `[len(requests), height, width, 3]`, or a list of them where their sizes differ.

        Args:
          params: of all parts of the stage.
          requests: in any order.
          settings: of the sampler.
          seed: the noise of each request follows from it and from the position; of a seed each, from that alone.
          pathways: what conditions the image: "both", "text" or "visual".
          batch_size: how many, of one size, are generated at once.
          sizes: height and width of each; without them those of `default_size`.

        Raises:
          UserError: if an image cannot be used, or a size does not fit the diffusion transformer.
        """
        sizes = sizes or [default_size(request, self._config) for request in requests]
        keys, images = noise_keys(seed, len(requests)), {}
        for size in dict.fromkeys(sizes):
            chosen = [i for i, other in enumerate(sizes) if other == size]
            drawn = self._draw(
                params, [requests[i] for i in chosen], size, settings, keys[np.array(chosen)], pathways, batch_size
            )
            images |= dict(zip(chosen, drawn))
        images = [images[i] for i in range(len(requests))]
        return np.stack(images) if len(set(sizes)) == 1 else images

    def nearest_size(self, encoded: bytes) -> Size:
        """The size of the bucket that training has an image in."""
        return self._sizes.drawn(layout.bucket(encoded, self._sizes))

    def _draw(
        self,
        params: Params,
        requests: Sequence[Example],
        size: Size,
        settings: Sampling,
        keys: jax.Array,
        pathways: str,
        batch_size: int,
    ) -> np.ndarray:
        """Images of one size, `[len(requests), height, width, 3]`."""
        sizes = layout.of_size(self._config.model, self._sizes, *size, f"the size {show_size(size)}")
        history = self._config.model.dit.visibility == "history_visual"
        items, pictures = zip(*(prepare(request, self._format, sizes, history) for request in requests))
        budgets = fit(items, sizes)
        scales = settings.text_scale, settings.visual_scale
        branches = guidance.branches(pathways, *scales, keep_conditional=_needs_conditional(settings))
        timesteps = solver.timesteps(settings.steps, settings.timestep_shift, settings.timestep_spacing)
        batch_size = min(batch_size, len(items))
        images = []
        for first in range(0, len(items), batch_size):
            chosen = [min(first + offset, len(items) - 1) for offset in range(batch_size)]
            batch = layout.assemble([[(items[i], pictures[i])] for i in chosen], first, budgets, sizes)
            outputs = self._denoise(params, *split(batch), branches, keys[np.array(chosen)], timesteps, settings)
            images.append(np.asarray(outputs)[: len(items) - first])
        return np.round(np.concatenate(images) * 255).astype(np.uint8)


# --- Requests to batches ----------------------------------------------------------------------------------------------


def default_size(request: Example, config: Config) -> Size:
    """What a request is drawn at unless it says so: the bucket of its first image, or a square.

    Raises:
      UserError: if that image cannot be read.
    """
    sizes = layout.geometry(config.model, config.data)
    given = [segment["image"] for segment in request["segments"][:-1] if segment["type"] == "image"]
    with _usable(request):
        return sizes.drawn(layout.bucket(given[0], sizes)) if given else (config.data.image_size,) * 2


def check_size(size: Size, config: Config, name: str) -> None:
    """Raises `UserError`, which calls it `name`, for a size that the diffusion transformer cannot draw."""
    layout.of_size(config.model, layout.geometry(config.model, config.data), *size, name)


def show_size(size: Size) -> str:
    """A size as people write it, HEIGHTxWIDTH."""
    return "{}x{}".format(*size)


def prepare(request: Example, chat: ChatFormat, sizes: Geometry, history: bool = False) -> tuple[Item, list[Picture]]:
    """A request as tokens, and the images that it gives; the image to come starts blank.

    With `history`, what conditioned the earlier generated images is kept.

    Raises:
      UserError: if an image cannot be used.
    """
    with _usable(request):
        item = layout.make_item(request, chat, sizes)
        *inputs, last = item.frames
        if not history:
            inputs = [dataclasses.replace(frame, generate=False, text=[], queries=[]) for frame in inputs]
        pictures = [layout.picture(frame, sizes) for frame in inputs]
    item.frames = [*inputs, last]
    return item, [*pictures, Picture()]


@contextlib.contextmanager
def _usable(request: Example) -> Iterator[None]:
    """Turns a `BadExample` into a `UserError`."""
    try:
        yield
    except BadExample as bad:
        raise UserError(f"an input image of {request['id']!r} cannot be used: {bad}.") from bad


def fit(items: Sequence[Item], sizes: Geometry) -> Budgets:
    """Budgets of rows that hold any one of the items."""
    most = np.max([layout.lengths(item, sizes) for item in items], axis=0)
    budgets = Budgets(*(int(count) for count in most))
    return dataclasses.replace(
        budgets,
        vlm_tokens=-(-budgets.vlm_tokens // ROUNDING) * ROUNDING,
        context_tokens=-(-budgets.context_tokens // ROUNDING) * ROUNDING,
    )


def split(batch: Interleaved) -> tuple[Interleaved, Diffusion]:
    """The batch with the noised latent tokens `[B, S]` alone, and the clean ones `[B, M]`, which end in padding."""
    part, meta, generated = batch.diffusion, batch.diffusion.latent_meta, batch.images.generated
    images = generated.shape[1]
    last = images - 1 - np.argmax(generated[:, ::-1], axis=1)
    to_come = (meta.kind == NOISED) & (meta.frame == last[:, None])
    size = to_come.sum(axis=1).max()
    return batch._replace(diffusion=_keep(part, to_come, size)), _keep(part, meta.kind == CLEAN, (images - 1) * size)


def _keep(part: Diffusion, kept: np.ndarray, length: int) -> Diffusion:
    """The latent tokens of those `kept`, bool `[B, T]`, in their order, then padding up to `length`."""
    order = np.argsort(~kept, axis=1, kind="stable")[:, :length]
    meta = part.latent_meta._replace(kind=np.where(kept, part.latent_meta.kind, PAD))
    meta, source = jax.tree.map(lambda field: np.take_along_axis(field, order, axis=1), (meta, part.latent_source))
    return part._replace(latent_meta=meta, latent_source=source)


def noise_keys(seed: int | Sequence[int], count: int) -> jax.Array:
    """Typed keys `[count]`: by position where one `seed` is for all, else of each one's seed, as if it were alone."""
    if isinstance(seed, int):
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), np.arange(count))
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(np.array(seed, np.uint32))


# --- Batches to images ------------------------------------------------------------------------------------------------


def denoise(
    model: MMCORE,
    params: Params,
    batch: Interleaved,
    clean: Diffusion,
    branches: guidance.Branches,
    keys: jax.Array,
    timesteps: jax.Array,
    settings: Sampling,
) -> jax.Array:
    """Integrates the guided flow over `timesteps`; returns the last image of each row, float32 in [0, 1].

    `batch` and `clean` are from `split`, `keys` `[B]` from `noise_keys`.
    """
    forward = Forward(model, params, batch)
    shape = batch.images.generated.shape

    def condition(drop_text: jax.Array, drop_visual: jax.Array) -> Condition:
        drop = Drop(jnp.full(shape, drop_text), jnp.full(shape, drop_visual))
        given = forward.text_embeddings, forward.visual_embeddings, batch, drop, forward.image_embeddings
        return forward.model.condition(*given)

    conditions = [condition(*dropped) for dropped in zip(branches.drop_text, branches.drop_visual)]
    conditions = jax.tree.map(lambda *branch: jnp.stack(branch), *conditions)

    def tokens(patches: jax.Array, part: Diffusion) -> jax.Array:
        return gather_tokens(patches.reshape(shape[0], -1, patches.shape[-1]), part.latent_source)

    latents = forward.latents
    noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)
    added = None if conditions.clean is None else conditions.clean[0]  # the same in all branches
    memory = forward.model.remember(tokens(latents, clean), clean.latent_meta, added)
    noise = tokens(noise, batch.diffusion)
    drawn = integrate(forward.model, conditions, branches, noise, batch, timesteps, settings, memory)
    size = (side // model.config.autoencoder.downsampling for side in batch.images.pixels.shape[2:4])
    return forward.model.autoencoder.decode(unpatchify(drawn, model.config.dit.patch_size, *size))


def integrate(
    model: MMCORE,
    conditions: Condition,
    branches: guidance.Branches,
    noise: jax.Array,
    batch: Interleaved,
    timesteps: jax.Array,
    settings: Sampling,
    memory: Memory | None = None,
) -> jax.Array:
    """Carries noised tokens, from `noise` `[B, S, P]`, along the guided flow, over `timesteps`.

    `conditions` has a leading axis of branches; `model` is bound to its parameters; `memory` is of the clean tokens.
    """
    shape = batch.images.generated.shape

    def of_branch(condition: Condition, tokens: jax.Array, t: jax.Array) -> jax.Array:
        return model.velocity(tokens, condition, jnp.full(shape, t), batch, memory)

    def conditional(tokens: jax.Array, t: jax.Array) -> jax.Array:
        return of_branch(jax.tree.map(lambda branch: branch[-1], conditions), tokens, t)

    def guided(tokens: jax.Array, t: jax.Array) -> jax.Array:
        velocities = jax.vmap(of_branch, in_axes=(0, None, None))(conditions, tokens, t)
        combined = guidance.combine(velocities, branches.weight)
        if not settings.renormalisation:
            return combined
        return guidance.renormalise(combined, velocities[-1], settings.renormalisation)

    everywhere = settings.guidance_interval == (0.0, 1.0)
    velocity = guided if everywhere else guidance.within(settings.guidance_interval, guided, conditional)
    return solver.SOLVERS[settings.solver](velocity, noise, timesteps)


def _needs_conditional(settings: Sampling) -> bool:
    return settings.guidance_interval != (0.0, 1.0) or settings.renormalisation > 0
