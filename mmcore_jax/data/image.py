"""Encoded images to the arrays that the models take.

Training takes uint8 images, and patches of them in the VLM's merge order, which the model normalises. `pixel_values`
is Qwen2.5-VL's published processor whole (transformers `image_processing_pil_qwen2_vl.py`); both resize alike.
"""

import contextlib
import dataclasses
import io
import json
import logging
import math
import pathlib
import re
import warnings
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import simplejpeg
from cykooz_resizer import CropBox, FilterType, ResizeAlg, ResizeOptions, Resizer
from PIL import ExifTags, Image, UnidentifiedImageError

from mmcore_jax.config import QwenVision, UserError
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.nn.tokens import IMAGE_MEAN, IMAGE_STD, TEMPORAL_PATCH, merge_order

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # the latter as transformers 5 saves it
MAXIMUM_PIXELS = 64_000_000
MAXIMUM_SIDE = 32_768
MAXIMUM_ASPECT_RATIO = 200
_LARGE = 256 * 256  # pixels
_PNG_DEPTH = 24  # the byte of a file that counts the bits of a value
Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of an image, in pixels, as Pillow has them."""
# Pillow knows dozens more, some of which run other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000")
# What libjpeg says of the pixels' data; it warns of metadata, too, whose markers are 0xe0 to 0xef and 0xfe.
_JPEG_DAMAGE = re.compile(r"Premature end|Corrupt JPEG data: (?!bad ICC|\d+ extraneous bytes before marker 0x(e|fe))")
# By the EXIF tag Orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = tuple(_UPRIGHT[number] for number in (5, 6, 7, 8))

# On odd metadata Pillow warns and logs, once per record. What it cannot decode, it raises.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def open_rgb(encoded: bytes) -> Image.Image:
    """Decodes an image, upright, with transparency over white; of an animation, its first frame.

    Raises:
      BadExample: if the bytes are no image, a damaged one, or one of more than `MAXIMUM_PIXELS` or `MAXIMUM_SIDE`.
    """
    with _damage():
        image = _open(encoded)
        turn = _turn(image)
        image = _to_rgb(_load(image, encoded))
    return image.transpose(turn) if turn is not None else image


def check(example: Example) -> None:
    """Raises `BadExample` where an image of an example does not decode, which its header alone does not tell."""
    for segment in example["segments"]:
        if segment["type"] == "image":
            open_rgb(segment["image"])


def read_size(encoded: bytes) -> tuple[int, int]:
    """Height and width of an image, upright, from its header.

    Raises:
      BadExample: as `open_rgb`, as far as the header tells.
    """
    with _damage():
        image = _open(encoded)
        turned = _turn(image) in _SIDEWAYS
    return (image.width, image.height) if turned else (image.height, image.width)


def _open(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    if image.width * image.height > MAXIMUM_PIXELS:
        raise BadExample("image has too many pixels")
    if max(image.size) > MAXIMUM_SIDE:
        raise BadExample("image is too long or too wide")
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright, by its EXIF. Pillow turns TIFF itself, and damaged EXIF leaves an image as it is."""
    if "exif" not in image.info or image.format == "TIFF":
        return None
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        return None


def _load(image: Image.Image, encoded: bytes) -> Image.Image:
    """Decodes, and refuses what Pillow alone lets pass: JPEG with parts missing, PNG with wrong checksums."""
    if image.format in ("JPEG", "MPO"):
        try:
            if image.mode != "CMYK":
                return _share(simplejpeg.decode_jpeg(encoded, "RGBX"))
            inks = 255 - simplejpeg.decode_jpeg(encoded, "CMYK")  # Adobe's, which are written inverted
            return Image.frombytes("CMYK", image.size, inks.tobytes())
        except ValueError as error:
            if _JPEG_DAMAGE.match(str(error)):
                raise BadExample("image has damaged JPEG data") from error
    if image.format == "PNG":
        _open(encoded).verify()
        if image.mode == "L" and "transparency" in image.info:  # Pillow scales values of 2 and 4 bits, but not this one
            image.info["transparency"] *= 255 // (2 ** encoded[_PNG_DEPTH] - 1)
    image.load()
    return image


