"""Small rows that `data/layout.py` packs from hand-written examples, with a tokenizer of one token per character."""

import io
import types

import numpy as np
from PIL import Image

from mmcore_jax.config import Budgets
from mmcore_jax.data import example, layout, packing
from mmcore_jax.data.geometry import Geometry

SIDE = 8
SIZES = Geometry(
    vlm_pixels=(64, 64),
    vision_patch=2,
    merge=2,
    query_grid=2,
    target_size=SIDE,
    buckets=((2, 2),),
    latent_patch=4,
    latent_capacity=4,
)
BUDGETS = Budgets(vlm_tokens=107, vision_patches=52, context_tokens=21, latent_tokens=22, images=6)
SPECIAL = {
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|vision_start|>": 3,
    "<|vision_end|>": 4,
    "<|image_pad|>": 5,
    "<|endoftext|>": 6,
}


class Characters:
    """A tokenizer of one token per character; the special tokens are 1 to 6."""

    chat_template = None

    @property
    def backend_tokenizer(self):
        return self

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        for token, number in SPECIAL.items():
            text = text.replace(token, chr(number))
        return types.SimpleNamespace(ids=[ord(character) for character in text])

    def decode(self, ids):
        return "".join(chr(number) for number in ids)


CHARACTERS = Characters()
CHAT = layout.ChatFormat(CHARACTERS)


def picture(seed: int, size: int = SIDE) -> np.ndarray:
    """A random image, uint8 `[size, size, 3]`."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def png(seed: int, size: int = SIDE) -> bytes:
    """The same, encoded."""
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, size)).save(buffer, "PNG")
    return buffer.getvalue()


def document(name: str, *segments) -> example.Example:
    """An example from user texts, `("assistant", text)` and integers: the seed of an image, negative if generated."""
    made = []
    for segment in segments:
        if isinstance(segment, int):
            made.append(example.image(png(abs(segment)), generate=segment < 0))
        elif isinstance(segment, tuple):
            made.append(example.text(segment[1], segment[0]))
        else:
            made.append(example.text(segment))
    return example.validate({"id": name, "task": "test", "segments": made})


# Two documents: an input image, two generated ones and a last word; then a plain text-to-image pair.
INTERLEAVED = document("interleaved", 1, "ab", -2, "c", -3, ("assistant", "ok"))
DRAWING = document("drawing", "def", -4)


def pack(*examples: example.Example, budgets: Budgets = BUDGETS, sizes: Geometry = SIZES) -> layout.Interleaved:
    """One row that holds the examples."""
    row = []
    for one in examples:
        item = layout.make_item(one, CHAT, sizes)
        row.append((item, [layout.picture(frame, sizes) for frame in item.frames]))
    return packing.assemble([row], 0, budgets, sizes)
