"""Image files of every kind become the pixels that were written; damaged and hostile ones become a counted reason."""

import importlib.util
import io
import struct
import warnings
import zlib

import matplotlib.cbook
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile

from mmcore_jax.data import image as image_lib
from mmcore_jax.data.example import BadExample

# A test below sees that they stay silent outside of pytest.
pytestmark = [pytest.mark.filterwarnings(f"ignore:::PIL.{name}") for name in ("Image", "TiffImagePlugin")]

PIXELS = np.random.default_rng(0).integers(0, 256, (13, 9, 3), np.uint8)
RGB = Image.fromarray(PIXELS)
with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
    PHOTOGRAPH = Image.open(file).convert("RGB")  # 512 x 600


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, values: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of `values` `[height, ...]`, big-endian samples, with chunks between header and pixels."""
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    )


def jpeg(image: Image.Image = RGB, quality: int = 95, **options) -> bytes:
    return encode(image, "JPEG", quality=quality, **options)


def opened(encoded: bytes) -> np.ndarray:
    """What is decoded; its size agrees with the header's."""
    pixels = np.asarray(image_lib.open_rgb(encoded))
    assert image_lib.read_size(encoded) == pixels.shape[:2]
    assert pixels.shape[2:] == (3,)
    return pixels


# --- Good files -------------------------------------------------------------------------------------------------------

UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
    9: lambda x: x,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_turns_an_image_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(PNG={}, JPEG={}, TIFF={}, WEBP=dict(lossless=True))[kind]
    lying = np.asarray(Image.open(io.BytesIO(encode(RGB, kind, **options))))
    np.testing.assert_array_equal(opened(encode(RGB, kind, exif=exif, **options)), UPRIGHT[orientation](lying))


def test_damaged_exif_leaves_an_image_as_it_is() -> None:
    np.testing.assert_array_equal(opened(jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")), opened(jpeg()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", dict(lossless=True)),
        ("TIFF", {}),
        ("TIFF", dict(compression="tiff_lzw")),
        ("TIFF", dict(compression="tiff_adobe_deflate")),
        ("BMP", {}),
        ("JPEG2000", dict(irreversible=False)),
    ],
)
def test_lossless_formats(kind: str, options: dict) -> None:
    np.testing.assert_array_equal(opened(encode(RGB, kind, **options)), PIXELS)
    np.testing.assert_array_equal(opened(encode(RGB, kind, **options) + b"and more"), PIXELS)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("grey", [False, True])
def test_jpeg_pixels_are_pillows(subsampling: int, progressive: bool, grey: bool) -> None:
    """The published processors are given what Pillow decodes."""
    for box in [(0, 0, 512, 600), (100, 100, 101, 101), (3, 5, 480, 398)]:
        image = PHOTOGRAPH.crop(box).convert("L" if grey else "RGB")
        encoded = jpeg(image, subsampling=subsampling, progressive=progressive)
        expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        np.testing.assert_array_equal(opened(encoded), expected)
        np.testing.assert_array_equal(opened(encoded + b"and more"), expected)


RARE = {
    "red, green and blue": jpeg(PHOTOGRAPH, keep_rgb=True),
    "inks": jpeg(PHOTOGRAPH.convert("CMYK")),
    "two pictures, as some telephones write": encode(
        PHOTOGRAPH, "MPO", save_all=True, append_images=[Image.new("RGB", PHOTOGRAPH.size)]
    ),
}


@pytest.mark.parametrize("name", RARE)
def test_rare_kinds_of_jpeg(name: str) -> None:
    expected = np.asarray(Image.open(io.BytesIO(RARE[name])).convert("RGB"))
    np.testing.assert_array_equal(opened(RARE[name]), expected)
    assert np.abs(expected.astype(int) - np.asarray(PHOTOGRAPH)).mean() < 3


