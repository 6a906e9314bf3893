"""Prepares data: the embedded dataset, or what the sources of a config hold.

    python -m mmcore_jax.prepare --dataset openmoji --output data/openmoji
    python -m mmcore_jax.prepare --index webdataset 'data/pairs/*.tar'
    python -m mmcore_jax.prepare --config=configs/stage2.py [--show N] [--output DIR --shards N]
    python -m mmcore_jax.prepare --config=configs/stage2.py --features [--part 0/16]

The second makes it possible to read tars at random. The third does that too, reads every example once as training
would, keeps the lengths that training plans its rows by, prints a report, and with `--output` writes native shards.
The fourth computes what frozen parts make of the examples, as `config.data.features` names it; machines can share it.
"""

import argparse
import functools
import pathlib
import re
from collections.abc import Sequence

import jax

from mmcore_jax import config as config_lib
from mmcore_jax import sharding
from mmcore_jax.config import Config, JsonLines, UserError, WebDataset, door
from mmcore_jax.data import openmoji, packing, scan, survey
from mmcore_jax.data.reader import Reader
from mmcore_jax.data.sources import index, native
from mmcore_jax.evaluation.sheet import sheet
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.progress import progress
from mmcore_jax.training.precompute import precompute
from mmcore_jax.training.state import freeze, make_plan
from mmcore_jax.training.weights import check_sources, initial_params

_PAGE_SIDE = 256  # pixels that an image takes on the contact sheet, at least
_INDEXED = {"webdataset": WebDataset, "json_lines": JsonLines}


@door
def main(argv: Sequence[str]) -> None:
    """Reads the command line, builds, indexes or surveys, prints what there is."""
    arguments, overrides = _parser().parse_known_args(argv)
    if overrides and not arguments.config:
        _parser().error(f"unrecognized arguments: {' '.join(overrides)}")
    if arguments.features and not arguments.config:
        _parser().error("--features needs --config")
    for name in ("size", "workers", "shards"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}, expected at least 1.")
    if arguments.features:
        _precompute(config_lib.load(arguments.config, overrides), arguments.part)
    elif arguments.config:
        _survey(config_lib.load(arguments.config, overrides), arguments)
    elif arguments.index:
        _index(*arguments.index, arguments.workers)
    else:
        _build(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcore_jax.prepare", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dataset", choices=["openmoji"], default="openmoji", help="builds it (default: %(default)s)")
    what.add_argument("--index", nargs=2, metavar=("KIND", "SHARDS"), help=f"indexes shards of {', '.join(_INDEXED)}")
    what.add_argument("--config", metavar="FILE[:RECIPE]", help="reports on its sources, and indexes them")
    parser.add_argument("--output", metavar="DIR", help="where to write the dataset, or native shards of the sources")
    parser.add_argument(
        "--shards", type=int, default=1, metavar="N", help="of a source in --output (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=int, default=64, metavar="PIXELS", help="edge of the images of --dataset (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--features", action="store_true", help="computes the features that --config asks for")
    parser.add_argument(
        "--part", type=_part, default=(0, 1), metavar="I/N", help="of --features: every N-th file from the I-th on"
    )
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="draws N examples of each source as it is seen"
    )
    parser.add_argument(
        "--sheet", type=pathlib.Path, default="examples.png", metavar="PNG", help="where to (default: %(default)s)"
    )
    return parser


def _index(kind: str, shards: str, workers: int) -> None:
    if kind not in _INDEXED:
        raise UserError(f"--index {kind}: shards of {' or '.join(_INDEXED)} need an index, others do not.")
    extra = {"images": "."} if kind == "json_lines" else {}
    settings = _INDEXED[kind](kind=kind, shards=shards, weight=1.0, **extra)
    print(f"{index.build_indexes(kind, settings, progress, workers)} shards indexed.")


def _build(arguments: argparse.Namespace) -> None:
    output = arguments.output or f"data/{arguments.dataset}"
    done = openmoji.build(output, arguments.size, progress)
    print(f"{output} is ready." if done else f"{output} was already prepared; nothing to do.")
    _print_counts(openmoji.load_metadata(output))


def _survey(config: Config, arguments: argparse.Namespace) -> None:
    for name, source in config.data.sources.items():
        index.build_indexes(name, source, progress, arguments.workers)
    reader = Reader(config)
    scans = [scan.load(config, reader, number, progress, arguments.workers) for number in range(len(reader.sources))]
    for number, source in enumerate(reader.sources):
        found = survey.survey(reader, number, progress, arguments.workers)
        report = survey.lines(found) + survey.bucket_lines(reader, scans[number])
        print(f"\n{source.name}: {len(source):,} records", *report, sep="\n  ")
    if config.data.layout == "interleaved":
        used = survey.utilisation(config, scans).items()
        print("\nshare of each budget that is used:", *(f"{name} {share:.1%}" for name, share in used), sep="\n  ")
    if arguments.show:
        _show(reader, scans, arguments.show, arguments.sheet)
    if arguments.output:
        for source in reader.sources:
            made = native.convert(source, arguments.output, arguments.shards, progress, arguments.workers)
            print(
                f"{arguments.output}: {made.examples:,} examples of {source.name}, {sum(made.bad.values()):,} left out"
            )


def _part(text: str) -> tuple[int, int]:
    """`I/N`, 0 <= I < N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(match[1]), int(match[2])


def _precompute(config: Config, part: tuple[int, int]) -> None:
    if not config.data.features:
        raise UserError(
            f"config.data.features of {config.stage} {config.recipe} is empty: name what is to be computed."
        )
    check_sources(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, 1, mesh)
    jax.set_mesh(mesh)
    model, example = MMCORE(config.model, config.execution), packing.placeholder(config, config.batch_size)
    plan = make_plan(config, model, mesh, example)
    frozen = freeze(config, plan, initial_params(config, model, plan, example, plan.frozen))
    for kind, made_by in precompute(config, model, plan, frozen, mesh, progress, part).items():
        print(f"{config.data.index}: {kind} by the weights {made_by}")


def _show(reader: Reader, scans: list[scan.Scan], count: int, path: pathlib.Path) -> None:
    rows = []
    for number, found in enumerate(scans):
        chosen = found.some(count, functools.partial(reader.prepare, number))
        rows += [survey.view(prepared, reader.tokenizer) for prepared in chosen]
    largest = max((max(image.shape) for row in rows for image, _ in row), default=1)
    sheet(rows, max(1, _PAGE_SIDE // largest)).save(path)
    print(f"{path}: {len(rows)} examples")


def _print_counts(metadata: dict) -> None:
    print(f"{'task':<20}" + "".join(f"{split:>10}" for split in openmoji.SPLITS))
    for task, counts in metadata["counts"].items():
        print(f"{task:<20}" + "".join(f"{counts[split]:>10,}" for split in openmoji.SPLITS))
    print(metadata["attribution"])


if __name__ == "__main__":
    main()
