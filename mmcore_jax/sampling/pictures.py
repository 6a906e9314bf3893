"""Pictures on disk: PNG files that say how they were made, and contact sheets of them."""

import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, PngImagePlugin

from mmcore_jax.config import UserError
from mmcore_jax.data import image as image_lib
from mmcore_jax.evaluation.sheet import sheet
from mmcore_jax.sampling import requests
from mmcore_jax.sampling.requests import Job
from mmcore_jax.writing import whole

Settings = dict[str, str]  # by name, as the metadata of a PNG keeps them

_PAGE_SIDE = 256  # pixels that an image takes on a contact sheet
_PER_ROW = 8


def check_output(path: pathlib.Path, name: str) -> None:
    """Raises `UserError`, which calls it `name`, if `path` is no PNG that could be written."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{name} {path} is not a .png file.")
    if not path.parent.is_dir():
        raise UserError(f"{name} {path}: the directory {path.parent} does not exist.")
    _check_writable(path.parent, name)


def make_directory(path: pathlib.Path, name: str) -> None:
    """Makes a directory unless it is there; raises `UserError`, which calls it `name`, if it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name} {path} cannot be made a directory: {error.strerror}.") from error
    _check_writable(path, name)


def _check_writable(directory: pathlib.Path, name: str) -> None:
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"{name}: you may not write to the directory {directory}.")


def save(path: pathlib.Path, image: np.ndarray, scale: int, settings: Settings) -> None:
    """Writes uint8 `[H, W, 3]` as a PNG, whole or not at all, `scale` pixels for each of its own."""
    information = PngImagePlugin.PngInfo()
    for name, value in settings.items():
        information.add_text(name, value)
    picture = Image.fromarray(image)
    picture = picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)
    _write(picture, path, information)


def read_settings(path: pathlib.Path) -> Settings | None:
    """How a picture was made, or None where there is no whole PNG."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return dict(picture.text)
    except (OSError, SyntaxError, ValueError):  # what Pillow raises on damaged files
        return None


def save_sheet(path: pathlib.Path, rows: Sequence[Sequence[Job]], size_of: Callable[[Job], tuple[int, int]]) -> None:
    """Draws a page of rows of jobs that are done: what was given, and each result over its prompt and seed.

    What jobs beside each other have been given is shown once. `size_of` gives height and width of a job's picture.
    """
    longest = max(max(size_of(job)) for row in rows for job in row)
    side = min(longest, _PAGE_SIDE)

    def show(encoded: bytes, job: Job) -> np.ndarray:
        return image_lib.decode(encoded, *(max(1, length * side // longest) for length in size_of(job)))

    cells = []
    for row in rows:
        given: dict[bytes, Job] = {}
        for job in row:
            for image in requests.images_of(job.request):
                given.setdefault(image, job)
        cells.append([(show(image, job), "given") for image, job in given.items()])
        for job in row:
            caption = f"{requests.prompt_of(job.request)} (seed {job.seed})"
            cells[-1].append((show(job.output.read_bytes(), job), caption))
    _write(sheet(cells, _PAGE_SIDE // side), path)


def split_rows(jobs: Sequence[Job]) -> list[Sequence[Job]]:
    """Rows of a page for jobs that belong together."""
    return [jobs[first : first + _PER_ROW] for first in range(0, len(jobs), _PER_ROW)]


def _write(picture: Image.Image, path: pathlib.Path, information: PngImagePlugin.PngInfo | None = None) -> None:
    try:
        with whole(path) as temporary:
            picture.save(temporary, "PNG", pnginfo=information)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error
