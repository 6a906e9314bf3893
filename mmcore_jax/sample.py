"""Draws an image from a prompt, or edits images, with a trained stage 2.

python -m mmcore_jax.sample --workdir=WORKDIR --prompt "a red heart" --output heart.png
python -m mmcore_jax.sample --workdir=WORKDIR --prompt "make the heart blue" --image heart.png --output blue.png
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import jax
from PIL import Image, PngImagePlugin

from mmcore_jax.config import UserError, door
from mmcore_jax.data import example as example_lib
from mmcore_jax.data.text import load_tokenizer
from mmcore_jax.diffusion.solver import SOLVERS
from mmcore_jax.generate import Generator
from mmcore_jax.training.checkpoint import load_run


@door
def main(argv: Sequence[str]) -> None:
    """Reads the command line, generates, writes a PNG."""
    arguments = _parser().parse_args(argv)
    request = make_request(arguments.prompt, arguments.image)
    check_output(arguments.output)
    config, model, params = load_run(arguments.workdir)
    if config.sampling is None:
        raise UserError(
            f"{arguments.workdir} is a run of {config.stage}, which draws nothing: give the workdir of a stage 2."
        )
    given = {name: getattr(arguments, name) for name in ("solver", "steps", "text_scale", "visual_scale")}
    settings = dataclasses.replace(
        config.sampling, **{name: value for name, value in given.items() if value is not None}
    )
    generator = Generator(config, model, load_tokenizer(arguments.workdir / "tokenizer"))
    (image,) = generator(params, [request], settings, arguments.seed)
    information = PngImagePlugin.PngInfo()
    for name, value in {"prompt": arguments.prompt, "seed": arguments.seed, **dataclasses.asdict(settings)}.items():
        information.add_text(name, str(value))
    picture = Image.fromarray(image)
    picture = picture.resize(
        (arguments.scale * picture.width, arguments.scale * picture.height), Image.Resampling.NEAREST
    )
    picture.save(arguments.output, pnginfo=information)
    print(f"{arguments.output}: {arguments.prompt!r}, seed {arguments.seed}, {jax.default_backend()}")


def make_request(prompt: str, images: Sequence[pathlib.Path]) -> example_lib.Example:
    """An example whose last image is to be generated from the images and the prompt.

    Raises:
      UserError: for an empty prompt or an image that cannot be read.
    """
    if not prompt.strip():
        raise UserError("--prompt is empty: say what to draw.")
    segments: list = []
    for path in images:
        try:
            segments.append(example_lib.image(path.read_bytes()))
        except OSError as error:
            raise UserError(f"cannot read the image {path}: {error.strerror}.") from error
    segments += [example_lib.text(prompt), example_lib.image(b"to come", generate=True)]
    return {"id": prompt, "task": "sample", "segments": segments}


def check_output(path: pathlib.Path) -> None:
    """Raises `UserError` before any work is done, if the output cannot be written."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--output {path} is not a .png file.")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: the directory {path.parent} does not exist.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcore_jax.sample", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of a finished stage 2")
    parser.add_argument("--prompt", required=True, help="a caption, or an instruction for the images")
    parser.add_argument("--image", type=pathlib.Path, nargs="*", default=[], help="images to edit or combine")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a .png file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--solver", choices=SOLVERS, help="of the flow; default: the config's")
    parser.add_argument("--steps", type=int, help="of the solver; default: the config's")
    parser.add_argument("--text_scale", type=float, help="guidance towards the text; default: the config's")
    parser.add_argument(
        "--visual_scale", type=float, help="guidance towards the visual embeddings; default: the config's"
    )
    parser.add_argument("--scale", type=int, default=8, help="pixels of the output for each one generated")
    return parser


if __name__ == "__main__":
    main()
