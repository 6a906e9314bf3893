"""Draws images from prompts, or edits images, with a trained stage 2.

    python -m mmcore_jax.sample --workdir=WORKDIR --prompt "a red heart" --output heart.png [--num 8]
    python -m mmcore_jax.sample --workdir=WORKDIR --prompt "make the heart blue" --image heart.png --output blue.png
    python -m mmcore_jax.sample --workdir=WORKDIR --requests requests.json --output DIR
    python -m mmcore_jax.sample --workdir=WORKDIR --interactive --output DIR

A picture follows from its request, its seed and the settings alone, whatever else is drawn in the same run. Pictures of
`--num` and `--requests` that are there already, with the same settings in their metadata, are not drawn again.
"""

import argparse
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from mmcore_jax import __version__, generate
from mmcore_jax import config as config_lib
from mmcore_jax.config import UserError, door, split_step
from mmcore_jax.data.image import MAXIMUM_PIXELS
from mmcore_jax.data.text import load_tokenizer
from mmcore_jax.diffusion.solver import SOLVERS
from mmcore_jax.generate import Generator, Size
from mmcore_jax.progress import progress
from mmcore_jax.sampling import pictures, requests
from mmcore_jax.sampling.pictures import Settings
from mmcore_jax.sampling.requests import Job
from mmcore_jax.sampling.session import Session, read_lines
from mmcore_jax.training.checkpoint import run_id
from mmcore_jax.training.weights import load_run


