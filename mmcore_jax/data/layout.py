"""Rows of static shape: several examples packed under budgets, with per-token metadata for attention and positions.

An example becomes an `Item`: its VLM tokens in the chat format of Qwen2.5-VL, and what each diffusion token is made
from. `plan` packs items into rows, `assemble` writes rows into arrays. B rows, L VLM tokens, S vision patches, I images
of a row, N query tokens, C context tokens, T latent tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from mmcore_jax.config import Budgets, Config, Data, Model, QwenVision, UserError
from mmcore_jax.data import image as image_lib
from mmcore_jax.data.example import BadExample, Example, Image, Text
from mmcore_jax.data.text import Encoder
from mmcore_jax.nn.tokens import (
    CLEAN,
    IMAGE,
    NOISED,
    PAD,
    QUERY,
    TEXT,
    VISUAL,
    TokenMeta,
    merge_order,
    mrope_positions,
)

# --- Arrays -----------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """The VLM's sequence.

    `source`: merged patch of an IMAGE, query of a QUERY token. `targets`: the next token, or -1.
    """

    ids: np.ndarray  # [B, L]
    meta: TokenMeta  # [B, L]
    positions: np.ndarray  # [B, L, 3]: time, row, column
    source: np.ndarray  # [B, L]
    targets: np.ndarray  # [B, L]


class Patches(NamedTuple):
    """The VLM's vision patches, in merge order."""

    values: np.ndarray  # uint8 [B, S, P]
    meta: TokenMeta  # [B, S]


class Images(NamedTuple):
    """The images of a row by frame slot; `generated` marks those to predict, `queries` is where their queries stand.

    `number` counts the images of a document, from 0.
    """

    pixels: np.ndarray | None  # uint8 [B, I, height, width, 3], for the autoencoder; None once it has seen them
    targets: np.ndarray  # uint8 [B, I, size, size, 3], for the vision target
    generated: np.ndarray  # bool [B, I]
    queries: np.ndarray  # [B, I, N], position in the VLM's sequence
    number: np.ndarray  # [B, I]


class Diffusion(NamedTuple):
    """The diffusion transformer's sequence, and the gather table of where each token comes from.

    `context_source`: VLM position of a TEXT token; slot * N + query of a VISUAL one.
    `latent_source`: slot * `Geometry.latent_capacity` + patch.
    """

    context_meta: TokenMeta  # [B, C]
    context_source: np.ndarray  # [B, C]
    latent_meta: TokenMeta  # [B, T]
    latent_source: np.ndarray  # [B, T]


class Features(NamedTuple):
    """What frozen networks have made of the examples beforehand; None is left to the step."""

    latents: np.ndarray | None = None  # float32 [B, I, capacity, P], of images that are generated or looked back at
    targets: np.ndarray | None = None  # float32 [B, I, N, D_visual], target embeddings of generated images
    text: np.ndarray | None = None  # [B, C, D], hidden states, at TEXT tokens of the context
    visual: np.ndarray | None = None  # [B, I, N, D_visual], visual embeddings of generated images


class Interleaved(NamedTuple):
    """A batch of packed rows. `row` is the position in the global batch, which random numbers are drawn by."""

    row: np.ndarray  # [B]
    tokens: Tokens
    patches: Patches
    images: Images
    diffusion: Diffusion
    features: Features = Features()


class Pairs(NamedTuple):
    """A batch of one image and one right-padded text each, for contrastive training."""

    row: np.ndarray  # [B]
    pixels: np.ndarray  # uint8 [B, size, size, 3]
    ids: np.ndarray  # [B, L]
    valid: np.ndarray  # bool [B, L]


