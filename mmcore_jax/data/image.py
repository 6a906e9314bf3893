"""Encoded images to the square uint8 arrays that the models take, and patches in the VLM's merge order."""

import io

import numpy as np
from PIL import Image

from mmcore_jax.data.example import BadExample
from mmcore_jax.nn.patches import merge_order

MAXIMUM_PIXELS = 64_000_000


def decode(encoded: bytes, size: int) -> np.ndarray:
    """Decodes to uint8 `[size, size, 3]`: transparency over white, resized by area or bicubically, centre-cropped.

    Raises:
      BadExample: if the bytes are no image, or one of more than `MAXIMUM_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        if image.width * image.height > MAXIMUM_PIXELS:
            raise BadExample("image has too many pixels")
        image.load()
    except BadExample:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise BadExample(f"image does not decode ({type(error).__name__})") from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BOX if side % size == 0 else Image.Resampling.BICUBIC)
    return np.asarray(image)


def patches(image: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """uint8 `[size, size, 3]` to `[patches, patch * patch * 3]` in merge order; values go by (row, column, channel)."""
    side = image.shape[0] // patch
    rows, cols = merge_order(side, side, merge)
    tiles = image.reshape(side, patch, side, patch, 3).transpose(0, 2, 1, 3, 4).reshape(side * side, -1)
    return tiles[rows * side + cols]
