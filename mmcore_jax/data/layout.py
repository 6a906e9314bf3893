"""Rows of static shape: several examples packed under budgets, with per-token metadata for attention and positions.

An example becomes an `Item`: its VLM tokens in the chat format of Qwen2.5-VL, and what each diffusion token is made
from. `plan` packs items into rows, `assemble` writes rows into arrays. B rows, L VLM tokens, S vision patches, I images
of a row, N query tokens, C context tokens, T latent tokens.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from mmcore_jax.config import Budgets, Config, Data, Model, UserError
from mmcore_jax.data import image as image_lib
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.nn import patches as patches_lib
from mmcore_jax.nn import rotary
from mmcore_jax.nn.masks import CLEAN, IMAGE, NOISED, PAD, QUERY, TEXT, VISUAL, TokenMeta

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
    """The images of a row by frame slot; `generated` marks those to predict, `queries` is where their queries stand."""

    pixels: np.ndarray  # uint8 [B, I, size, size, 3]
    generated: np.ndarray  # bool [B, I]
    queries: np.ndarray  # [B, I, N], position in the VLM's sequence


class Diffusion(NamedTuple):
    """The diffusion transformer's sequence, and the gather table of where each token comes from.

    `context_source`: VLM position of a TEXT token; slot * N + query of a VISUAL one.
    `latent_source`: slot * patches + patch.
    """

    context_meta: TokenMeta  # [B, C]
    context_source: np.ndarray  # [B, C]
    latent_meta: TokenMeta  # [B, T]
    latent_source: np.ndarray  # [B, T]


class Interleaved(NamedTuple):
    """A batch of packed rows. `row` is the position in the global batch, which random numbers are drawn by."""

    row: np.ndarray  # [B]
    tokens: Tokens
    patches: Patches
    images: Images
    diffusion: Diffusion


class Pairs(NamedTuple):
    """A batch of one image and one right-padded text each, for contrastive training."""

    row: np.ndarray  # [B]
    pixels: np.ndarray  # uint8 [B, size, size, 3]
    ids: np.ndarray  # [B, L]
    valid: np.ndarray  # bool [B, L]


# --- Geometry ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes that turn an example into tokens. Sides count patches; 0 where a stage has no such part."""

    image_size: int
    vision_patch: int
    merge: int
    query_grid: int
    latent_side: int

    @property
    def vision_side(self) -> int:
        return self.image_size // self.vision_patch

    @property
    def merged_side(self) -> int:
        return self.vision_side // self.merge


def geometry(model: Model, data: Data) -> Geometry:
    """Derives the sizes from the parts of a model.

    Raises:
      UserError: if the image size or the budget of vision patches does not fit the patches of a part.
    """
    vision, side = model.vlm.vision, data.image_size
    wanted = {"vision patches": vision.patch_size * vision.merge_size}
    if model.vision_target:
        wanted["the vision target's patches"] = model.vision_target.vision.patch_size * model.queries.grid
    if model.dit:
        wanted["latent patches"] = model.dit.patch_size
    for name, multiple in wanted.items():
        if side % multiple:
            raise UserError(f"config.data.image_size {side} must be a multiple of {multiple}, for {name}.")
    if data.budgets.vision_patches % vision.merge_size**2:
        raise UserError(
            f"config.data.budgets.vision_patches {data.budgets.vision_patches} must be a multiple of "
            f"{vision.merge_size**2}, the patches of a merged token."
        )
    return Geometry(
        image_size=side,
        vision_patch=vision.patch_size,
        merge=vision.merge_size,
        query_grid=model.queries.grid,
        latent_side=side // model.dit.patch_size if model.dit else 0,
    )


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
    """An example as tokens. Lists run over its VLM tokens, `frames` over its images, `grids` over squares of tokens."""

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
        return rotary.mrope_positions(np.array(self.kinds) != TEXT, self.grids)


