"""Re-runs the paper's ablations, small: trains variants of a recipe, and reports which way each comparison points.

    python -m mmcore_jax.ablate --workdir=runs/ablation --seeds=0,1,2 --minutes=240
    python -m mmcore_jax.ablate --workdir=runs/ablation --variants=frozen_2,lora --stage1.total_steps=600

Called again, it continues where it stopped: what is finished is known again, what was training goes on. The report,
`report.md` and its plots in the workdir, is written at the end of each call from whatever is there, and `results.json`
beside it: with `--also`, a report takes in what other machines have run.
"""

import argparse
import pathlib
from collections.abc import Sequence

import jax

from mmcore_jax import evaluate as evaluation
from mmcore_jax import train as training
from mmcore_jax.ablation import jobs as jobs_lib
from mmcore_jax.ablation import report
from mmcore_jax.ablation.jobs import Doors, Family, Job
from mmcore_jax.ablation.table import STAGES, VARIANTS, choose
from mmcore_jax.config import UserError, door


@door
def main(argv: Sequence[str]) -> None:
    """Reads the command line, trains and scores what is missing, writes the report."""
    arguments, rest = _parser().parse_known_args(argv)
    comparisons, overrides = choose(arguments.variants), read_overrides(rest)
    family = Family(arguments.config, arguments.workdir, overrides)
    jobs = family.jobs(comparisons, arguments.seeds)
    jobs_lib.check(jobs, arguments.cases)
    before = arguments.workdir / report.RESULTS_FILE
    files = [*arguments.also, *([before] if before.is_file() else [])]
    others = report.read_others(files, family, comparisons, arguments.cases)
    try:
        arguments.workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {arguments.workdir}: {error.strerror}.") from error
    made_by = doors(arguments.data, arguments.cases)
    failed = jobs_lib.run(jobs, arguments.workdir, made_by, arguments.minutes, others.keys())
    results = report.Results(arguments.workdir, family, comparisons, arguments.seeds, others)
    path = report.write(arguments.workdir, results)
    print(f"\n{path}: {len(results.jobs) - len(results.left)} of {len(results.jobs)} runs are in it.")
    for name in results.left:
        print(f"left: {name}")
    if failed:
        raise UserError("; ".join(f"{name} failed: {error}" for name, error in failed.items()))


def doors(data: str, cases: int) -> Doors:
    """Training and evaluation in this process. What was compiled for one run is of no use to the next."""

    def train(job: Job) -> None:
        training.train(job.config, job.workdir)
        jax.clear_caches()

    def evaluate(job: Job) -> None:
        suite = "openmoji" if job.config.sampling else "alignment"
        evaluation.evaluate(
            argparse.Namespace(workdir=job.workdir, suite=suite, cases=cases, seed=0, data=data, steps=None)
        )
        jax.clear_caches()

    return Doors(train, evaluate)


def read_overrides(arguments: Sequence[str]) -> dict[str, list[str]]:
    """`--STAGE.KEY=VALUE` to the overrides of each stage.

    Raises:
      UserError: for anything else.
    """
    overrides: dict[str, list[str]] = {}
    for argument in arguments:
        stage, dot, rest = argument.removeprefix("--").partition(".")
        if not argument.startswith("--") or not dot or stage not in STAGES:
            raise UserError(
                f"cannot read the argument {argument!r}: settings of a stage are written --STAGE.KEY=VALUE, with "
                f"STAGE one of {', '.join(STAGES)}."
            )
        overrides.setdefault(stage, []).append(f"--config.{rest}")
    return overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mmcore_jax.ablate",
        description=__doc__.split("\n")[0],
        epilog="Any setting of a stage, for all of its variants: --STAGE.KEY=VALUE, such as --stage2.total_steps=400.",
    )
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/ablation", help="default: %(default)s")
    parser.add_argument("--seeds", type=_seeds, default=[0], metavar="0,1,...", help="default: 0; directions need two")
    parser.add_argument(
        "--also", type=pathlib.Path, nargs="+", default=[], metavar="FILE", help="results.json of other machines"
    )
    parser.add_argument("--minutes", type=float, help="trains no longer than this in this call; default: to the end")
    parser.add_argument(
        "--variants",
        type=lambda text: text.split(","),
        metavar="A,B,...",
        help=f"what to compare with each other and with the control, of {', '.join(VARIANTS)}; default: all",
    )
    parser.add_argument(
        "--config",
        default="configs/ablation.py",
        metavar="FILE",
        help="its recipes are the stages (default: %(default)s)",
    )
    parser.add_argument("--cases", type=int, default=60, help="of each set of the evaluation (default: %(default)s)")
    parser.add_argument("--data", default="data/openmoji", metavar="DIR", help="the dataset (default: %(default)s)")
    return parser


def _seeds(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,1") from None


if __name__ == "__main__":
    main()
