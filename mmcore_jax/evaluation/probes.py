"""Measures of a model that no picture shows: predicted visual embeddings, and the flow loss by timestep and pathway.

Every row holds one example, and all batches of a call have one shape. B rows, R ways to drop pathways, N query tokens.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.bridge.conditioning import Drop
from mmcore_jax.config import Alignment, Budgets, Config
from mmcore_jax.data import geometry, layout, packing
from mmcore_jax.data.example import Example
from mmcore_jax.data.layout import Interleaved
from mmcore_jax.mmcore import MMCORE, Forward, Params
from mmcore_jax.nn import masks
from mmcore_jax.objectives import flow_matching

TIMESTEP_BINS = 10
# What is dropped: (text, visual).
DROPPED = {"nothing": (False, False), "text": (True, False), "visual": (False, True), "both": (True, True)}


class Run(NamedTuple):
    """A trained stage."""

    config: Config
    model: MMCORE
    params: Params
    tokenizer: Any


def predicted_embeddings(run: Run, requests: Sequence[Example], batch_size: int = 50) -> np.ndarray:
    """Visual embeddings that the VLM predicts of the image that each request asks for, centred: `[n, N, D_visual]`."""
    settings = run.config.objectives.alignment

    def predict(params: Params, batch: Interleaved) -> jax.Array:
        return of_last_generated(centred(Forward(run.model, params, batch), settings), batch)

    predict = jax.jit(predict)
    batches = _batches(run, requests, min(batch_size, len(requests)))
    return np.concatenate([predict(run.params, batch) for batch in batches])[: len(requests)]


def centred(forward: Forward, settings: Alignment) -> jax.Array:
    """The predicted visual embeddings `[B, I, N, D_visual]`, centred, whether they were trained to be or not."""
    return forward.visual_embeddings if settings.center else forward.visual_embeddings - forward.target_mean


def of_last_generated(values: jax.Array, batch: Interleaved) -> jax.Array:
    """Of values of images `[B, I, ...]` those of the last generated one of each row, `[B, ...]`."""
    generated = batch.images.generated
    return values[jnp.arange(batch.row.size), generated.shape[1] - 1 - jnp.argmax(generated[:, ::-1], axis=1)]


def target_embeddings(run: Run, images: np.ndarray) -> np.ndarray:
    """What the vision target makes of images, uint8 `[n, S, S, 3]`, centred: `[n, N, D_visual]`."""
    embed = jax.jit(functools.partial(_target_embeddings, run.model))
    different, number = np.unique(images, axis=0, return_inverse=True)
    return np.asarray(embed(run.params, different))[number.reshape(-1)]


def _target_embeddings(model: MMCORE, params: Params, images: jax.Array) -> jax.Array:
    embedded = model.apply({"params": params}, images[:, None], method="target_embeddings")[:, 0]
    return embedded - params["statistics"]["target_mean"]


def flow_losses(run: Run, examples: Sequence[Example], seed: int, batch_size: int = 32) -> np.ndarray:
    """The flow loss `[n, R, TIMESTEP_BINS]`, R in the order of `DROPPED`, at a timestep from each of equal bins.

    Noise and timesteps of an example are the same whatever is dropped.
    """
    losses = jax.jit(lambda params, batch, key: flow_losses_of_rows(Forward(run.model, params, batch), key))
    key = jax.random.key(seed)
    parts = [losses(run.params, batch, key) for batch in _batches(run, examples, min(batch_size, len(examples)))]
    return np.concatenate(parts)[: len(examples)]


def flow_losses_of_rows(forward: Forward, key: jax.Array) -> jax.Array:
    """The same of one batch, `[B, R, TIMESTEP_BINS]`; rows that generate nothing have 0."""
    batch = forward.batch
    _ = forward.visual_embeddings, forward.text_embeddings  # computed here, outside of the loop
    keys, jittered = jax.vmap(lambda row: jax.random.split(jax.random.fold_in(key, row)), out_axes=1)(batch.row)
    jitter = jax.vmap(lambda key: jax.random.uniform(key, (TIMESTEP_BINS,)))(jittered)
    timesteps = (jnp.arange(TIMESTEP_BINS) + jitter) / TIMESTEP_BINS
    shape = batch.images.generated.shape
    tokens = jnp.maximum(jnp.sum(batch.diffusion.latent_meta.kind == masks.NOISED, axis=-1), 1)

    def loss(setting: tuple[jax.Array, jax.Array]) -> jax.Array:
        dropped, t = setting
        drop = Drop(*(jnp.full(shape, pathway) for pathway in dropped))
        t = jnp.broadcast_to(t[:, None], shape)
        return flow_matching.squared_errors(forward, t, keys, drop).sum(axis=-1) / tokens

    dropped = jnp.repeat(jnp.array(list(DROPPED.values())), TIMESTEP_BINS, axis=0)
    losses = jax.lax.map(loss, (dropped, jnp.tile(timesteps.T, (len(DROPPED), 1))))
    return losses.T.reshape(-1, len(DROPPED), TIMESTEP_BINS)


def timestep_bins() -> list[str]:
    """The bins by name: "t_0.0_0.1", and so on."""
    edges = [number / TIMESTEP_BINS for number in range(TIMESTEP_BINS + 1)]
    return [f"t_{low:.1f}_{high:.1f}" for low, high in itertools.pairwise(edges)]


def _batches(run: Run, examples: Sequence[Example], batch_size: int) -> Iterator[Interleaved]:
    """Batches of one example a row; the last one is filled up with the last example. What is drawn is square."""
    chat, sizes = layout.ChatFormat(run.tokenizer), geometry.derive(run.config.model, run.config.data)
    if run.config.model.dit:
        side = run.config.data.image_size
        sizes = geometry.of_size(run.config.model, sizes, side, side, f"config.data.image_size {side}")
    items = [layout.make_item(example, chat, sizes) for example in examples]
    budgets = Budgets(*map(int, np.max([layout.lengths(item, sizes) for item in items], axis=0)))
    for first in range(0, len(items), batch_size):
        chosen = [items[min(first + offset, len(items) - 1)] for offset in range(batch_size)]
        rows = [[(item, [layout.picture(frame, sizes) for frame in item.frames])] for item in chosen]
        yield packing.assemble(rows, first, budgets, sizes)
