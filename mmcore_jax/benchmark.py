"""Measures our speed beside that of the published PyTorch implementation, by turns in one run.

    python -m mmcore_jax.benchmark step      # one training step: small MMDiT (SD3) and small VLM (Qwen2.5-VL)
    python -m mmcore_jax.benchmark sample    # the denoising loop with guidance

Both sides run on the CPU with the same weights, batch, dtype (float32) and number of threads; where what they compute
does not agree, no time is printed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
from collections.abc import Sequence

import jax
import numpy as np

from mmcore_jax.config import UserError, door

PACKAGES = ("jax", "torch", "diffusers", "transformers")
NETWORKS = {"step": ("mmdit", "vlm"), "sample": ("mmdit",)}


@door
def main(argv: Sequence[str]) -> None:
    """Reads the command line, measures, prints a table, writes JSON if asked to."""
    arguments = _parser().parse_args(argv)
    check(arguments)
    settle(arguments.threads)
    environment = describe(arguments.threads)
    comparisons = run(arguments)
    print(table(arguments.suite, environment, comparisons))
    if arguments.json:
        results = [comparison._asdict() | {"ratio": comparison.ratio} for comparison in comparisons]
        record = {"suite": arguments.suite, "environment": environment, "results": results}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def run(arguments: argparse.Namespace) -> list:
    """Measures the networks that are asked for."""
    from mmcore_jax.benchmarks import sample, step
    from mmcore_jax.benchmarks.networks import SIZES

    chosen = NETWORKS[arguments.suite] if arguments.model == "all" else (arguments.model,)
    if arguments.suite == "sample":
        return [sample.measure(SIZES[name], arguments.repeats, not arguments.eager) for name in chosen]
    return [step.measure(name, SIZES[name], arguments.repeats, not arguments.eager) for name in chosen]


def check(arguments: argparse.Namespace) -> None:
    """Raises `UserError`, before any work is done, for what cannot be measured."""
    for name in ("torch", "diffusers"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"the published networks need {name}: pip install 'mmcore_jax[bench]'.")
    if arguments.repeats < 1 or arguments.threads < 1:
        raise UserError("--repeats and --threads must be at least 1.")
    if arguments.model not in ("all", *NETWORKS[arguments.suite]):
        raise UserError(f"{arguments.suite} measures {' and '.join(NETWORKS[arguments.suite])}, not {arguments.model}.")
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: the directory {arguments.json.parent} does not exist.")


def settle(threads: int) -> None:
    """Puts both on the CPU with as many threads; XLA reads NPROC when it starts."""
    import torch

    jax.config.update("jax_platforms", "cpu")
    os.environ["NPROC"] = str(threads)
    torch.set_num_threads(threads)


def describe(threads: int) -> dict[str, str]:
    """What the figures depend on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    allocator = os.environ.get("GLIBC_TUNABLES", "not set")
    return {**versions, "threads": str(threads), "processor": _processor(), "GLIBC_TUNABLES": allocator}


def table(suite: str, environment: dict[str, str], comparisons: Sequence) -> str:
    """Formats medians and quartiles in seconds, and the ratio of medians."""
    from mmcore_jax.benchmarks.timing import COMPILED, EAGER, OURS

    columns = (OURS, EAGER, COMPILED)
    lines = [["", *columns, "ours / faster PyTorch", "difference"]]
    for comparison in comparisons:
        cells = [_cell(comparison, name) for name in columns]
        lines.append([comparison.network, *cells, f"{comparison.ratio:.2f}", f"{comparison.difference:.1e}"])
    widths = [max(map(len, column)) for column in zip(*lines)]
    repeats = len(comparisons[0].seconds[OURS])
    return "\n".join(
        [
            f"{suite}, float32: seconds, median of {repeats} [quartiles]; a ratio below 1 means that ours is faster",
            ", ".join(f"{name} {value}" for name, value in environment.items()),
            *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines),
        ]
    )


def _cell(comparison, name: str) -> str:
    if name in comparison.seconds:
        low, median, high = np.percentile(comparison.seconds[name], [25, 50, 75])
        return f"{median:.3f} [{low:.3f}, {high:.3f}]"
    return f"not available: {comparison.unavailable[name]}" if name in comparison.unavailable else "not run"


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcore_jax.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("suite", choices=list(NETWORKS))
    parser.add_argument("--model", choices=("mmdit", "vlm", "all"), default="all")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=_cores(), help="of both sides (default: all cores, %(default)s)")
    parser.add_argument("--eager", action="store_true", help="leave out torch.compile, which takes minutes to compile")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all times to FILE")
    return parser


if __name__ == "__main__":
    main()
