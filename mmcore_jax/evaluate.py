"""Scores a trained run: a table, JSON, and sheets of pictures in WORKDIR/evaluation, or evaluation@STEP.

    python -m mmcore_jax.evaluate --workdir=runs/stage2-openmoji --suite=openmoji
    python -m mmcore_jax.evaluate --workdir=runs/stage1-openmoji --suite=alignment

The suite `openmoji` is for a stage 2, and includes `alignment` of the stage 1 that it was made from.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from mmcore_jax import config as config_lib
from mmcore_jax.config import Config, UserError, door, split_step
from mmcore_jax.data.example import Example
from mmcore_jax.data.text import load_tokenizer
from mmcore_jax.evaluation import openmoji, scores
from mmcore_jax.evaluation.openmoji import Drawings, Sheets
from mmcore_jax.evaluation.probes import Run
from mmcore_jax.evaluation.scores import Scores
from mmcore_jax.evaluation.sheet import sheet
from mmcore_jax.generate import Generator
from mmcore_jax.models import efficientnet
from mmcore_jax.progress import progress
from mmcore_jax.training.weights import load_run, step_of
from mmcore_jax.writing import write_text

BATCH_SIZE = 20  # divides the usual numbers of cases, so that little is drawn to fill up a batch
FEATURE_SIZE = 128


@door
def main(argv: Sequence[str]) -> None:
    """Reads the command line, evaluates, prints the scores."""
    arguments = _parser().parse_args(argv)
    print(scores.table(evaluate(arguments)))
    print(f"Scores and sheets are in {place(arguments.workdir)}.")


def evaluate(arguments: argparse.Namespace) -> Scores:
    """Evaluates a run as the command line says, and writes the scores, unless they are there."""
    if arguments.cases < 1 or (arguments.steps is not None and arguments.steps < 1):
        raise UserError("--cases and --steps must be at least 1.")
    config = read_config(arguments.workdir)
    suite = _suite(arguments.suite)
    settings = describe(arguments, config)
    output = place(arguments.workdir)
    results = read(output, settings)
    if results is not None:
        print(f"{output} is done already.")
        return results
    results, sheets = suite(arguments)
    write(output, settings, results, sheets)
    return results


# --- Suites -----------------------------------------------------------------------------------------------------------


def evaluate_openmoji(arguments: argparse.Namespace) -> tuple[Scores, Sheets]:
    """Everything about a stage 2, and the alignment of its stage 1."""
    config = read_config(arguments.workdir)
    if config.sampling is None:
        raise UserError(
            f"{arguments.workdir} is a run of {config.stage}, which draws nothing: give the workdir of a stage 2."
        )
    data = Drawings(arguments.data, config.data.image_size)
    step_of(arguments.workdir, "--workdir")
    stage1 = find_aligned(config)  # first, since what it lacks would be missed when all has been drawn
    alignment = _score_alignment(stage1, arguments) if stage1 else {}
    run = _load(arguments.workdir)
    draw, extract = make_draw(run, arguments.steps, arguments.seed), make_extract()
    results, sheets = openmoji.evaluate(run, data, draw, extract, arguments.cases, arguments.seed, progress)
    return results | alignment, sheets


def evaluate_alignment(arguments: argparse.Namespace) -> tuple[Scores, Sheets]:
    """The alignment of a stage 1."""
    config = read_config(arguments.workdir)
    if config.objectives.alignment is None:
        raise UserError(
            f"{arguments.workdir} is a run of {config.stage}, which aligns nothing: give the workdir of a stage 1."
        )
    return _score_alignment(arguments.workdir, arguments), {}


def _score_alignment(source: pathlib.Path, arguments: argparse.Namespace) -> Scores:
    run = _load(source)
    data = Drawings(arguments.data, run.config.model.vision_target.vision.image_size)
    return {"alignment": openmoji.score_alignment(run, data, arguments.seed)}


SUITES: dict[str, Callable[[argparse.Namespace], tuple[Scores, Sheets]]] = {
    "openmoji": evaluate_openmoji,
    "alignment": evaluate_alignment,
}


def make_draw(run: Run, steps: int | None, seed: int) -> openmoji.Draw:
    """The sampler of a run, with the settings of its config but for `steps`; it draws squares."""
    settings, side = run.config.sampling, run.config.data.image_size
    settings = dataclasses.replace(settings, steps=steps or settings.steps)
    generator = Generator(run.config, run.model, run.tokenizer)

    def draw(requests: Sequence[Example], pathways: str) -> np.ndarray:
        sizes = [(side, side)] * len(requests)
        return generator(run.params, requests, settings, seed, pathways, BATCH_SIZE, sizes)

    return draw


def make_extract() -> openmoji.Extract:
    """EfficientNet's features of images."""
    params = efficientnet.load_efficientnet_lite0()
    return lambda images: np.asarray(
        efficientnet.features(params, jnp.asarray(images, jnp.float32) / 255, FEATURE_SIZE)
    )


