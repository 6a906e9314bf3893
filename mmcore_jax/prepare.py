"""Makes a dataset: `python -m mmcore_jax.prepare --dataset openmoji --output data/openmoji`."""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm

from mmcore_jax.config import UserError, door
from mmcore_jax.data import openmoji

_SECONDS_BETWEEN_LINES = 5.0


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mmcore_jax.prepare", description="Prepares a dataset as native shards."
    )
    parser.add_argument(
        "--dataset", choices=["openmoji"], default="openmoji", help="what to prepare (default: %(default)s)"
    )
    parser.add_argument("--output", default="data/openmoji", metavar="DIR", help="where to (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=64, metavar="PIXELS", help="edge of the images (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.size < 1:
        raise UserError(f"--size is {arguments.size}: an image needs at least one pixel.")
    done = openmoji.build(arguments.output, arguments.size, _progress)
    print(f"{arguments.output} is ready." if done else f"{arguments.output} was already prepared; nothing to do.")
    _print_counts(openmoji.load_metadata(arguments.output))


def _progress(items: Iterable, total: int, label: str) -> Iterable:
    if sys.stderr.isatty():
        return tqdm(items, label, total, mininterval=0.2)
    return _plain_lines(items, total, label)


def _plain_lines(items: Iterable, total: int, label: str) -> Iterator:
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if done == total or time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)
            last = time.monotonic()


def _print_counts(metadata: dict) -> None:
    print(f"{'task':<20}" + "".join(f"{split:>10}" for split in openmoji.SPLITS))
    for task, counts in metadata["counts"].items():
        print(f"{task:<20}" + "".join(f"{counts[split]:>10,}" for split in openmoji.SPLITS))
    print(metadata["attribution"])


if __name__ == "__main__":
    door(main)()
