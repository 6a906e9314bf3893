"""What people ask for, from the command line or a JSON file, as jobs for the sampler."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence

from mmcore_jax import config as config_lib
from mmcore_jax.config import UserError
from mmcore_jax.data import example as example_lib
from mmcore_jax.data import image as image_lib
from mmcore_jax.data.example import Example, Image, Text

SEEDS = 2**32  # there are no more different ones
SHEET = "sheet.png"


@dataclasses.dataclass(frozen=True)
class Job:
    """A picture to draw: the last image of `request`, from the noise of `seed`, into the PNG file `output`.

    `size` is its height and width in pixels; without it, those that follow from the request. `negative` says what it is
    not to be.
    """

    request: Example
    seed: int
    output: pathlib.Path
    size: tuple[int, int] | None = None
    negative: str | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A request as a JSON file spells it; without `seed`, `size` and `negative` it has those of the command line."""

    prompt: str
    output: str
    images: tuple[str, ...] = ()
    seed: int | None = None
    size: str | None = None
    negative: str | None = None


def make_request(prompt: str, images: Sequence[pathlib.Path], prompt_name: str, image_name: str) -> Example:
    """An example whose last image is to be generated from the images and the prompt.

    `prompt_name` and `image_name` are what errors call them.

    Raises:
      UserError: for a prompt that is empty or no text, or an image that cannot be read.
    """
    check_words(prompt, prompt_name, "say what to draw")
    return to_come(prompt, [*(read_image(path, image_name) for path in images), example_lib.text(prompt)])


def check_words(words: str, name: str, remedy: str) -> None:
    """Raises `UserError`, which calls them `name`, for words that are empty or no text."""
    if not words.strip():
        raise UserError(f"{name} is empty: {remedy}.")
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not text: {error}.") from error


def check_negative(words: str | None, name: str) -> None:
    """Raises `UserError`, which calls it `name`, for what is no negative prompt; None is none."""
    if words is not None:
        check_words(words, name, "say what not to draw, or leave it out")


def to_come(name: str, segments: Sequence[Text | Image]) -> Example:
    """An example that asks for one more image after `segments`."""
    return {"id": name, "task": "sample", "segments": [*segments, example_lib.image(b"to come", generate=True)]}


def read_image(path: pathlib.Path, name: str) -> Image:
    """The image in a file; raises `UserError`, which calls it `name`, if that cannot be read or does not decode."""
    try:
        encoded = path.read_bytes()
        image_lib.open_rgb(encoded)
    except OSError as error:
        raise UserError(f"{name} {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{name} {path} cannot be used: {error}.") from error
    return example_lib.image(encoded)


def read_requests(
    path: pathlib.Path, directory: pathlib.Path, seed: int, size: tuple[int, int] | None = None
) -> list[Job]:
    """The requests of a JSON file, which names images relative to its own folder and outputs relative to `directory`.

    Raises:
      UserError: naming the first request that has a mistake.
    """
    jobs: dict[pathlib.Path, Job] = {}
    for index, value in enumerate(_read_list(path)):
        where = f"requests[{index}]"
        entry = config_lib.from_dict(Entry, value, where, path)
        own_seed = seed if entry.seed is None else entry.seed
        check_seed(own_seed, f"{where}.seed in {path}")
        _check_name(entry.output, f"{where}.output in {path}")
        output = directory / entry.output
        if output in jobs:
            raise UserError(f"{where}.output in {path} is {entry.output!r}, as an earlier request's: name another.")
        images = [path.parent / name for name in entry.images]
        request = make_request(entry.prompt, images, f"{where}.prompt in {path}", f"{where} in {path}: the image")
        own_size = size if entry.size is None else parse_size(entry.size, f"{where}.size in {path}")
        check_negative(entry.negative, f"{where}.negative in {path}")
        jobs[output] = Job(request, own_seed, output, own_size, entry.negative)
    return list(jobs.values())


def _read_list(path: pathlib.Path) -> list:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--requests {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"--requests {path} is not JSON: {error}.") from error
    if not isinstance(listed, list) or not listed:
        wanted = '[{"prompt": ..., "output": "NAME.png"}, ...]'
        raise UserError(f"--requests {path} holds no list of requests, such as {wanted}.")
    return listed


def _check_name(name: str, what: str) -> None:
    if pathlib.PurePath(name).name != name or pathlib.PurePath(name).suffix.lower() != ".png" or name == SHEET:
        raise UserError(f"{what} is {name!r}, expected the name of a .png file without a folder, other than {SHEET}.")


def number(job: Job, count: int) -> list[Job]:
    """The same request with `count` seeds, from that of `job` on; outputs are called NAME_SEED.png."""
    check_seed(job.seed + count - 1, "the last seed of --num")
    seeds = range(job.seed, job.seed + count)
    return [dataclasses.replace(job, seed=seed, output=_rename(job.output, str(seed))) for seed in seeds]


def sheet_beside(output: pathlib.Path) -> pathlib.Path:
    """Where the contact sheet of numbered pictures goes."""
    return _rename(output, "sheet")


def _rename(path: pathlib.Path, ending: str) -> pathlib.Path:
    return path.with_name(f"{path.stem}_{ending}{path.suffix}")


def check_seed(seed: int, name: str) -> None:
    """Raises `UserError` for what is no seed."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"{name} is {seed}, expected a number from 0 to {SEEDS - 1}.")


def parse_size(size: str, name: str) -> tuple[int, int]:
    """Height and width of a size that is written HEIGHTxWIDTH; raises `UserError`, which calls it `name`."""
    match = re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", size)
    if not match:
        raise UserError(f"{name} is {size!r}, expected HEIGHTxWIDTH in pixels, such as 512x768.")
    return int(match[1]), int(match[2])


def images_of(request: Example) -> list[bytes]:
    """The encoded images that a request gives."""
    return [segment["image"] for segment in request["segments"][:-1] if segment["type"] == "image"]


def prompt_of(request: Example) -> str:
    """The texts of a request, one a line."""
    return "\n".join(segment["text"] for segment in request["segments"] if segment["type"] == "text")
