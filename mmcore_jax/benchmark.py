"""Measures our speed beside that of what others use, by turns in one run.

    python -m mmcore_jax.benchmark step      # one training step: small MMDiT (SD3) and small VLM (Qwen2.5-VL)
    python -m mmcore_jax.benchmark sample    # the denoising loop with guidance
    python -m mmcore_jax.benchmark data      # examples from shards to batches

Networks are compared with the published PyTorch implementation, both on the CPU with the same weights, batch, dtype
(float32) and threads; the data pipeline with webdataset and Hugging Face datasets, with as many workers. Where what
they compute does not agree, no time is printed.
"""

import argparse
import dataclasses
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

NETWORKS = {"step": ("mmdit", "vlm"), "sample": ("mmdit",), "data": ()}
# By suite: packages whose versions matter, those that only the benchmark needs first, and the rounds that count.
PACKAGES = dict.fromkeys(("step", "sample"), ("torch", "diffusers", "transformers", "jax"))
PACKAGES |= {"data": ("torch", "webdataset", "datasets", "matplotlib", "pillow", "grain", "transformers")}
EXTRA = {"step": 2, "sample": 2, "data": 4}
REPEATS = {"step": 15, "sample": 15, "data": 5}


@door
def main(argv: Sequence[str]) -> None:
    """Reads the command line, measures, prints a table, writes JSON if asked to."""
    arguments = _parser().parse_args(argv)
    suite = arguments.suite
    if arguments.repeats is None:
        arguments.repeats = REPEATS[suite]
    check(arguments)
    settle(arguments.threads)
    environment = describe(suite, arguments.threads)
    measured = run_data(arguments) if suite == "data" else run(arguments)
    title, lines = data_table(measured[0]) if suite == "data" else network_table(suite, measured)
    print(layout(title, environment, lines))
    if arguments.json:
        record = {"suite": suite, "environment": environment, "results": [one.record() for one in measured]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def run(arguments: argparse.Namespace) -> list:
    """Measures the networks that are asked for."""
    from mmcore_jax.benchmarks import sample, step
    from mmcore_jax.benchmarks.networks import SIZES

    chosen = NETWORKS[arguments.suite] if arguments.model == "all" else (arguments.model,)
    if arguments.suite == "sample":
        return [sample.measure(SIZES[name], arguments.repeats, not arguments.eager) for name in chosen]
    return [step.measure(name, SIZES[name], arguments.repeats, not arguments.eager) for name in chosen]


def run_data(arguments: argparse.Namespace) -> list:
    """Measures the data pipeline."""
    from mmcore_jax.benchmarks import data

    sizes = data.SIZES
    if arguments.examples:
        sizes = dataclasses.replace(sizes, examples=arguments.examples)
    return [data.measure(sizes, arguments.repeats, arguments.threads)]


def check(arguments: argparse.Namespace) -> None:
    """Raises `UserError`, before any work is done, for what cannot be measured."""
    for name in PACKAGES[arguments.suite][: EXTRA[arguments.suite]]:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"what ours is compared with needs {name}: pip install 'mmcore_jax[bench]'.")
    if arguments.repeats < 1 or arguments.threads < 1:
        raise UserError("--repeats and --threads must be at least 1.")
    if arguments.model not in ("all", *NETWORKS[arguments.suite]):
        known = " and ".join(NETWORKS[arguments.suite]) or "no network"
        raise UserError(f"{arguments.suite} measures {known}, not {arguments.model}.")
    if arguments.examples is not None and (arguments.suite != "data" or arguments.examples < arguments.threads):
        raise UserError("--examples is a setting of the suite data, and must be at least --threads, one for each.")
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: the directory {arguments.json.parent} does not exist.")


def settle(threads: int) -> None:
    """Puts both on the CPU with as many threads; XLA reads NPROC when it starts."""
    import torch

    jax.config.update("jax_platforms", "cpu")
    os.environ["NPROC"] = str(threads)
    torch.set_num_threads(threads)


def describe(suite: str, threads: int) -> dict[str, str]:
    """What the figures depend on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES[suite]}
    allocator = os.environ.get("GLIBC_TUNABLES", "not set")
    return {**versions, "threads": str(threads), "processor": _processor(), "GLIBC_TUNABLES": allocator}


def network_table(suite: str, comparisons: Sequence) -> tuple[str, list[list[str]]]:
    """A title and cells: medians and quartiles in seconds, and the ratio of medians."""
    from mmcore_jax.benchmarks.timing import COMPILED, EAGER, OURS

    columns = (OURS, EAGER, COMPILED)
    lines = [["", *columns, "ours / faster PyTorch", "difference"]]
    for comparison in comparisons:
        cells = [_cell(comparison, name) for name in columns]
        lines.append([comparison.network, *cells, f"{comparison.ratio:.2f}", f"{comparison.difference:.1e}"])
    repeats = len(comparisons[0].seconds[OURS])
    title = f"{suite}, float32: seconds, median of {repeats} [quartiles]; a ratio below 1 means that ours is faster"
    return title, lines


def data_table(measured) -> tuple[str, list[list[str]]]:
    """A title and cells: rates, ours beside each other one, opening, CPU time, and what of a batch is no padding."""
    from mmcore_jax.benchmarks.timing import CEILING, OURS

    columns = ("examples/s per core", "ours / this", "first batch, s", "CPU ms an example")
    lines = [["", *columns, "VLM tokens used", "diffusion tokens used"]]
    for name in measured.comparison.seconds:
        ratio = np.median(measured.rates(OURS)) / np.median(measured.rates(name))
        used = ["", ""] if name == CEILING else [f"{share:.1%}" for share in measured.used[name].values()]
        first = "" if name == CEILING else f"{np.median(measured.times(name, 'opening')):.2f}"
        cpu = f"{1e3 * np.median(measured.times(name, 'cpu')):.2f}"
        lines.append([name, _quartiles(measured.rates(name), 1), f"{ratio:.2f}", first, cpu, *used])
    repeats = len(measured.comparison.seconds[OURS])
    title = f"data, {measured.examples} examples a pass, {measured.workers} workers: median of {repeats} [quartiles]"
    return title, lines


def layout(title: str, environment: dict[str, str], lines: list[list[str]]) -> str:
    """Puts cells below each other."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n".join([title, ", ".join(f"{name} {value}" for name, value in environment.items()), *rows])


def _cell(comparison, name: str) -> str:
    if name in comparison.seconds:
        return _quartiles(comparison.seconds[name], 3)
    return f"not available: {comparison.unavailable[name]}" if name in comparison.unavailable else "not run"


def _quartiles(values: Sequence[float], digits: int) -> str:
    low, median, high = np.percentile(values, [25, 50, 75])
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


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
    parser.add_argument("--repeats", type=int, help="rounds that count (default: 15, of data 5)")
    parser.add_argument("--examples", type=int, help="of data: how many a pass reads (default: 2000)")
    parser.add_argument("--threads", type=int, default=_cores(), help="of both sides (default: all cores, %(default)s)")
    parser.add_argument("--eager", action="store_true", help="leave out torch.compile, which takes minutes to compile")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all times to FILE")
    return parser


if __name__ == "__main__":
    main()