@door
def main(argv: Sequence[str]) -> None:
    """Reads the command line, draws, writes PNGs."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    jobs = _jobs(arguments)
    painter = Painter(arguments)
    for job in jobs:
        painter.check(job)
    if arguments.interactive:
        _converse(painter, arguments)
    elif arguments.requests:
        _draw_missing(painter, jobs, arguments.output / requests.SHEET, [[job] for job in jobs])
    elif arguments.num:
        _draw_missing(painter, jobs, requests.sheet_beside(arguments.output), pictures.split_rows(jobs))
    else:
        _draw_one(painter, *jobs)


# --- What is asked for ------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcore_jax.sample", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--workdir", type=pathlib.Path, required=True, help="of a finished stage 2, or WORKDIR@STEP, a checkpoint"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="a caption, or an instruction for the images")
    what.add_argument(
        "--requests",
        type=pathlib.Path,
        metavar="JSON",
        help='a list of {"prompt": ..., "images": [PATH, ...], "output": "NAME.png", "seed": N, "size": "HxW", '
        '"negative": ...}; images, seed, size and negative may be left out, paths are relative to the file',
    )
    what.add_argument("--interactive", action="store_true", help="a conversation, each turn a picture")
    parser.add_argument(
        "--image", type=pathlib.Path, nargs="*", action="extend", default=[], help="images to edit or combine"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, required=True, help="a .png file, or a directory without --prompt"
    )
    parser.add_argument("--negative", metavar="PROMPT", help="what not to draw: guidance leads away from it")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--size", metavar="HxW", help="height and width in pixels; default: those of the first image, or a square"
    )
    parser.add_argument("--num", type=int, metavar="N", help="draws the prompt with N seeds, into NAME_SEED.png each")
    parser.add_argument("--solver", choices=SOLVERS, help="of the flow; default: the config's")
    parser.add_argument("--steps", type=int, help="of the solver; default: the config's")
    parser.add_argument("--text_scale", type=float, help="guidance towards the text; default: the config's")
    parser.add_argument(
        "--visual_scale", type=float, help="guidance towards the visual embeddings; default: the config's"
    )
    parser.add_argument("--image_scale", type=float, help="guidance towards the images given; default: the config's")
    parser.add_argument("--batch_size", type=int, default=8, help="drawn at once, at most (default: %(default)s)")
    parser.add_argument(
        "--scale", type=int, help="pixels of the output for each one generated (default: what makes small ones 256)"
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for a mistake, before any work is done; makes the directory for the output, if that is one."""
    for name in ("num", "steps", "scale", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1.")
    requests.check_seed(arguments.seed, "--seed")
    requests.check_negative(arguments.negative, "--negative")
    if arguments.prompt is not None:
        pictures.check_output(arguments.output, "--output")
        return
    for name in ("image", "num"):
        if getattr(arguments, name):
            raise UserError(f"--{name} goes with --prompt only.")
    pictures.make_directory(arguments.output, "--output")


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    if arguments.interactive:
        return []
    if arguments.requests:
        return requests.read_requests(arguments.requests, arguments.output, arguments.seed, _size(arguments))
    request = requests.make_request(arguments.prompt, arguments.image, "--prompt", "--image")
    job = Job(request, arguments.seed, arguments.output, _size(arguments))
    return requests.number(job, arguments.num) if arguments.num else [job]


def _size(arguments: argparse.Namespace) -> Size | None:
    return arguments.size and requests.parse_size(arguments.size, "--size")


# --- Drawing ----------------------------------------------------------------------------------------------------------


class Painter:
    """Draws and saves pictures with a run, which is loaded when the first one is drawn."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Raises `UserError` if the run is no stage 2."""
        self._source, self._batch_size = arguments.workdir, arguments.batch_size
        self._workdir, step = split_step(self._source)
        self.config = config_lib.from_json(self._workdir / "config.json")
        self._step = self.config.total_steps if step is None else step
        if self.config.sampling is None:
            raise UserError(
                f"{self._workdir} is a run of {self.config.stage}, which draws nothing: give the workdir of a stage 2."
            )
        self._scale = arguments.scale or max(1, 256 // self.config.data.image_size)
        names = ("solver", "steps", "text_scale", "visual_scale", "image_scale")
        given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
        self._settings = dataclasses.replace(self.config.sampling, **given)
        self._size, self._negative = _size(arguments), arguments.negative
        if self._size:
            generate.check_size(self._size, self.config, f"--size {arguments.size}")

    def check(self, job: Job) -> None:
        """Raises `UserError` for a request that the run cannot draw.

        It has more images than any example in training, a size that does not fit or is too large a file, or a negative
        prompt in vain.
        """
        if job.size:
            generate.check_size(job.size, self.config, f"the size {generate.show_size(job.size)} of {job.output}")
        height, width = self.size_of(job)
        if height * width * self._scale**2 > MAXIMUM_PIXELS:
            raise UserError(
                f"{job.output} would have {height * self._scale} x {width * self._scale} pixels, more than can be read "
                f"again ({MAXIMUM_PIXELS:,}): give --scale less than {self._scale}."
            )
        most, given = self.config.data.budgets.images, len(requests.images_of(job.request))
        if given >= most:
            raise UserError(
                f"the request for {job.output} gives {given} images, but with the one to draw {self._workdir} was "
                f"trained with {most} at most (config.data.budgets.images): give {most - 1} or fewer."
            )
        self.check_negative(self.negative_of(job), str(job.output))

    def check_negative(self, negative: str | None, name: str) -> None:
        """Raises `UserError` for a negative prompt, of what is called `name`, that nothing leads away from."""
        if negative and not generate.branches_of(self._settings).drop_text.any():
            raise UserError(
                f"the negative prompt of {name} does nothing where text_scale, visual_scale and image_scale are "
                "all 1: give --text_scale more."
            )

    def size_of(self, job: Job) -> Size:
        """Height and width of the picture of a job."""
        return job.size or self._size or generate.default_size(job.request, self.config)

    def negative_of(self, job: Job) -> str | None:
        """The negative prompt of a job."""
        return job.negative or self._negative

    def describe(self, job: Job) -> Settings:
        """What a picture follows from; images by their hash."""
        images = [hashlib.sha256(image).hexdigest()[:16] for image in requests.images_of(job.request)]
        description = {"prompt": requests.prompt_of(job.request), "negative": self.negative_of(job) or ""}
        description |= {"images": " ".join(images), "seed": job.seed}
        description |= {"size": generate.show_size(self.size_of(job))} | dataclasses.asdict(self._settings)
        description |= {"scale": self._scale, "workdir": self._workdir, "checkpoint_step": self._step}
        description["run"] = run_id(self._workdir)
        description["mmcore_jax"] = __version__
        return {name: str(value) for name, value in description.items()}

    def paint(self, jobs: Sequence[Job]) -> Iterator[np.ndarray]:
        """Draws and saves the picture of each job, and yields it, uint8 `[height, width, 3]`; size after size."""
        sizes = [self.size_of(job) for job in jobs]
        for size in dict.fromkeys(sizes):
            yield from self._paint([job for job, other in zip(jobs, sizes) if other == size], size)

    def _paint(self, jobs: Sequence[Job], size: Size) -> Iterator[np.ndarray]:
        for first in range(0, len(jobs), self._batch_size):
            batch = jobs[first : first + self._batch_size]
            full = [*batch, *[batch[-1]] * (min(self._batch_size, len(jobs)) - len(batch))]  # one shape for all
            drawn = [job.request for job in full], self._settings, [job.seed for job in full]
            negatives = [self.negative_of(job) for job in full]
            images = self._generate(*drawn, batch_size=len(full), sizes=[size] * len(full), negatives=negatives)
            for job, image in zip(batch, images):
                pictures.save(job.output, image, self._scale, self.describe(job))
                yield image

    def load(self) -> None:
        """Loads the run now."""
        _ = self._generate

    @functools.cached_property
    def _generate(self) -> Callable[..., np.ndarray]:
        return load_generator(self._source)


def load_generator(source: pathlib.Path) -> Callable[..., np.ndarray]:
    """The sampler of a run, as `load_run` takes it: a `Generator` that holds its parameters."""
    config, model, params = load_run(source)
    tokenizer = load_tokenizer(split_step(source)[0] / "tokenizer")
    return functools.partial(Generator(config, model, tokenizer, converses=True), params)


def _draw_one(painter: Painter, job: Job) -> None:
    (_,) = painter.paint([job])
    print(f"{job.output}: {requests.prompt_of(job.request)!r}, seed {job.seed}, {jax.default_backend()}")


def _draw_missing(painter: Painter, jobs: list[Job], sheet: pathlib.Path, rows: Sequence[Sequence[Job]]) -> None:
    """Draws the jobs whose pictures are not there yet, then a page of `rows` of all of them."""
    missing = [job for job in jobs if pictures.read_settings(job.output) != painter.describe(job)]
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} pictures are there already, drawn with these settings.")
    for _ in progress(painter.paint(missing), len(missing), "drawing"):
        pass
    pictures.save_sheet(sheet, rows, painter.size_of)
    print(f"{sheet.parent}: {len(missing)} of {len(jobs)} pictures drawn; all are on {sheet}.")


def _converse(painter: Painter, arguments: argparse.Namespace) -> None:
    painter.check_negative(arguments.negative, "--interactive")
    painter.load()
    print(f"{arguments.workdir} is ready; /help says what there is besides prompts.", flush=True)
    most_images = painter.config.data.budgets.images
    Session(painter.paint, arguments.output, arguments.seed, most_images).run(read_lines())


if __name__ == "__main__":
    main()