GREY = PIXELS[..., 0]
WIDE = np.random.default_rng(1).integers(0, 2**16, (13, 9, 4)).astype(">u2")
HIGH = (WIDE >> 8).astype(np.uint8)
MASK = np.where(PIXELS[..., 1:2] < 128, 0, 255).astype(np.uint8)
OVER_WHITE = np.where(MASK == 0, 255, PIXELS)
LEVELS = np.random.default_rng(2).integers(0, 2, (13, 9), np.uint8)
PALETTE = np.random.default_rng(3).integers(0, 256, (4, 3), np.uint8)
INDICES = np.random.default_rng(4).integers(0, 4, (13, 9), np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def indexed() -> Image.Image:
    image = Image.fromarray(INDICES).convert("P")
    image.putdata(INDICES.ravel().tolist())
    image.putpalette(PALETTE.tobytes())
    return image


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Several values of so many bits in a byte."""
    shifts = np.arange(8 - bits, -1, -bits)
    return (values.reshape(len(values), -1, len(shifts)) << shifts).sum(axis=2).astype(np.uint8)


def frames(kind: str, **options) -> bytes:
    colours = [Image.new("RGB", (9, 13), name) for name in ("red", "lime", "blue")]
    return encode(colours[0], kind, save_all=True, append_images=colours[1:], **options)


# By name: a file, and the pixels it must give.
FILES = {
    "grey": (encode(Image.fromarray(GREY), "PNG"), grey(GREY)),
    "grey of 1 bit": (encode(Image.fromarray(LEVELS * 255).convert("1"), "PNG"), grey(LEVELS * 255)),
    "grey of 16 bits": (png(9, 13, 16, 0, WIDE[..., 0]), grey(HIGH[..., 0])),
    "grey of 16 bits, one value clear": (
        png(9, 13, 16, 0, WIDE[..., 0], (b"tRNS", struct.pack(">H", WIDE[2, 3, 0]))),
        grey(np.where(WIDE[..., 0] == WIDE[2, 3, 0], 255, HIGH[..., 0])),
    ),
    "grey of 16 bits, TIFF": (encode(Image.fromarray(WIDE[..., 0].astype(np.uint16)), "TIFF"), grey(HIGH[..., 0])),
    "colour of 16 bits": (png(9, 13, 16, 2, WIDE[..., :3]), HIGH[..., :3]),
    "grey of 2 bits, one value clear": (
        png(8, 13, 2, 0, packed(INDICES[:, :8], 2), (b"tRNS", struct.pack(">H", 1))),
        grey(np.where(INDICES[:, :8] == 1, 255, 85 * INDICES[:, :8])),
    ),
    "grey of 4 bits, one value clear": (
        png(8, 13, 4, 0, packed(GREY[:, :8] >> 4, 4), (b"tRNS", struct.pack(">H", GREY[0, 0] >> 4))),
        grey(np.where(GREY[:, :8] >> 4 == GREY[0, 0] >> 4, 255, 17 * (GREY[:, :8] >> 4))),
    ),
    "one grey clear": (
        png(9, 13, 8, 0, GREY, (b"tRNS", struct.pack(">H", GREY[2, 3]))),
        grey(np.where(GREY[2, 3] == GREY, 255, GREY)),
    ),
    "one colour clear": (
        png(9, 13, 8, 2, PIXELS, (b"tRNS", struct.pack(">3H", *PIXELS[2, 3]))),
        np.where((PIXELS[2, 3] == PIXELS).all(axis=2, keepdims=True), 255, PIXELS),
    ),
    "grey with alpha": (
        png(9, 13, 8, 4, np.dstack([GREY, MASK])),
        np.where(MASK == 0, 255, grey(GREY)),
    ),
    "alpha": (encode(Image.fromarray(np.dstack([PIXELS, MASK])), "PNG"), OVER_WHITE),
    "alpha, WebP": (encode(Image.fromarray(np.dstack([PIXELS, MASK])), "WEBP", lossless=True), OVER_WHITE),
    "alpha of a half": (
        encode(Image.new("RGBA", (9, 13), (0, 100, 255, 51)), "PNG"),
        np.full((13, 9, 3), (204, 224, 255)),
    ),
    "palette": (encode(indexed(), "PNG"), PALETTE[INDICES]),
    "palette, one colour clear": (
        encode(indexed(), "PNG", transparency=2),
        np.where(INDICES[..., None] == 2, 255, PALETTE[INDICES]),
    ),
    "palette with alpha": (
        encode(indexed(), "PNG", transparency=bytes([255, 0, 255, 0])),
        np.where(INDICES[..., None] % 2 == 1, 255, PALETTE[INDICES]),
    ),
    "palette, GIF": (
        encode(indexed(), "GIF", transparency=2),
        np.where(INDICES[..., None] == 2, 255, PALETTE[INDICES]),
    ),
    "animation, GIF": (frames("GIF"), np.full((13, 9, 3), (255, 0, 0))),
    "animation, PNG": (frames("PNG"), np.full((13, 9, 3), (255, 0, 0))),
    "animation, PNG with another picture for old viewers": (
        frames("PNG", default_image=True),
        np.full((13, 9, 3), (255, 0, 0)),
    ),
    "animation, WebP": (frames("WEBP", lossless=True), np.full((13, 9, 3), (255, 0, 0))),
    "pages, TIFF": (frames("TIFF"), np.full((13, 9, 3), (255, 0, 0))),
}


@pytest.mark.parametrize("name", FILES)
def test_kinds_of_pixels(name: str) -> None:
    encoded, expected = FILES[name]
    np.testing.assert_array_equal(opened(encoded), expected)


INKS = (200, 40, 90, 30)  # cyan, magenta, yellow, black
INKED = [(255 - ink) * (255 - INKS[3]) / 255 for ink in INKS[:3]]


def test_four_inks() -> None:
    """As Adobe writes them: inverted in JPEG, as they are in TIFF."""
    image = Image.new("CMYK", (16, 16), INKS)
    np.testing.assert_allclose(opened(encode(image, "TIFF")), np.full((16, 16, 3), INKED), atol=1)
    np.testing.assert_allclose(opened(jpeg(image, 100)), np.full((16, 16, 3), INKED), atol=2)


def test_four_inks_as_luminance_and_chrominance() -> None:
    """YCCK, which Pillow does not write: CMYK whose first three channels are declared to be of YCbCr."""
    encoded = jpeg(Image.new("CMYK", (16, 16), INKS), 100)
    at = encoded.index(b"Adobe") + 11
    assert encoded[at] == 0
    y, cb, cr, key = (255 - ink for ink in INKS)
    rgb = y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)
    expected = (255 - np.clip(rgb, 0, 255)) * key / 255
    np.testing.assert_allclose(opened(encoded[:at] + b"\2" + encoded[at + 1 :]), np.full((16, 16, 3), expected), atol=3)


# --- Bad files --------------------------------------------------------------------------------------------------------

UNKNOWN = "image has no header of a known format"
LARGE = "image has too many pixels"
LONG = "image is too long or too wide"


def sized(width: int, height: int) -> dict[str, bytes]:
    """Files of a few hundred bytes whose headers claim a size."""
    frame = jpeg().index(b"\xff\xc0") + 5
    bmp, gif = encode(RGB, "BMP"), encode(indexed(), "GIF")
    return {
        "PNG": png(width, height, 8, 2, PIXELS),
        "JPEG": jpeg()[:frame] + struct.pack(">HH", height, width) + jpeg()[frame + 4 :],
        "BMP": bmp[:18] + struct.pack("<ii", width, height) + bmp[26:],
        "GIF": gif[:6] + struct.pack("<HH", width, height) + gif[10:],
    }


@pytest.mark.parametrize(
    ("size", "reason"),
    [((60_000, 60_000), LARGE), ((10_000, 10_000), LARGE), ((50_000, 1_000), LONG), ((9, 50_000), LONG)],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF"])
def test_bombs_are_refused_by_their_header(kind: str, size: tuple[int, int], reason: str, monkeypatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    for read in (image_lib.open_rgb, image_lib.read_size):
        with pytest.raises(BadExample, match=f"^{reason}$"):
            read(sized(*size)[kind])


@pytest.mark.parametrize("size", [(0, 0), (0, 13), (9, 0)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_nothing_to_see(kind: str, size: tuple[int, int]) -> None:
    for read in (image_lib.open_rgb, image_lib.read_size):
        with pytest.raises(BadExample, match=f"^{UNKNOWN}$"):
            read(sized(*size)[kind])


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"<!DOCTYPE html><html><body>404</body></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
    + [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
)
def test_no_image(content: bytes) -> None:
    for read in (image_lib.open_rgb, image_lib.read_size):
        with pytest.raises(BadExample, match=f"^{UNKNOWN}$"):
            read(content)


LARGER = PHOTOGRAPH.resize((256, 300))
WHOLE = {
    "JPEG": jpeg(LARGER),
    "JPEG, progressive": jpeg(LARGER, progressive=True),
    "JPEG, grey": jpeg(LARGER.convert("L")),
    "JPEG, inks": jpeg(LARGER.convert("CMYK")),
    "PNG": encode(LARGER, "PNG"),
    "WebP": encode(LARGER, "WEBP"),
    "WebP, lossless": encode(LARGER, "WEBP", lossless=True),
    "GIF": encode(LARGER.convert("P"), "GIF"),
    "TIFF": encode(LARGER, "TIFF"),
    "TIFF, LZW": encode(LARGER, "TIFF", compression="tiff_lzw"),
    "BMP": encode(LARGER, "BMP"),
}


def refused(encoded: bytes, capfd) -> str:
    """The reason why a file is refused, in silence."""
    with pytest.raises(BadExample) as bad:
        image_lib.open_rgb(encoded)
    assert capfd.readouterr() == ("", "")
    assert len(str(bad.value)) < 60
    return str(bad.value)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("name", WHOLE)
def test_truncated(name: str, share: float, capfd) -> None:
    encoded = WHOLE[name]
    refused(encoded[: int(share * len(encoded))], capfd)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["JPEG", "JPEG, progressive", "JPEG, grey", "JPEG, inks"])
def test_half_a_jpeg_is_no_half_grey_picture(name: str, share: float, capfd) -> None:
    """Where an end marker follows what is left, or zeros up to the file's length, Pillow sees nothing."""
    encoded = WHOLE[name]
    half = encoded[: int(share * len(encoded))]
    for file in (half + b"\xff\xd9", half + bytes(len(encoded) - len(half) - 2) + b"\xff\xd9"):
        assert refused(file, capfd) == "image has damaged JPEG data"


def test_odd_jpeg_metadata_is_no_damage() -> None:
    """libjpeg warns of it, but the pixels are whole."""
    encoded = jpeg(LARGER)
    expected = opened(encoded)
    comment, icc = b"\xff\xfe\0\4ok", b"\xff\xe2\0\x10ICC_PROFILE\0\2\1"  # part 2 of 1
    for odd in (bytes(11) + comment, bytes(11) + icc, icc):
        file = encoded[:20] + odd + encoded[20:]
        with pytest.raises(ValueError, match=r"extraneous|ICC"):
            simplejpeg.decode_jpeg(file)
        np.testing.assert_array_equal(opened(file), expected)


def test_a_hole_is_seen(capfd) -> None:
    for name in ("JPEG", "JPEG, progressive", "JPEG, grey", "PNG"):
        encoded = WHOLE[name]
        middle = len(encoded) // 2
        refused(encoded[:middle] + bytes(512) + encoded[middle + 512 :], capfd)


def test_a_changed_bit_is_seen_where_there_are_checksums(capfd) -> None:
    encoded = bytearray(png(9, 13, 8, 2, PIXELS))
    for at in range(len(encoded) - 40, len(encoded) - 16):  # the last pixels, and their checksums
        encoded[at] ^= 1
        refused(bytes(encoded), capfd)
        encoded[at] ^= 1
    np.testing.assert_array_equal(opened(bytes(encoded)), PIXELS)


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
def test_bombs_beside_the_pixels(name: bytes, capfd) -> None:
    packed = zlib.compress(bytes(200 << 20), 9) if name == b"zTXt" else zlib.compress(bytes(8 << 20), 9)
    for read in (image_lib.open_rgb, image_lib.read_size):
        with pytest.raises(BadExample):
            read(png(9, 13, 8, 2, PIXELS, (name, b"Comment\0\0" + packed)))


def test_values_of_32_bits(capfd) -> None:
    for kind in (np.int32, np.float32):
        assert refused(encode(Image.fromarray(GREY.astype(kind)), "TIFF"), capfd) == "image has values of 32 bits"


def test_reasons_are_the_same_for_every_record(capfd) -> None:
    encoded = WHOLE["JPEG"]
    reasons = {refused(encoded[: int(share * len(encoded))], capfd) for share in np.linspace(0.3, 0.99, 9)}
    assert len(reasons) == 1


def test_what_pillow_logs_stays_unseen(capfd, caplog) -> None:
    """Samples per pixel, tag 277, beyond what a TIFF may have."""
    encoded = encode(RGB, "TIFF")
    at = encoded.index(struct.pack("<HHIH", 277, 3, 1, 3))
    refused(encoded[: at + 8] + struct.pack("<H", 1027) + encoded[at + 10 :], capfd)
    assert not caplog.records


def test_pillow_keeps_its_warnings_to_itself() -> None:
    """pytest takes filters back that a module sets when it is imported: so it is imported again, inside the test."""
    spec = importlib.util.spec_from_file_location("image_again", image_lib.__file__)
    again = importlib.util.module_from_spec(spec)
    damaged = jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\x12\0\3\0\0\0\1\0\6")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(damaged)):
            assert len(caught) == 1
        spec.loader.exec_module(again)
        again.open_rgb(damaged)
        with pytest.raises(BadExample):
            again.open_rgb(sized(10_000, 10_000)["PNG"])
        assert len(caught) == 1