def _share(pixels: np.ndarray) -> Image.Image:
    """An RGB image in the memory of uint8 `[height, width, 4]`, which is how Pillow keeps it: copying takes a while."""
    height, width, _ = pixels.shape
    return Image.fromarrow(pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 4), "RGB", (width, height))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadExample("image has values of 32 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Turns what Pillow raises on damaged files, a dozen types, into `BadExample`."""
    try:
        yield
    except BadExample:
        raise
    except UnidentifiedImageError as error:
        raise BadExample("image has no header of a known format") from error
    except Image.DecompressionBombError as error:
        raise BadExample("image has too many pixels") from error
    except Exception as error:
        raise BadExample(f"image does not decode ({type(error).__name__})") from error


def decode(encoded: bytes, height: int, width: int | None = None) -> np.ndarray:
    """Decodes to uint8 `[height, width, 3]`, a square without `width`: transparency over white, the middle, scaled.

    Raises:
      BadExample: if the bytes are no image, or one of more than `MAXIMUM_PIXELS`.
    """
    width = width or height
    image = open_rgb(encoded)
    return scale(image, height, width, middle(image, (height, width)))


def scale(image: Image.Image, height: int, width: int, box: Box | None = None) -> np.ndarray:
    """Resizes the part `box` to uint8 `[height, width, 3]`, by area where it has multiples of both, else bicubically.

    Large parts are resized in SIMD, several times faster than by Pillow. Values differ by rounding, and at the edges of
    a part by what lies beyond, as in Pillow's `ImageOps.fit`.
    """
    box = box or (0, 0, *image.size)
    left, top, columns, rows = box[0], box[1], box[2] - box[0], box[3] - box[1]
    by_area = not (columns % width or rows % height)
    if columns * rows < _LARGE:
        part = image.crop(box)
        return np.asarray(part.reduce((columns // width, rows // height))) if by_area else resize(part, height, width)
    kernel = ResizeAlg.convolution(FilterType.box if by_area else FilterType.catmull_rom)  # Pillow's bicubic one
    resized = Image.new("RGB", (width, height))
    Resizer().resize_pil(image, resized, ResizeOptions(kernel, crop_box=CropBox(left, top, columns, rows)))
    return np.asarray(resized)


def middle(image: Image.Image, shape: tuple[float, float]) -> Box:
    """The largest part of an image, in its middle, that is as wide for its height as `shape`, (height, width)."""
    height, width = crop_size(image.height, image.width, shape)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return left, top, left + width, top + height


def crop_size(height: int, width: int, shape: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the `middle` of an image of `height` x `width`."""
    rows, cols = shape
    if width * rows > height * cols:
        return height, max(1, round(height * cols / rows))
    return max(1, round(width * rows / cols)), width


def patches(image: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """uint8 `[height, width, 3]` to `[S, patch * patch * 3]` in merge order; values go by (row, column, channel)."""
    rows, cols = image.shape[0] // patch, image.shape[1] // patch
    tiles = image.reshape(rows, patch, cols, patch, 3).transpose(0, 2, 1, 3, 4)
    return tiles[merge_order(rows, cols, merge)].reshape(rows * cols, -1)


def resize(
    image: Image.Image, height: int, width: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Resizes to uint8 `[height, width, 3]`, unless told otherwise as the published processor of Qwen2.5-VL does."""
    return np.asarray(image.resize((width, height), resample))


@dataclasses.dataclass(frozen=True)
class Processor:
    """How Qwen2.5-VL's processor resizes and normalises; the area of an image is kept within two counts of pixels."""

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_processor(directory: str | pathlib.Path) -> Processor:
    """Reads what a published Qwen2.5-VL says of its images, in an older or newer form.

    Raises:
      UserError: if the file is missing, lacks a setting, or asks for what Qwen2.5-VL does not do.
    """
    path = processor_file(directory)
    if path is None:
        path = pathlib.Path(directory) / PROCESSOR_FILES[0]
        raise UserError(f"{path} does not exist: give the directory of a published Qwen2.5-VL.")
    given = json.loads(path.read_text())
    given = given.get("image_processor", given)
    limits = dict(given.get("size") or {})
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if given.get(name) is not None:  # the older of both counts more, as to transformers
            limits[edge] = given[name]
    try:
        if given["temporal_patch_size"] != TEMPORAL_PATCH or given.get("resample", 3) != Image.Resampling.BICUBIC:
            raise UserError(f"{path} is not of a Qwen2.5-VL: expected 2 frames a patch and bicubic resizing (3).")
        return Processor(
            given["patch_size"],
            given["merge_size"],
            int(limits["shortest_edge"]),
            int(limits["longest_edge"]),
            tuple(given["image_mean"]),
            tuple(given["image_std"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} lacks a setting ({error}): give the directory of a published Qwen2.5-VL.") from error


def processor_file(directory: str | pathlib.Path) -> pathlib.Path | None:
    """Where a directory says how a published Qwen2.5-VL has its images, if it does."""
    files = (pathlib.Path(directory) / name for name in PROCESSOR_FILES)
    return next((file for file in files if file.is_file()), None)


def check_processor(directory: str | pathlib.Path, vision: QwenVision) -> None:
    """Raises `UserError` if a published Qwen2.5-VL is meant to see images prepared otherwise than training does it."""
    theirs = load_processor(directory)
    ours = dict(patch_size=vision.patch_size, merge_size=vision.merge_size, mean=IMAGE_MEAN, std=IMAGE_STD)
    for name, value in ours.items():
        if not np.allclose(getattr(theirs, name), value, atol=1e-6):
            raise UserError(
                f"{processor_file(directory)} has {name} {getattr(theirs, name)}, but images are prepared with {value}."
            )


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size nearest to (height, width) in multiples of `factor`, scaled so that its area is within the limits.

    Raises:
      BadExample: if one side is more than `MAXIMUM_ASPECT_RATIO` times the other.
    """
    if max(height, width) > MAXIMUM_ASPECT_RATIO * min(height, width):
        raise BadExample(f"image is more than {MAXIMUM_ASPECT_RATIO} times as long as wide")
    nearest = tuple(factor * round(side / factor) for side in (height, width))
    if math.prod(nearest) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return tuple(max(factor, factor * math.floor(side / shrink / factor)) for side in (height, width))
    if math.prod(nearest) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return tuple(factor * math.ceil(side * grow / factor) for side in (height, width))
    return nearest


def pixel_values(image: Image.Image, processor: Processor) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Returns normalised patches float32 `[S, P]` in merge order, values by (channel, time, row, column), and the grid.

    The grid counts patches along (time, row, column).

    Raises:
      BadExample: if the image is too long for its width.
    """
    patch, merge = processor.patch_size, processor.merge_size
    limits = (processor.min_pixels, processor.max_pixels)
    height, width = smart_resize(image.height, image.width, patch * merge, *limits)
    x = resize(image, height, width, Image.Resampling.BICUBIC) / np.float32(255)
    x = (x - np.array(processor.mean, np.float32)) / np.array(processor.std, np.float32)
    rows, cols = height // patch, width // patch
    x = x.reshape(rows, patch, cols, patch, 3).transpose(0, 2, 4, 1, 3)[merge_order(rows, cols, merge)]
    x = np.repeat(x[:, :, None], TEMPORAL_PATCH, axis=2)
    return x.reshape(rows * cols, -1), (1, rows, cols)
