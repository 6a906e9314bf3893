"""Rows of static shape: examples packed under several budgets, and written into arrays.

`plan` packs items into rows by their lengths, `assemble` writes rows into the arrays of `layout`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mmcore_jax.config import Budgets, Config
from mmcore_jax.data import geometry
from mmcore_jax.data import image as image_lib
from mmcore_jax.data.geometry import Geometry, Shape
from mmcore_jax.data.layout import (
    Diffusion,
    Features,
    Frame,
    Images,
    Interleaved,
    Item,
    Pairs,
    Patches,
    Picture,
    Tokens,
)
from mmcore_jax.nn.tokens import CLEAN, IMAGE, NOISED, PAD, TEXT, VISUAL, TokenMeta, merge_order

_STEEPNESS = 8.0


def plan(taken: np.ndarray, budgets: Budgets, rng: np.random.Generator, multiple: int = 1) -> list[list[int]]:
    """Packs items of lengths `taken` `[n, 5]` into rows, as many as a `multiple`, and returns the rows shuffled.

    As few rows as the budgets allow are opened at once, and each item, the largest first, goes where the sum over
    budgets of exp(steepness * share used) grows least: so all rows fill evenly in all budgets. If an item then fits
    nowhere, it is tried again with a few more rows.
    """
    limits = np.maximum(np.array(dataclasses.astuple(budgets)), 1)
    sizes = np.asarray(taken).reshape(-1, len(limits)) / limits
    count = _up(sizes.sum(axis=0).max(), multiple)
    while (rows := _fill(sizes, count)) is None:
        count += _up(count / 200, multiple)
    return [rows[i] for i in rng.permutation(count)]


def _up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _fill(sizes: np.ndarray, count: int) -> list[list[int]] | None:
    """Items as shares of the budgets into `count` rows, or None if they do not fit."""
    rows: list[list[int]] = [[] for _ in range(count)]
    used, potential = np.zeros((count, sizes.shape[1])), np.ones((count, sizes.shape[1]))
    for number in np.argsort(-sizes.sum(axis=1), kind="stable"):
        fits = (used + sizes[number] <= 1 + 1e-9).all(axis=1)
        if not fits.any():
            return None
        growth = potential @ (np.exp(_STEEPNESS * sizes[number]) - 1)
        best = int(np.argmin(np.where(fits, growth, np.inf)))
        rows[best].append(int(number))
        used[best] += sizes[number]
        potential[best] = np.exp(_STEEPNESS * used[best])
    return rows


def assemble(
    rows: Sequence[Iterable[tuple[Item, list[Picture]]]],
    first: int,
    budgets: Budgets,
    sizes: Geometry,
    features: Features | None = None,
) -> Interleaved:
    """Writes rows of (item, its images) into arrays; `first` is the global position of the first row.

    What the images bring of `features` is written into those, zeros before. Where there are pixels for the autoencoder,
    all are of the first bucket of `sizes`.
    """
    batch = empty(len(rows), budgets, sizes, np.empty)._replace(features=features or Features())
    for b, row in enumerate(rows):
        cursor = _Cursor()
        for document, (item, pictures) in enumerate(row):
            _write_item(batch, b, document, item, pictures, cursor, sizes)
        for pixels in (batch.images.pixels, batch.images.targets):
            pixels[b, cursor.slot :] = 0
    return batch._replace(row=np.arange(first, first + len(rows), dtype=np.int32))


@dataclasses.dataclass
class _Cursor:
    """How full a row is."""

    token: int = 0
    patch: int = 0
    context: int = 0
    latent: int = 0
    slot: int = 0


def _write_item(
    batch: Interleaved, b: int, document: int, item: Item, pictures: list[Picture], at: _Cursor, sizes: Geometry
) -> None:
    start, first_slot = at.token, at.slot
    span = slice(start, start + len(item.ids))
    tokens = batch.tokens
    frames = np.minimum(item.frame_of, max(len(item.frames) - 1, 0)) + first_slot
    _write_meta(tokens.meta, b, span, document, frames, item.kinds)
    tokens.ids[b, span] = item.ids
    tokens.positions[b, span] = item.positions
    tokens.source[b, span] = item.source
    if at.patch:
        tokens.source[b, span][item.kinds == IMAGE] += at.patch // sizes.merge**2
    learned = np.flatnonzero(item.learned)
    tokens.targets[b, start + learned - 1] = item.ids[learned]
    at.token = span.stop

    for number, (frame, picture) in enumerate(zip(item.frames, pictures)):
        batch.images.number[b, at.slot] = number
        batch.images.pixels[b, at.slot] = 0 if picture.pixels is None else picture.pixels
        batch.images.targets[b, at.slot] = 0 if picture.target is None else picture.target
        if picture.vlm is not None:
            _write_patches(batch.patches, b, document, picture.vlm, at, sizes)
        if frame.generate:
            batch.images.generated[b, at.slot] = True
            batch.images.queries[b, at.slot] = start + np.array(frame.queries)
        for name, values in picture.features._asdict().items():
            if values is not None:
                given = getattr(batch.features, name)[b]
                (given[at.context :] if name == "text" else given[at.slot])[: len(values)] = values
        if sizes.latent_capacity and frame.shape:
            _write_frame(batch.diffusion, b, document, frame, start, at, sizes)
        at.slot += 1


def _write_patches(patches: Patches, b: int, document: int, picture: np.ndarray, at: _Cursor, sizes: Geometry) -> None:
    height, width, _ = picture.shape
    rows, cols = merge_order(height // sizes.vision_patch, width // sizes.vision_patch, sizes.merge)
    span = slice(at.patch, at.patch + rows.size)
    patches.values[b, span] = image_lib.patches(picture, sizes.vision_patch, sizes.merge)
    _write_meta(patches.meta, b, span, document, at.slot, IMAGE, rows, cols)
    at.patch = span.stop


def _write_frame(out: Diffusion, b: int, document: int, frame: Frame, start: int, at: _Cursor, sizes: Geometry) -> None:
    if frame.generate:
        span = slice(at.context, at.context + len(frame.text))
        _write_meta(out.context_meta, b, span, document, at.slot, TEXT)
        out.context_source[b, span] = start + np.array(frame.text, np.int32)
        query, *places = _query_places(frame.shape, sizes.query_grid)
        span = slice(span.stop, span.stop + query.size)
        _write_meta(out.context_meta, b, span, document, at.slot, VISUAL, *places)
        out.context_source[b, span] = at.slot * query.size + query
        at.context = span.stop
    patch, *places = _patch_places(frame.shape)
    for kind in [CLEAN] * frame.clean + [NOISED] * frame.generate:
        span = slice(at.latent, at.latent + patch.size)
        _write_meta(out.latent_meta, b, span, document, at.slot, kind, *places)
        out.latent_source[b, span] = at.slot * sizes.latent_capacity + patch
        at.latent = span.stop


@functools.cache
def _patch_places(shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the latent patches of an image, and their rows and columns from its centre."""
    rows, cols = shape
    patch = np.arange(rows * cols)
    return patch, patch // cols - (rows + 1) // 2, patch % cols - (cols + 1) // 2


