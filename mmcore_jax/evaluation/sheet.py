"""Contact sheets: rows of captioned images on one page."""

import bisect
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_FONT_SIZE = 11
_LINE_HEIGHT = 13
_GAP = 6
_INK, _PAPER = (40, 40, 40), (255, 255, 255)

Cell = tuple[np.ndarray, str]  # uint8 [H, W, 3], caption


def sheet(rows: Sequence[Sequence[Cell]], scale: int = 3) -> Image.Image:
    """Draws rows of images, each with its caption below it, wrapped to the width of the image.

    Args:
      rows: of (image uint8 `[H, W, 3]`, caption).
      scale: pixels of the page for each pixel of an image.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    placed, page_width, y = [], _GAP, _GAP
    for row in rows:
        x, lowest = _GAP, y
        for image, caption in row:
            height, width = scale * image.shape[0], scale * image.shape[1]
            lines = _wrap(caption, width, font)
            placed.append((x, y, image, lines))
            x += width + _GAP
            lowest = max(lowest, y + height + _LINE_HEIGHT * len(lines))
        page_width, y = max(page_width, x), lowest + _GAP
    page = Image.new("RGB", (page_width, y), _PAPER)
    for x, y, image, lines in placed:
        _paste(page, x, y, image, lines, scale, font)
    return page


def _paste(
    page: Image.Image, x: int, y: int, image: np.ndarray, lines: list[str], scale: int, font: ImageFont.ImageFont
) -> None:
    picture = Image.fromarray(image)
    picture = picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)
    page.paste(picture, (x, y))
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((x, y + picture.height + number * _LINE_HEIGHT), line, _INK, font)


def _wrap(caption: str, width: int, font: ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in _break_up(caption, width, font):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _break_up(caption: str, width: int, font: ImageFont.ImageFont) -> Iterator[str]:
    """The words of a caption, those that are too wide in pieces."""
    for word in caption.split():
        while font.getlength(word) > width and len(word) > 1:
            kept = max(
                1, bisect.bisect(range(1, len(word)), width, key=lambda end, word=word: font.getlength(word[:end]))
            )
            yield word[:kept]
            word = word[kept:]
        yield word