# --- Geometry ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes that turn an example into tokens; 0 where a stage has no such part, or is given its features.

    The VLM sees images of `vlm_pixels` pixels, from the least to the most. An example that generates images is cropped
    to one of `buckets`, (rows, columns) of latent patches; without a diffusion transformer only their ratio matters.
    `target_size` is the side of what the vision target sees, `latent_patch` the pixels along a side of a latent patch,
    and `latent_capacity` the most latent patches of an image.
    """

    vlm_pixels: tuple[int, int]
    vision_patch: int
    merge: int
    query_grid: int
    target_size: int
    buckets: tuple["Shape", ...]
    latent_patch: int
    latent_capacity: int

    @property
    def merged_patch(self) -> int:
        """Pixels along a side of a merged patch, one IMAGE token."""
        return self.vision_patch * self.merge

    def drawn(self, shape: "Shape") -> tuple[int, int]:
        """Height and width of the pixels that the autoencoder sees of a bucket."""
        return tuple(int(self.latent_patch * side) for side in shape)


Shape = tuple[float, float]  # height and width, in any unit


def geometry(model: Model, data: Data) -> Geometry:
    """Derives the sizes from the parts of a model.

    Raises:
      UserError: if an image size or the budget of vision patches does not fit the patches of a part, the diffusion
        transformer does not fit the autoencoder, there are more images than frame embeddings, or no aspect ratio.
    """
    vision = model.vlm.vision
    _check_vision(vision, data)
    target = model.vision_target.vision if model.vision_target else None
    if target and target.image_size // target.patch_size < model.queries.grid:
        raise UserError(
            f"config.model.queries.grid {model.queries.grid} is finer than the vision target's patches, "
            f"{target.image_size // target.patch_size} a side."
        )
    if model.frames and data.budgets.images > model.frames.count + 1:
        raise UserError(
            f"config.data.budgets.images {data.budgets.images} are more than config.model.frames tells apart: make its "
            f"count {data.budgets.images - 1} at least."
        )
    if not data.aspect_ratios:
        raise UserError("config.data.aspect_ratios is empty: name one at least, such as 1.0 for squares.")
    buckets = _buckets(model, data) if model.dit else tuple((1, ratio) for ratio in data.aspect_ratios)
    return Geometry(
        vlm_pixels=data.vlm_pixels,
        vision_patch=vision.patch_size,
        merge=vision.merge_size,
        query_grid=model.queries.grid,
        target_size=target.image_size if target else 0,
        buckets=buckets,
        latent_patch=_latent_patch(model) if model.dit else 0,
        latent_capacity=max(map(math.prod, buckets)) if model.dit else 0,
    )


def without(sizes: Geometry, given: Collection[str]) -> Geometry:
    """The sizes of what still has to be looked at, where some kinds of features are given."""
    sizes = dataclasses.replace(sizes, vision_patch=0) if "conditioning" in given else sizes
    sizes = dataclasses.replace(sizes, target_size=0) if "targets" in given else sizes
    return dataclasses.replace(sizes, latent_patch=0) if "latents" in given else sizes


def of_size(model: Model, sizes: Geometry, height: int, width: int, name: str) -> Geometry:
    """The same where all that is drawn or looked back at has `height` x `width` pixels, which errors call `name`.

    Raises:
      UserError: if the size does not divide into latent patches, or has more than the table of positions.
    """
    shape = _latent_shape(model, height, width, name)
    return dataclasses.replace(sizes, buckets=(shape,), latent_capacity=math.prod(shape))


def one_bucket(config: Config) -> bool:
    """Whether all examples of a batch have to share one of several buckets, since the run encodes their images."""
    if config.data.layout == "pairs" or not config.model.dit or "latents" in config.data.features:
        return False
    return len(geometry(config.model, config.data).buckets) > 1


def _check_vision(vision: QwenVision, data: Data) -> None:
    if data.vlm_pixels is None:
        raise UserError(
            "config.data.vlm_pixels is None, but the stage has a VLM: give its images' least and most pixels."
        )
    (least, most), token = data.vlm_pixels, (vision.patch_size * vision.merge_size) ** 2
    if not token <= least <= most:
        raise UserError(f"config.data.vlm_pixels {data.vlm_pixels} must ascend, from {token}, the pixels of a token.")
    patches = data.budgets.vision_patches
    if patches % vision.merge_size**2:
        raise UserError(
            f"config.data.budgets.vision_patches {patches} must be a multiple of {vision.merge_size**2}, the patches "
            "of a merged token."
        )


def _buckets(model: Model, data: Data) -> tuple[tuple[int, int], ...]:
    """Of each aspect ratio, rows and columns of latent patches, no more than a square of `data.image_size` has."""
    taken, made = model.dit.latent_channels, model.autoencoder.latent_channels
    if taken != made:
        raise UserError(
            f"config.model.dit.latent_channels is {taken}, but the latents of config.model.autoencoder "
            f"have {made} channels: make it {made}."
        )
    size, patch = data.image_size, _latent_patch(model)
    side, _ = _latent_shape(model, size, size, f"config.data.image_size {size}")
    buckets = {_nearest_shape(ratio, side**2): ratio for ratio in data.aspect_ratios}
    for (rows, cols), ratio in buckets.items():
        name = f"config.data.aspect_ratios {ratio:g} at image_size {size}"
        _latent_shape(model, rows * patch, cols * patch, name)
    return tuple(buckets)


def _nearest_shape(ratio: float, area: int) -> tuple[int, int]:
    """The rows and columns of no more than `area` that the largest rectangle of an aspect ratio fits into."""
    shapes = ((rows, min(area // rows, math.ceil(rows * ratio))) for rows in range(1, area + 1))
    return max(shapes, key=lambda shape: min(shape[0], shape[1] / ratio))


def _latent_patch(model: Model) -> int:
    """Pixels along a side of a latent patch."""
    return model.dit.patch_size * model.autoencoder.downsampling


def _latent_shape(model: Model, height: int | None, width: int | None, name: str) -> tuple[int, int]:
    """Rows and columns of latent patches of an image."""
    patch, grid = _latent_patch(model), model.dit.position_grid
    if not (height and width) or height % patch or width % patch:
        raise UserError(f"{name} must be a multiple of {patch}, for latent patches.")
    rows, cols = height // patch, width // patch
    if "sincos" in model.dit.position and max(rows, cols) > grid:
        raise UserError(
            f"{name} makes {max(rows, cols)} latent patches a side, but the table of positions has "
            f"config.model.dit.position_grid {grid}."
        )
    return rows, cols


# --- One example ------------------------------------------------------------------------------------------------------


class Lengths(NamedTuple):
    """What an item takes of each budget, in the order of `Budgets`."""

    vlm_tokens: int
    vision_patches: int
    context_tokens: int
    latent_tokens: int
    images: int


@dataclasses.dataclass
class Item:
    """An example as tokens. Lists run over its VLM tokens, `frames` over its images, `grids` over grids of tokens."""

    id: str
    ids: list[int] = dataclasses.field(default_factory=list)
    kinds: list[int] = dataclasses.field(default_factory=list)
    frame_of: list[int] = dataclasses.field(default_factory=list)
    source: list[int] = dataclasses.field(default_factory=list)
    learned: list[bool] = dataclasses.field(default_factory=list)
    frames: list["Frame"] = dataclasses.field(default_factory=list)
    grids: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    merged: int = 0  # merged patches so far

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """`[L, 3]`: time, row, column."""
        return mrope_positions(np.array(self.kinds) != TEXT, self.grids)


@dataclasses.dataclass
class Frame:
    """An image of an item. `clean`: a later frame looks back at it; `text`, `queries`: VLM positions.

    The VLM sees it at height and width `size`, or, if that is None, does not. It is cropped to `shape` first: the
    bucket of its item, None where that generates nothing.
    """

    encoded: bytes
    generate: bool
    shape: Shape | None
    size: tuple[int, int] | None = None
    clean: bool = False
    text: list[int] = dataclasses.field(default_factory=list)
    queries: list[int] = dataclasses.field(default_factory=list)


class Picture(NamedTuple):
    """An image as the parts take it, uint8 `[height, width, 3]`, None for a part that does not; and its features."""

    vlm: np.ndarray | None = None
    target: np.ndarray | None = None
    pixels: np.ndarray | None = None
    features: Features = Features()


class ChatFormat:
    """Qwen2.5-VL's chat format: what the tokenizer calls its special tokens, and how turns open and close.

    Raises:
      UserError: if the tokenizer lacks a special token, or has another chat template.
    """

    def __init__(self, tokenizer) -> None:
        self.encode = Encoder(tokenizer)
        self.vision_start, self.vision_end, self.image_pad, self.turn_end, end_of_text = (
            self._special(name)
            for name in ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|im_end|>", "<|endoftext|>")
        )
        self.ends = (self.turn_end, end_of_text)
        self.preamble = self.encode(_preamble(tokenizer))
        self.open = {speaker: self.encode(f"<|im_start|>{speaker}\n") for speaker in ("user", "assistant")}
        self.close = self.encode("<|im_end|>\n")

    def question(self, segments: list[Text | Image], image_tokens: Sequence[int]) -> list[int]:
        """Tokens of a conversation up to where the assistant's answer begins; each image takes its `image_tokens`."""
        ids, speaker, counts = list(self.preamble), None, iter(image_tokens)
        for segment in segments:
            now = segment.get("speaker", "user")
            if now != speaker:
                ids += self.open[now] if speaker is None else self.close + self.open[now]
                speaker = now
            if segment["type"] == "text":
                ids += self.encode(segment["text"])
            else:
                ids += [self.vision_start, *[self.image_pad] * next(counts), self.vision_end]
        return ids + self.close + self.open["assistant"]

    def _special(self, name: str) -> int:
        ids = self.encode(name)
        if len(ids) != 1:
            raise UserError(f"the tokenizer has no special token {name}: use one of Qwen2.5-VL, or train one here.")
        return ids[0]