def find_aligned(config: Config) -> pathlib.Path | None:
    """The run that aligned the connector of this one, as `load_run` takes it, if one did."""
    while config.objectives.alignment is None:
        source = config.init["connector"]
        if source == "random":
            return None
        config = read_config(source)
    return pathlib.Path(source)


def _load(source: pathlib.Path) -> Run:
    config, model, params = load_run(source)
    return Run(config, model, params, load_tokenizer(split_step(source)[0] / "tokenizer"))


def read_config(source: str | pathlib.Path) -> Config:
    """The config of a run, as `load_run` takes it."""
    return config_lib.from_json(split_step(source)[0] / "config.json")


# --- What is written --------------------------------------------------------------------------------------------------


def place(source: pathlib.Path) -> pathlib.Path:
    """Where scores of a run go, those of WORKDIR@STEP to `WORKDIR/evaluation@STEP`."""
    workdir, step = split_step(source)
    return workdir / ("evaluation" if step is None else f"evaluation@{step}")


def describe(arguments: argparse.Namespace, config: Config) -> dict:
    """What the scores depend on, as JSON values."""
    sampling = dataclasses.asdict(config.sampling) if config.sampling else {}
    if arguments.steps is not None:
        sampling["steps"] = arguments.steps
    names = {name: getattr(arguments, name) for name in ("suite", "cases", "seed", "data")}
    _, step = split_step(arguments.workdir)
    step = config.total_steps if step is None else step
    described = {**names, "checkpoint_step": step, "training_seed": config.seed, "sampling": sampling}
    return json.loads(json.dumps(described))  # tuples become lists, as they are read back


def read(output: pathlib.Path, settings: dict) -> Scores | None:
    """The scores in `output`, if they are there for these settings."""
    path = output / "scores.json"
    if not path.is_file():
        return None
    known = json.loads(path.read_text())
    return scores.from_json(known) if known.pop("settings") == settings else None


def write(output: pathlib.Path, settings: dict, results: Scores, sheets: Sheets) -> None:
    """Writes sheets and table, then the JSON, whose presence says that all is there.

    Raises:
      UserError: if `output` cannot be written.
    """
    try:
        output.mkdir(exist_ok=True)
        for name, rows in sheets.items():
            sheet(rows).save(output / f"{name}.png")
        (output / "scores.txt").write_text(scores.table(results))
        record = {"settings": settings, **scores.to_json(results)}
        write_text(output / "scores.json", json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}.") from error


def _suite(name: str) -> Callable[[argparse.Namespace], tuple[Scores, Sheets]]:
    if name not in SUITES:
        raise UserError(f"--suite {name} does not exist; there are {', '.join(SUITES)}.")
    return SUITES[name]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcore_jax.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--workdir", type=pathlib.Path, required=True, help="of a finished run, or WORKDIR@STEP, a checkpoint of any"
    )
    parser.add_argument("--suite", required=True, help=" or ".join(SUITES))
    parser.add_argument("--cases", type=int, default=100, help="of each set, at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the cases and the noise (default: %(default)s)")
    parser.add_argument("--data", default="data/openmoji", metavar="DIR", help="the dataset (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of the solver; default: the config's")
    return parser


if __name__ == "__main__":
    main()
