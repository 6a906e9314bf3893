"""What a token is, where it stands, and how images become tokens: NumPy alone, for processes that prepare data."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

PAD = 0
# Kinds of VLM tokens.
TEXT, IMAGE, QUERY = 1, 2, 3
# Kinds of diffusion tokens; TEXT is shared.
VISUAL, CLEAN, NOISED = 4, 5, 6

# How Qwen2.5-VL takes images.
TEMPORAL_PATCH = 2  # an image is two equal frames
IMAGE_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
IMAGE_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class TokenMeta(NamedTuple):
    """What attention and positions need to know of each token, int32 `[B, L]` each, of NumPy or JAX.

    document: example within the row. frame: image slot within the row; text belongs to the image that follows it.
    kind: one of the kinds above. row, col: position on the image grid, 0 for text. index: position within the row.
    """

    document: Any
    frame: Any
    kind: Any
    row: Any
    col: Any
    index: Any


def mrope_positions(in_grid: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Positions of Qwen2.5-VL's multimodal rotary code for one sequence, int32 `[L, 3]`: (time, row, column).

    Text counts on along all three; a grid spans rows and columns from where it begins, at one time, and what follows
    stands one behind the largest position.

    Args:
      in_grid: bool `[L]`, True on the tokens of grids.
      grids: (rows, columns) of each grid in order; each takes the next rows * columns tokens that `in_grid` marks.
    """
    positions = np.repeat(np.arange(len(in_grid), dtype=np.int32)[:, None], 3, axis=1)
    stop = 0
    for rows, cols in grids:
        first = stop + int(np.argmax(in_grid[stop:]))
        stop = first + rows * cols
        positions[first:stop] = positions[first] + _places(rows, cols)
        positions[stop:] += max(rows, cols) - rows * cols
    return positions


@functools.lru_cache(1024)
def _places(rows: int, cols: int) -> np.ndarray:
    """`[rows * cols, 3]`: (0, row, column)."""
    return np.indices((1, rows, cols)).reshape(3, -1).T


def merge_order(rows: int, cols: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the rows * cols patches of an image, the merge * merge patches of a merged token together."""
    grid = np.arange(rows * cols).reshape(rows // merge, merge, cols // merge, merge)
    return np.divmod(grid.transpose(0, 2, 1, 3).reshape(-1), cols)