def _preamble(tokenizer) -> str:
    """What the tokenizer's own chat template puts before the first turn: the system prompt of a published model."""
    if tokenizer.chat_template is None:
        return ""
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    before, turn, after = rendered.partition("<|im_start|>user\n?<|im_end|>\n")
    if not turn or after:
        raise UserError(f"the tokenizer's chat template gives {rendered!r}, not Qwen's turns: use Qwen2.5-VL's.")
    return before


def make_item(
    example: Example, chat: ChatFormat, sizes: Geometry, user_text: bool = False, text_limit: int | None = None
) -> Item:
    """Turns an example into tokens, reading no more of its images than their sizes.

    A generated image stands as N query tokens in the assistant's turn; where something follows, the image itself comes
    next. The VLM sees images in their own shape, but in an example that generates some, all are cropped to the bucket
    of the first of those. Of each text the first `text_limit` tokens are taken; one that is cut has no learned end.

    Raises:
      BadExample: if an image cannot be read, or is too long for its width.
    """
    item, segments = Item(example["id"]), example["segments"]
    drawn = [segment["image"] for segment in segments if segment["type"] == "image" and segment["generate"]]
    shape = bucket(drawn[0], sizes) if drawn else None
    last = len(segments) - 1
    speakers = [segment.get("speaker") or ("assistant" if segment["generate"] else "user") for segment in segments]
    speaker, pending = None, []
    for number, (now, segment) in enumerate(zip(speakers, segments)):
        if now != speaker:
            closed = bool(item.learned) and item.learned[-1]  # the turn end stands there already, learned
            _add_text(item, (chat.preamble if speaker is None else chat.close[closed:]) + chat.open[now])
            speaker = now
        if segment["type"] == "text":
            learned = user_text or now == "assistant"
            ids = chat.encode(segment["text"])
            pending += _add_text(item, ids[:text_limit], learned)
            whole = text_limit is None or len(ids) <= text_limit
            if learned and whole and (number == last or speakers[number + 1] != "assistant"):
                _add_text(item, [chat.turn_end], True)
            continue
        frame = Frame(segment["image"], segment["generate"], shape)
        item.frames.append(frame)
        if frame.generate:
            frame.text, pending = pending, []
            frame.queries = _add_grid(item, chat, QUERY, sizes.query_grid, sizes.query_grid)
        if not frame.generate or number != last:
            frame.size = _vlm_size(frame, sizes)
            rows, cols = (side // sizes.merged_patch for side in frame.size)
            _add_grid(item, chat, IMAGE, rows, cols, first=item.merged)
            item.merged += rows * cols
    generated = [number for number, frame in enumerate(item.frames) if frame.generate]
    for number, frame in enumerate(item.frames):
        frame.clean = bool(generated) and number < generated[-1]
    return item


def bucket(encoded: bytes, sizes: Geometry) -> Shape:
    """Which of the buckets has the aspect ratio nearest to that of an image; if there is one only, nothing is read."""
    if len(sizes.buckets) == 1:
        return sizes.buckets[0]
    height, width = image_lib.read_size(encoded)
    return min(sizes.buckets, key=lambda shape: abs(math.log(shape[1] * height / (shape[0] * width))))


def _add_text(item: Item, ids: list[int], learned: bool = False) -> list[int]:
    """Appends text tokens and returns where they stand."""
    return _add(item, ids, TEXT, len(item.frames), [0] * len(ids), learned)


def _vlm_size(frame: Frame, sizes: Geometry) -> tuple[int, int]:
    height, width = image_lib.read_size(frame.encoded)
    if frame.shape:
        height, width = image_lib.crop_size(height, width, frame.shape)
    return image_lib.smart_resize(height, width, sizes.merged_patch, *sizes.vlm_pixels)


def _add_grid(item: Item, chat: ChatFormat, kind: int, rows: int, cols: int, first: int = 0) -> list[int]:
    """Appends a grid of IMAGE or QUERY tokens between the vision marks, and returns where they stand."""
    count = rows * cols
    _add_text(item, [chat.vision_start])
    places = _add(item, [chat.image_pad] * count, kind, len(item.frames) - 1, list(range(first, first + count)), False)
    item.grids.append((rows, cols))
    _add_text(item, [chat.vision_end])
    return places


def _add(item: Item, ids: list[int], kind: int, frame: int, source: list[int], learned: bool) -> list[int]:
    start, count = len(item.ids), len(ids)
    item.ids += ids
    item.kinds += [kind] * count
    item.frame_of += [frame] * count
    item.source += source
    item.learned += [learned] * count
    return list(range(start, start + count))


def picture(frame: Frame, sizes: Geometry) -> Picture:
    """Decodes an image for the parts that take it.

    Raises:
      BadExample: if it does not decode.
    """
    seen = bool(frame.size and sizes.vision_patch)
    targeted = bool(frame.generate and sizes.target_size)
    drawn = bool((frame.generate or frame.clean) and sizes.latent_patch)
    if not (seen or targeted or drawn):
        return Picture()
    image = image_lib.open_rgb(frame.encoded)
    box = image_lib.middle(image, frame.shape) if frame.shape else (0, 0, *image.size)
    return Picture(
        vlm=image_lib.resize(image.crop(box) if frame.shape else image, *frame.size) if seen else None,
        target=image_lib.scale(image, sizes.target_size, sizes.target_size, box) if targeted else None,
        pixels=image_lib.scale(image, *sizes.drawn(frame.shape), box) if drawn else None,
    )


def lengths(item: Item, sizes: Geometry) -> Lengths:
    """What an item takes of each budget."""
    drawn = bool(sizes.latent_capacity)
    copies = [math.prod(frame.shape) for frame in item.frames for _ in range(frame.clean + frame.generate)]
    return Lengths(
        vlm_tokens=len(item.ids),
        vision_patches=item.merged * sizes.merge**2,
        context_tokens=sum(len(frame.text) + len(frame.queries) for frame in item.frames) if drawn else 0,
        latent_tokens=sum(copies) if drawn else 0,
        images=len(item.frames),
    )


def exceeded(taken: Lengths, budgets: Budgets) -> str | None:
    """Says which budget an item alone exceeds, if any."""
    for name, count in taken._asdict().items():
        if count > getattr(budgets, name):
            return f"more {name.replace('_', ' ')} than config.data.budgets.{name} {getattr(budgets, name)}"
    return None


# --- Rows -------------------------------------------------------------------------------------------------------------


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
    rows: list[list[tuple[Item, list[Picture]]]],
    first: int,
    budgets: Budgets,
    sizes: Geometry,
    features: Features | None = None,
) -> Interleaved:
    """Writes rows of (item, its images) into arrays; `first` is the global position of the first row.

    What the images bring of `features` is written into those, zeros before. Where there are pixels for the autoencoder,
    all are of the first bucket of `sizes`.
    """
    batch = empty(len(rows), budgets, sizes)._replace(features=features or Features())
    for b, row in enumerate(rows):
        cursor = _Cursor()
        for document, (item, pictures) in enumerate(row):
            _write_item(batch, b, document, item, pictures, cursor, sizes)
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
    ids, kinds, learned = np.array(item.ids), np.array(item.kinds), np.flatnonzero(item.learned)
    frames = np.minimum(item.frame_of, max(len(item.frames) - 1, 0)) + first_slot
    _write_meta(tokens.meta, b, span, document, frames, kinds)
    tokens.ids[b, span] = ids
    tokens.positions[b, span] = item.positions
    tokens.source[b, span] = item.source
    if at.patch:
        tokens.source[b, span][kinds == IMAGE] += at.patch // sizes.merge**2
    tokens.targets[b, start + learned - 1] = ids[learned]
    at.token = span.stop

    for number, (frame, picture) in enumerate(zip(item.frames, pictures)):
        batch.images.number[b, at.slot] = number
        if picture.pixels is not None:
            batch.images.pixels[b, at.slot] = picture.pixels
        if picture.target is not None:
            batch.images.targets[b, at.slot] = picture.target
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


