"""Prepares data: the embedded dataset, or what the sources of a config hold.

    python -m mmcore_jax.prepare --dataset openmoji --output data/openmoji
    python -m mmcore_jax.prepare --config=configs/stage2.py [--show N] [--workers N] [--config.KEY=VALUE ...]

The second reads every example once as training would, keeps the index that training plans its rows by, and prints a
report.
"""

import argparse
import pathlib
from collections.abc import Sequence

from mmcore_jax import config as config_lib
from mmcore_jax.config import Config, UserError, door
from mmcore_jax.data import openmoji, scan, survey
from mmcore_jax.data.reader import Reader
from mmcore_jax.evaluation.sheet import sheet
from mmcore_jax.progress import progress

_PAGE_SIDE = 256  # pixels that an image takes on the contact sheet, at least


@door
def main(argv: Sequence[str]) -> None:
    """Reads the command line, builds or surveys, prints what there is."""
    parser = argparse.ArgumentParser(prog="python -m mmcore_jax.prepare", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dataset", choices=["openmoji"], default="openmoji", help="what to build (default: %(default)s)"
    )
    what.add_argument("--config", metavar="FILE[:RECIPE]", help="whose sources to index and to report on")
    parser.add_argument("--output", default="data/openmoji", metavar="DIR", help="of --dataset (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=64, metavar="PIXELS", help="of --dataset, edge of the images (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: this one)")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="draws N examples of each source as it is seen"
    )
    parser.add_argument(
        "--sheet", type=pathlib.Path, default="examples.png", metavar="PNG", help="where to (default: %(default)s)"
    )
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.config:
        _survey(config_lib.load(arguments.config, overrides), arguments)
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    else:
        _build(arguments)


def _build(arguments: argparse.Namespace) -> None:
    if arguments.size < 1:
        raise UserError(f"--size is {arguments.size}: an image needs at least one pixel.")
    done = openmoji.build(arguments.output, arguments.size, progress)
    print(f"{arguments.output} is ready." if done else f"{arguments.output} was already prepared; nothing to do.")
    _print_counts(openmoji.load_metadata(arguments.output))


def _survey(config: Config, arguments: argparse.Namespace) -> None:
    reader = Reader(config)
    scans = [scan.load(config, reader, number, progress, arguments.workers) for number in range(len(reader.sources))]
    for number, source in enumerate(reader.sources):
        found = survey.survey(config, reader, number, progress, arguments.workers)
        print(f"\n{source.name}: {len(source):,} records", *survey.lines(found), sep="\n  ")
    if config.data.layout == "interleaved":
        used = survey.utilisation(config, scans).items()
        print("\nshare of each budget that is used:", *(f"{name} {share:.1%}" for name, share in used), sep="\n  ")
    if arguments.show:
        _show(reader, scans, arguments.show, arguments.sheet)


def _show(reader: Reader, scans: list[scan.Scan], count: int, path: pathlib.Path) -> None:
    rows = []
    for number, indices in enumerate(found.usable for found in scans):
        for index in indices[:: max(1, len(indices) // count)][:count]:
            rows.append(survey.view(reader.prepare(number, int(index)), reader.tokenizer))
    largest = max(max(image.shape) for row in rows for image, _ in row)
    sheet(rows, max(1, _PAGE_SIDE // largest)).save(path)
    print(f"{path}: {len(rows)} examples")


def _print_counts(metadata: dict) -> None:
    print(f"{'task':<20}" + "".join(f"{split:>10}" for split in openmoji.SPLITS))
    for task, counts in metadata["counts"].items():
        print(f"{task:<20}" + "".join(f"{counts[split]:>10,}" for split in openmoji.SPLITS))
    print(metadata["attribution"])


if __name__ == "__main__":
    main()
