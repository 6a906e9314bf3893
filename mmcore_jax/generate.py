"""Text and images in, images out: the sampler behind `sample`, `evaluate` and the pictures during training.

A request is an `Example` whose last segment is the image to generate; the bytes of that segment are not looked at.
Earlier images are clean inputs, whoever made them, cropped to the shape of the image to come. They see neither the text
nor what is being drawn, so that all steps and branches share their keys and values, computed once.

A negative prompt says what the image is not to be. The VLM reads it in place of the prompt, after the same images, and
the branches of guidance that drop the text have this one instead of the null embedding.

B requests of a batch, I frames of a row, S patches of an image, M = (I - 1) S clean tokens, P values in a patch.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from mmcore_jax.bridge.conditioning import Condition, Drop
from mmcore_jax.config import Budgets, Config, Sampling, UserError
from mmcore_jax.data import example as example_lib
from mmcore_jax.data import geometry, layout, packing
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.geometry import Geometry
from mmcore_jax.data.layout import ChatFormat, Diffusion, Interleaved, Item, Picture
from mmcore_jax.diffusion import flow, guidance, solver
from mmcore_jax.mmcore import MMCORE, Forward, Params
from mmcore_jax.models.mmdit import Memory
from mmcore_jax.nn.layers import gather_tokens
from mmcore_jax.nn.masks import CLEAN, NOISED, PAD
from mmcore_jax.nn.patches import unpatchify
from mmcore_jax.reading import Reader

# Token budgets are rounded up to multiples of this, so that few shapes are compiled.
ROUNDING = 16

Size = tuple[int, int]  # height and width in pixels


class Negative(NamedTuple):
    """A batch of the same requests with negative prompts in place of their prompts, and which of them have one."""

    batch: Interleaved
    given: np.ndarray  # bool [B]


class Generator:
    """Generates the last image of each request.

    With `converses`, what the VLM has read of a request that comes alone is kept for the next one; not where the
    diffusion transformer is told of earlier images too, of which the hidden states are not kept.
    """

    def __init__(self, config: Config, model: MMCORE, tokenizer: Any, converses: bool = False) -> None:
        self._config, self._model = config, model
        told = config.model.dit.clean_visual or config.model.dit.visibility == "history_visual"
        self._reader = Reader(model) if converses and not told else None
        self._sizes = geometry.derive(config.model, config.data)
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
        negatives: Sequence[str | None] | None = None,
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
          negatives: the negative prompt of each, None for one that has none.

        Raises:
          UserError: if an image cannot be used, a size does not fit the diffusion transformer, or nothing leads away
            from a negative prompt.
        """
        if pathways == "visual" and any(words is not None for words in negatives or ()):
            raise UserError("a negative prompt needs the text pathway: without text nothing leads away from it.")
        sizes = sizes or [default_size(request, self._config) for request in requests]
        negatives = negatives or [None] * len(requests)
        keys, images = noise_keys(seed, len(requests)), {}
        for size in dict.fromkeys(sizes):
            chosen = [i for i, other in enumerate(sizes) if other == size]
            asked, negative = ([given[i] for i in chosen] for given in (requests, negatives))
            drawn = self._draw(params, asked, negative, size, settings, keys[np.array(chosen)], pathways, batch_size)
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
        negatives: Sequence[str | None],
        size: Size,
        settings: Sampling,
        keys: jax.Array,
        pathways: str,
        batch_size: int,
    ) -> np.ndarray:
        """Images of one size, `[len(requests), height, width, 3]`."""
        sizes = geometry.of_size(self._config.model, self._sizes, *size, f"the size {show_size(size)}")
        history = self._config.model.dit.visibility == "history_visual"
        rows = [prepare(request, self._format, sizes, history) for request in requests]
        others = [
            row if words is None else prepare(negate(request, words), self._format, sizes, history)
            for row, request, words in zip(rows, requests, negatives)
        ]
        negated = np.array([words is not None for words in negatives])
        budgets = fit([item for item, _ in rows + others], sizes)
        branches = branches_of(settings, pathways)
        shift = flow.shift_of(settings.timestep_shift, settings.timestep_shift_tokens, sizes.latent_capacity)
        timesteps = solver.timesteps(settings.steps, shift, settings.timestep_spacing)
        batch_size = min(batch_size, len(rows))
        images = []
        for first in range(0, len(rows), batch_size):
            chosen = np.minimum(first + np.arange(batch_size), len(rows) - 1)
            batch, negative = packing.assemble([[rows[i]] for i in chosen], first, budgets, sizes), None
            if negated.any():
                other = packing.assemble([[others[i]] for i in chosen], first, budgets, sizes)
                negative = Negative(split(other)[0], negated[chosen])
            if self._reader and len(rows) == 1:
                batch = self._reader(params, rows[0][0], batch)
            inputs = *split(batch), branches, keys[chosen], timesteps
            outputs = self._denoise(params, *inputs, settings=settings, negative=negative)
            images.append(process_allgather(outputs, tiled=True)[: len(rows) - first])
        return np.round(np.concatenate(images) * 255).astype(np.uint8)