def _write_meta(meta: TokenMeta, b: int, span: slice, document: int, frame, kind, row=0, col=0) -> None:
    for field, value in zip(
        (meta.document, meta.frame, meta.kind, meta.row, meta.col), (document, frame, kind, row, col)
    ):
        field[b, span] = value


def empty(rows: int, budgets: Budgets, sizes: Geometry) -> Interleaved:
    """A batch of nothing but padding; its pixels are of the first bucket."""

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((rows, *shape), np.int32)

    def meta(length: int) -> TokenMeta:
        index = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy()
        return TokenMeta(zeros(length), zeros(length), zeros(length) + PAD, zeros(length), zeros(length), index)

    images, length, patches = budgets.images, budgets.vlm_tokens, bool(sizes.vision_patch) * budgets.vision_patches

    def pixels(height: int, width: int) -> np.ndarray:
        return np.zeros((rows, images, height, width, 3), np.uint8)

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
        return empty(rows, config.data.budgets, geometry(config.model, config.data))
    target = config.model.vision_target
    return assemble_pairs([None] * rows, 0, target.vision.image_size, target.text.max_length)


# --- Pairs ------------------------------------------------------------------------------------------------------------


def make_pair(example: Example, encode: Callable[[str], list[int]], max_length: int) -> tuple[bytes, list[int]]:
    """Returns the first image of an example and its first text as tokens, cut to `max_length`.

    Raises:
      BadExample: if it lacks either.
    """
    images = [segment["image"] for segment in example["segments"] if segment["type"] == "image"]
    texts = [segment["text"] for segment in example["segments"] if segment["type"] == "text"]
    if not images or not texts:
        raise BadExample("no image-text pair")
    return images[0], encode(texts[0])[:max_length]


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
