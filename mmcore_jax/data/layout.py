"""An example as tokens and images, and the arrays that rows of them become.

An example becomes an `Item`: its VLM tokens in the chat format of Qwen2.5-VL, and what each diffusion token is made
from. `packing` writes several of them into a row. B rows, L VLM tokens, S vision patches, I images of a row, N query
tokens, C context tokens, T latent tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mmcore_jax.config import Budgets, UserError
from mmcore_jax.data import image as image_lib
from mmcore_jax.data.example import BadExample, Example, Image, Text
from mmcore_jax.data.geometry import Geometry, Shape
from mmcore_jax.data.text import Encoder
from mmcore_jax.nn.tokens import IMAGE, QUERY, TEXT, TokenMeta, mrope_positions

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


# --- One example ------------------------------------------------------------------------------------------------------


class Lengths(NamedTuple):
    """What an item takes of each budget, in the order of `Budgets`."""

    vlm_tokens: int
    vision_patches: int
    context_tokens: int
    latent_tokens: int
    images: int


@dataclasses.dataclass(eq=False)
class Item:
    """An example as tokens. Arrays `[L]` run over its VLM tokens, `frames` over its images, `grids` over grids of them.

    `source` is that of `Tokens`, within the item; `frame_of` the next image of a text, which may not come.
    """

    id: str
    ids: np.ndarray
    kinds: np.ndarray
    frame_of: np.ndarray
    source: np.ndarray
    learned: np.ndarray  # bool
    frames: list["Frame"]
    grids: list[tuple[int, int]]
    merged: int  # merged patches of its images

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """`[L, 3]`: time, row, column."""
        return mrope_positions(self.kinds != TEXT, self.grids)


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
    text: Sequence[int] = ()
    queries: Sequence[int] = ()


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
    of the first of those. Of each text the first `text_limit` tokens are taken. What the assistant says has a learned
    end, unless it is cut; with `user_text` the user's words are learned, too, which changes no token.

    Raises:
      BadExample: if an image cannot be read, or is too long for its width.
    """
    segments, tokens, frames = example["segments"], _Tokens(), []
    drawn = [segment["image"] for segment in segments if segment["type"] == "image" and segment["generate"]]
    shape = bucket(drawn[0], sizes) if drawn else None
    last, merged = len(segments) - 1, 0
    speakers = [segment.get("speaker") or ("assistant" if segment["generate"] else "user") for segment in segments]
    speaker, pending = None, []
    for number, (now, segment) in enumerate(zip(speakers, segments)):
        if now != speaker:
            ended = bool(tokens.ids) and tokens.ids[-1] == chat.turn_end
            between = chat.preamble if speaker is None else chat.close[ended:]
            tokens.add(between + chat.open[now], TEXT, len(frames))
            speaker = now
        if segment["type"] == "text":
            ids = chat.encode(segment["text"])
            pending += tokens.add(ids[:text_limit], TEXT, len(frames), user_text or now == "assistant")
            whole = text_limit is None or len(ids) <= text_limit
            if now == "assistant" and whole and (number == last or speakers[number + 1] != now):
                tokens.add([chat.turn_end], TEXT, len(frames), True)
            continue
        frame = Frame(segment["image"], segment["generate"], shape)
        frames.append(frame)
        if frame.generate:
            frame.text, pending = pending, []
            frame.queries = tokens.add_grid(chat, QUERY, len(frames), sizes.query_grid, sizes.query_grid, 0)
        if not frame.generate or number != last:
            frame.size = _vlm_size(frame, sizes)
            rows, cols = (side // sizes.merged_patch for side in frame.size)
            tokens.add_grid(chat, IMAGE, len(frames), rows, cols, merged)
            merged += rows * cols
    generated = [number for number, frame in enumerate(frames) if frame.generate]
    for number, frame in enumerate(frames):
        frame.clean = bool(generated) and number < generated[-1]
    return Item(example["id"], *tokens.arrays(), frames, tokens.grids, merged)


class _Tokens:
    """The VLM tokens of an item in the making: their ids, and runs of tokens that are alike in all else."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.grids: list[tuple[int, int]] = []
        self._runs: list[tuple[int, int, bool, int]] = []  # kind, frame, learned, source less place
        self._lengths: list[int] = []

    def add(self, ids: list[int], kind: int, frame: int, learned: bool = False, first: int = 0) -> range:
        """Appends tokens, their sources counted from `first` unless they are text, and returns where they stand."""
        places = range(len(self.ids), len(self.ids) + len(ids))
        if ids:
            self.ids += ids
            self._runs.append((kind, frame, learned, first - places.start))
            self._lengths.append(len(ids))
        return places

    def add_grid(self, chat: ChatFormat, kind: int, images: int, rows: int, cols: int, first: int) -> range:
        """Appends a grid of tokens of the last of `images`, between the vision marks, and returns where they stand."""
        self.add([chat.vision_start], TEXT, images)
        places = self.add([chat.image_pad] * (rows * cols), kind, images - 1, first=first)
        self.add([chat.vision_end], TEXT, images)
        self.grids.append((rows, cols))
        return places

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Those of `Item`, in its order."""
        columns = np.array(self._runs, np.int32).reshape(-1, 4).T
        kinds, frame_of, learned, offset = np.repeat(columns, self._lengths, axis=1)
        source = (np.arange(len(kinds), dtype=np.int32) + offset) * (kinds != TEXT)
        return np.array(self.ids, np.int32), kinds, frame_of, source, learned.astype(bool)


def bucket(encoded: bytes, sizes: Geometry) -> Shape:
    """Which of the buckets has the aspect ratio nearest to that of an image; if there is one only, nothing is read."""
    if len(sizes.buckets) == 1:
        return sizes.buckets[0]
    height, width = image_lib.read_size(encoded)
    return min(sizes.buckets, key=lambda shape: abs(math.log(shape[1] * height / (shape[0] * width))))


def _vlm_size(frame: Frame, sizes: Geometry) -> tuple[int, int]:
    height, width = image_lib.read_size(frame.encoded)
    if frame.shape:
        height, width = image_lib.crop_size(height, width, frame.shape)
    return image_lib.smart_resize(height, width, sizes.merged_patch, *sizes.vlm_pixels)


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