@functools.cache
def _query_places(shape: Shape, grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the queries of an image, and the latent patches that each is in the middle of, from the centre."""
    query = np.arange(grid * grid)
    places = ((2 * n + 1) * side // (2 * grid) - (side + 1) // 2 for n, side in zip(divmod(query, grid), shape))
    return query, *places


def _write_meta(meta: TokenMeta, b: int, span: slice, *values) -> None:
    """Writes document, frame and kind, and of what stands on a grid also row and column."""
    for field, value in zip(meta, values):
        field[b, span] = value


def empty(rows: int, budgets: Budgets, sizes: Geometry, allocate: Callable[..., np.ndarray] = np.zeros) -> Interleaved:
    """A batch of nothing but padding; its pixels, which `allocate` makes, are of the first bucket."""

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((rows, *shape), np.int32)

    def meta(length: int) -> TokenMeta:
        index = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy()
        return TokenMeta(zeros(length), zeros(length), zeros(length) + PAD, zeros(length), zeros(length), index)

    images, length, patches = budgets.images, budgets.vlm_tokens, bool(sizes.vision_patch) * budgets.vision_patches

    def pixels(height: int, width: int) -> np.ndarray:
        return allocate((rows, images, height, width, 3), np.uint8)

    return Interleaved(
        row=zeros(),
        tokens=Tokens(zeros(length), meta(length), zeros(length, 3), zeros(length), zeros(length) - 1),
        patches=Patches(np.zeros((rows, patches, sizes.vision_patch**2 * 3), np.uint8), meta(patches)),
        images=Images(
            pixels(*sizes.drawn(sizes.buckets[0])),
            pixels(sizes.target_size, sizes.target_size),
            np.zeros((rows, images), bool),
            zeros(images, sizes.query_grid**2),
            zeros(images),
        ),
        diffusion=Diffusion(
            meta(budgets.context_tokens),
            zeros(budgets.context_tokens),
            meta(budgets.latent_tokens),
            zeros(budgets.latent_tokens),
        ),
    )


def placeholder(config: Config, rows: int = 1) -> Interleaved | Pairs:
    """A batch of empty rows in the shapes of a run, to derive parameters from."""
    if config.data.layout == "interleaved":
        return empty(rows, config.data.budgets, geometry.derive(config.model, config.data))
    target = config.model.vision_target
    return assemble_pairs([None] * rows, 0, target.vision.image_size, target.text.max_length)


def assemble_pairs(
    pairs: list[tuple[np.ndarray, list[int]] | None], first: int, image_size: int, max_length: int
) -> Pairs:
    """Writes (decoded image, token ids) into arrays; where there is no pair, the row stays empty."""
    size = len(pairs)
    pixels = np.zeros((size, image_size, image_size, 3), np.uint8)
    ids, valid = np.zeros((size, max_length), np.int32), np.zeros((size, max_length), bool)
    for b, pair in enumerate(pairs):
        if pair:
            pixels[b], tokens = pair
            ids[b, : len(tokens)] = tokens
            valid[b, : len(tokens)] = True
    return Pairs(np.arange(first, first + size, dtype=np.int32), pixels, ids, valid)