@dataclasses.dataclass
class Frame:
    """An image of an item. `clean`: a later frame looks back at it; `text`, `queries`: VLM positions."""

    encoded: bytes
    generate: bool
    clean: bool = False
    seen: bool = False  # the VLM sees it
    text: list[int] = dataclasses.field(default_factory=list)
    queries: list[int] = dataclasses.field(default_factory=list)


class ChatFormat:
    """Qwen2.5-VL's chat format: what the tokenizer calls its special tokens, and how turns open and close."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vision_start, self.vision_end, self.image_pad = tokenizer.convert_tokens_to_ids(
            ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
        )
        self.turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.open = {speaker: self.encode(f"<|im_start|>{speaker}\n") for speaker in ("user", "assistant")}
        self.close = self.encode("<|im_end|>\n")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def make_item(example: Example, chat: ChatFormat, sizes: Geometry, user_text: bool = False) -> Item:
    """Turns an example into tokens, without decoding its images.

    A generated image stands as N query tokens in the assistant's turn; where something follows, the image itself comes
    next.
    """
    item, segments = Item(example["id"]), example["segments"]
    last = len(segments) - 1
    speakers = [segment.get("speaker") or ("assistant" if segment["generate"] else "user") for segment in segments]
    speaker, pending = None, []
    for number, (now, segment) in enumerate(zip(speakers, segments)):
        if now != speaker:
            closed = bool(item.learned) and item.learned[-1]  # the turn end stands there already, learned
            _add_text(item, ([] if speaker is None else chat.close[closed:]) + chat.open[now])
            speaker = now
        if segment["type"] == "text":
            learned = user_text or now == "assistant"
            pending += _add_text(item, chat.encode(segment["text"]), learned)
            if learned and (number == last or speakers[number + 1] != "assistant"):
                _add_text(item, [chat.turn_end], True)
            continue
        frame = Frame(segment["image"], segment["generate"], seen=not segment["generate"] or number != last)
        item.frames.append(frame)
        if frame.generate:
            frame.text, pending = pending, []
            frame.queries = _add_grid(item, chat, QUERY, sizes.query_grid, range(sizes.query_grid**2))
        if frame.seen:
            _add_grid(item, chat, IMAGE, sizes.merged_side, range(item.merged, item.merged + sizes.merged_side**2))
            item.merged += sizes.merged_side**2
    generated = [number for number, frame in enumerate(item.frames) if frame.generate]
    for number, frame in enumerate(item.frames):
        frame.clean = bool(generated) and number < generated[-1]
    return item


def _add_text(item: Item, ids: list[int], learned: bool = False) -> list[int]:
    """Appends text tokens and returns where they stand."""
    start = len(item.ids)
    for token in ids:
        item.ids.append(token)
        item.kinds.append(TEXT)
        item.frame_of.append(len(item.frames))
        item.source.append(0)
        item.learned.append(learned)
    return list(range(start, len(item.ids)))


def _add_grid(item: Item, chat: ChatFormat, kind: int, side: int, source: range) -> list[int]:
    """Appends a square of IMAGE or QUERY tokens between the vision marks, and returns where they stand."""
    _add_text(item, [chat.vision_start])
    start = len(item.ids)
    for index in source:
        item.ids.append(chat.image_pad)
        item.kinds.append(kind)
        item.frame_of.append(len(item.frames) - 1)
        item.source.append(index)
        item.learned.append(False)
    item.grids.append((side, side))
    _add_text(item, [chat.vision_end])
    return list(range(start, start + side * side))


def lengths(item: Item, sizes: Geometry) -> Lengths:
    """What an item takes of each budget."""
    copies = sum(frame.clean + frame.generate for frame in item.frames)
    return Lengths(
        vlm_tokens=len(item.ids),
        vision_patches=item.merged * sizes.merge**2,
        context_tokens=sum(len(frame.text) + len(frame.queries) for frame in item.frames) if sizes.latent_side else 0,
        latent_tokens=copies * sizes.latent_side**2,
        images=len(item.frames),
    )


def exceeded(taken: Lengths, budgets: Budgets) -> str | None:
    """Says which budget an item alone exceeds, if any."""
    for name, count in taken._asdict().items():
        if count > getattr(budgets, name):
            return f"{count} {name.replace('_', ' ')} exceed config.data.budgets.{name} {getattr(budgets, name)}"
    return None


# --- Rows -------------------------------------------------------------------------------------------------------------


def plan(taken: list[Lengths], budgets: Budgets, rng: np.random.Generator) -> list[list[int]]:
    """Packs items into rows: largest first, each into the fullest row that still has room. Returns shuffled rows."""
    limits = np.array(dataclasses.astuple(budgets))
    sizes = np.array(taken).reshape(-1, len(limits))
    load = (sizes / np.maximum(limits, 1)).max(axis=1)
    rows: list[list[int]] = []
    used = np.zeros((0, len(limits)), np.int64)
    for number in np.argsort(-load, kind="stable"):
        fits = np.flatnonzero((used + sizes[number] <= limits).all(axis=1))
        if fits.size:
            best = fits[np.argmax((used[fits] / np.maximum(limits, 1)).max(axis=1))]
            rows[best].append(int(number))
            used[best] += sizes[number]
        else:
            rows.append([int(number)])
            used = np.concatenate([used, sizes[number][None]])
    return [rows[i] for i in rng.permutation(len(rows))]


def assemble(
    rows: list[list[tuple[Item, list[np.ndarray]]]], first: int, budgets: Budgets, sizes: Geometry
) -> Interleaved:
    """Writes rows of (item, decoded images) into arrays; `first` is the global position of the first row."""
    batch = empty(len(rows), budgets, sizes)
    for b, row in enumerate(rows):
        cursor = _Cursor()
        for document, (item, pixels) in enumerate(row):
            _write_item(batch, b, document, item, pixels, cursor, sizes)
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
    batch: Interleaved, b: int, document: int, item: Item, pixels: list[np.ndarray], at: _Cursor, sizes: Geometry
) -> None:
    start, first_slot = at.token, at.slot
    span = slice(start, start + len(item.ids))
    tokens = batch.tokens
    tokens.ids[b, span] = item.ids
    kinds = np.array(item.kinds)
    _write_meta(
        tokens.meta, b, span, document, np.minimum(item.frame_of, max(len(item.frames) - 1, 0)) + first_slot, kinds
    )
    tokens.positions[b, span] = item.positions
    tokens.source[b, span] = np.array(item.source) + np.where(kinds == IMAGE, at.patch // sizes.merge**2, 0)
    learned = np.flatnonzero(item.learned)
    tokens.targets[b, start + learned - 1] = np.array(item.ids)[learned]
    at.token = span.stop

    for frame, picture in zip(item.frames, pixels):
        batch.images.pixels[b, at.slot] = picture
        if frame.seen:
            _write_patches(batch.patches, b, document, picture, at, sizes)
        if frame.generate:
            batch.images.generated[b, at.slot] = True
            batch.images.queries[b, at.slot] = start + np.array(frame.queries)
        if sizes.latent_side:
            _write_frame(batch.diffusion, b, document, frame, start, at, sizes)
        at.slot += 1


def _write_patches(patches: Patches, b: int, document: int, picture: np.ndarray, at: _Cursor, sizes: Geometry) -> None:
    rows, cols = patches_lib.merge_order(sizes.vision_side, sizes.vision_side, sizes.merge)
    span = slice(at.patch, at.patch + rows.size)
    patches.values[b, span] = image_lib.patches(picture, sizes.vision_patch, sizes.merge)
    _write_meta(patches.meta, b, span, document, at.slot, IMAGE, rows, cols)
    at.patch = span.stop


def _write_frame(out: Diffusion, b: int, document: int, frame: Frame, start: int, at: _Cursor, sizes: Geometry) -> None:
    side, grid = sizes.latent_side, sizes.query_grid
    centre = (side + 1) // 2
    if frame.generate:
        span = slice(at.context, at.context + len(frame.text))
        _write_meta(out.context_meta, b, span, document, at.slot, TEXT)
        out.context_source[b, span] = start + np.array(frame.text, np.int32)
        query = np.arange(grid * grid)
        span = slice(span.stop, span.stop + query.size)
        rows, cols = ((2 * index + 1) * side // (2 * grid) - centre for index in (query // grid, query % grid))
        _write_meta(out.context_meta, b, span, document, at.slot, VISUAL, rows, cols)
        out.context_source[b, span] = at.slot * query.size + query
        at.context = span.stop
    patch = np.arange(side * side)
    for kind in [CLEAN] * frame.clean + [NOISED] * frame.generate:
        span = slice(at.latent, at.latent + patch.size)
        _write_meta(out.latent_meta, b, span, document, at.slot, kind, patch // side - centre, patch % side - centre)
        out.latent_source[b, span] = at.slot * patch.size + patch
        at.latent = span.stop


def _write_meta(meta: TokenMeta, b: int, span: slice, document: int, frame, kind, row=0, col=0) -> None:
    for field, value in zip(
        (meta.document, meta.frame, meta.kind, meta.row, meta.col), (document, frame, kind, row, col)
    ):
        field[b, span] = value


def empty(rows: int, budgets: Budgets, sizes: Geometry) -> Interleaved:
    """A batch of nothing but padding."""

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((rows, *shape), np.int32)

    def meta(length: int) -> TokenMeta:
        index = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy()
        return TokenMeta(zeros(length), zeros(length), zeros(length) + PAD, zeros(length), zeros(length), index)

    size, images, length = sizes.image_size, budgets.images, budgets.vlm_tokens
    return Interleaved(
        row=zeros(),
        tokens=Tokens(zeros(length), meta(length), zeros(length, 3), zeros(length), zeros(length) - 1),
        patches=Patches(
            np.zeros((rows, budgets.vision_patches, sizes.vision_patch**2 * 3), np.uint8), meta(budgets.vision_patches)
        ),
        images=Images(
            np.zeros((rows, images, size, size, 3), np.uint8),
            np.zeros((rows, images), bool),
            zeros(images, sizes.query_grid**2),
        ),
        diffusion=Diffusion(
            meta(budgets.context_tokens),
            zeros(budgets.context_tokens),
            meta(budgets.latent_tokens),
            zeros(budgets.latent_tokens),
        ),
    )


def placeholder(config: Config) -> Interleaved | Pairs:
    """A batch of one empty row in the shapes of a run, to derive parameters from."""
    if config.data.layout == "interleaved":
        return empty(1, config.data.budgets, geometry(config.model, config.data))
    blank = np.zeros((config.data.image_size, config.data.image_size, 3), np.uint8)
    return assemble_pairs([(blank, [0])], 0, config.model.vision_target.text.max_length)


# --- Pairs ------------------------------------------------------------------------------------------------------------


def make_pair(example: Example, tokenizer, max_length: int) -> tuple[bytes, list[int]]:
    """Returns the first image of an example and its first text as tokens, cut to `max_length`.

    Raises:
      BadExample: if it lacks either.
    """
    images = [segment["image"] for segment in example["segments"] if segment["type"] == "image"]
    texts = [segment["text"] for segment in example["segments"] if segment["type"] == "text"]
    if not images or not texts:
        raise BadExample("no image-text pair")
    return images[0], tokenizer.encode(texts[0], add_special_tokens=False)[:max_length]


def assemble_pairs(pairs: list[tuple[np.ndarray, list[int]]], first: int, max_length: int) -> Pairs:
    """Writes (decoded image, token ids) into arrays."""
    ids = np.zeros((len(pairs), max_length), np.int32)
    valid = np.zeros((len(pairs), max_length), bool)
    for b, (_, tokens) in enumerate(pairs):
        ids[b, : len(tokens)] = tokens
        valid[b, : len(tokens)] = True
    row = np.arange(first, first + len(pairs), dtype=np.int32)
    return Pairs(row, np.stack([pixels for pixels, _ in pairs]), ids, valid)
