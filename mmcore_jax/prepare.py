"""Makes a dataset: `python -m mmcore_jax.prepare --dataset openmoji --output data/openmoji`."""

import argparse
from collections.abc import Sequence

from mmcore_jax.config import UserError, door
from mmcore_jax.data import openmoji
from mmcore_jax.progress import progress


@door
def main(argv: Sequence[str]) -> None:
    """Reads the command line, builds unless that is done, prints what there is."""
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
    done = openmoji.build(arguments.output, arguments.size, progress)
    print(f"{arguments.output} is ready." if done else f"{arguments.output} was already prepared; nothing to do.")
    _print_counts(openmoji.load_metadata(arguments.output))


def _print_counts(metadata: dict) -> None:
    print(f"{'task':<20}" + "".join(f"{split:>10}" for split in openmoji.SPLITS))
    for task, counts in metadata["counts"].items():
        print(f"{task:<20}" + "".join(f"{counts[split]:>10,}" for split in openmoji.SPLITS))
    print(metadata["attribution"])


if __name__ == "__main__":
    main()
