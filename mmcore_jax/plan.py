"""Says what a recipe needs on devices that need not be there, and how long it would take.

    python -m mmcore_jax.plan --config=configs/stage2.py:RECIPE --topology=v5e:16x16 [--slices 2] [--json FILE]
    python -m mmcore_jax.plan --config=configs/stage2.py:RECIPE --topology=v5e:16x16 --search
    python -m mmcore_jax.plan --config=configs/stage2.py --topology=local

The step that `train` runs is compiled ahead of time and its program is read: memory, FLOPs, collectives, time. For TPUs
(v5e, v5p, v6e) that takes no TPU, but libtpu.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

from mmcore_jax import config as config_lib
from mmcore_jax.config import UserError, door
from mmcore_jax.planning import process, search
from mmcore_jax.planning.program import LOCAL
from mmcore_jax.planning.report import ranking, report


@door
def main(argv: Sequence[str]) -> int:
    """Reads the command line, compiles, prints; returns 1 where nothing fits."""
    arguments, overrides = _parser().parse_known_args(argv)
    config = config_lib.load(arguments.config, overrides)
    if arguments.slices < 1 or (arguments.slices > 1 and arguments.topology == LOCAL):
        raise UserError(f"--slices is {arguments.slices}, expected at least 1, and more only of a TPU topology.")
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: the directory {arguments.json.parent} does not exist.")
    failures: list[search.Failure] = []
    if arguments.search:
        outcomes, failures = search.search(config, arguments.topology, arguments.slices)
        print(ranking(outcomes, failures))
    else:
        label = f"{config.stage} {config.recipe}"
        outcomes = [process.run(config, arguments.topology, arguments.slices, label)]
        print(report(outcomes[0]))
    if arguments.json:
        records = [outcome.record() for outcome in outcomes]
        told = [{"candidate": candidate, "reason": reason} for candidate, reason in failures]
        record = {"outcomes": records, "failures": told} if arguments.search else records[0]
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if any(outcome.fits for outcome in outcomes) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcore_jax.plan", description=__doc__.split("\n")[0])
    config_lib.add_arguments(parser)
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="for example v5e:16x16, v5p:4x4x8, v6e:8x8; or local"
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices of it (default: %(default)s)")
    parser.add_argument("--search", action="store_true", help="tries meshes, remat policies and rows a chip, and ranks")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="writes everything to FILE")
    return parser


if __name__ == "__main__":
    main()