# --- Requests to batches ----------------------------------------------------------------------------------------------


def default_size(request: Example, config: Config) -> Size:
    """What a request is drawn at unless it says so: the bucket of its first image, or a square.

    Raises:
      UserError: if that image cannot be read.
    """
    sizes = geometry.derive(config.model, config.data)
    given = [segment["image"] for segment in request["segments"][:-1] if segment["type"] == "image"]
    with _usable(request):
        return sizes.drawn(layout.bucket(given[0], sizes)) if given else (config.data.image_size,) * 2


def check_size(size: Size, config: Config, name: str) -> None:
    """Raises `UserError`, which calls it `name`, for a size that the diffusion transformer cannot draw."""
    geometry.of_size(config.model, geometry.derive(config.model, config.data), *size, name)


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


def negate(request: Example, words: str) -> Example:
    """The request with other words for the image to come; what earlier images were made from stays."""
    *given, last = request["segments"]
    drawn = [number for number, segment in enumerate(given) if segment.get("generate")]
    start = drawn[-1] + 1 if drawn else 0
    images = [segment for segment in given[start:] if segment["type"] == "image"]
    return {**request, "segments": [*given[:start], *images, example_lib.text(words), last]}


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
    negative: Negative | None = None,
) -> jax.Array:
    """Integrates the guided flow over `timesteps`; returns the last image of each row, float32 in [0, 1].

    `batch` and `clean` are from `split`, `keys` `[B]` from `noise_keys`.
    """
    forward = Forward(model, params, batch)
    shape = batch.images.generated.shape
    other = Forward(model, params, negative.batch) if negative else None

    def condition(branch: int) -> Condition:
        drop = jax.tree.map(lambda dropped: jnp.full(shape, dropped[branch]), Drop(*branches[:3]))
        text, part, meta = forward.text_embeddings, batch.diffusion, None
        if other:
            theirs = other.text_embeddings, other.batch.diffusion
            text, part = jax.tree.map(lambda x, y: jnp.where(branches.drop_text[branch], y, x), (text, part), theirs)
            drop, meta = drop._replace(text=drop.text & ~negative.given[:, None]), part.context_meta
        given = forward.visual_embeddings, batch._replace(diffusion=part), drop, forward.image_embeddings
        return forward.model.condition(text, *given)._replace(meta=meta)

    conditions = jax.tree.map(lambda *branch: jnp.stack(branch), *map(condition, range(len(branches.weight))))

    def tokens(patches: jax.Array, part: Diffusion) -> jax.Array:
        return gather_tokens(patches.reshape(shape[0], -1, patches.shape[-1]), part.latent_source)

    latents = forward.latents
    noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)
    added = None if conditions.clean is None else conditions.clean[0]  # the same in all branches
    memory = forward.model.remember(tokens(latents, clean), clean.latent_meta, batch.images.number, added)
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


def branches_of(settings: Sampling, pathways: str = "both") -> guidance.Branches:
    """The branches of guidance; where none drops the images, `drop_images` is None: all then share their masks."""
    needs_conditional = settings.guidance_interval != (0.0, 1.0) or settings.renormalisation > 0
    scales = settings.text_scale, settings.visual_scale, settings.image_scale
    branches = guidance.branches(pathways, *scales, keep_conditional=needs_conditional)
    return branches if branches.drop_images.any() else branches._replace(drop_images=None)
