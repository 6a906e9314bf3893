"""Tries meshes, remat policies and rows a device for a recipe, each compiled in a process of its own."""

import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator

from mmcore_jax import sharding
from mmcore_jax.config import Config, Mesh, UserError
from mmcore_jax.planning import process
from mmcore_jax.planning.outcome import Outcome
from mmcore_jax.planning.program import LOCAL
from mmcore_jax.progress import progress

REMAT = ("full", "attention", "qkv", "dots", "none")  # each needs more memory than the one before
ROWS = (1, 2, 4, 8)  # of a device at once
TENSOR = (1, 2)
GROUPS = (1, 4, 16)  # copies of the parameters, along the data axis

Failure = tuple[str, str]


def search(config: Config, topology: str, slices: int) -> tuple[list[Outcome], list[Failure]]:
    """Evaluates every candidate that can still fit; returns outcomes, and (candidate, reason) of what does not compile.

    Raises:
      UserError: if not a single candidate compiles.
    """
    chips = device_count(config, topology, slices)
    outcomes, failures = [], []
    too_large: list[tuple] = []
    tried = list(candidates(config, chips, slices))
    if not tried:
        raise UserError(f"config.mesh.context {config.mesh.context} does not divide the {chips} chips of {topology}.")
    for candidate in progress(tried, len(tried), f"{config.stage} {config.recipe}"):
        mesh, remat, rows = candidate
        if any(not_smaller(candidate, smaller) for smaller in too_large):
            continue
        label = f"mesh {dataclasses.asdict(mesh)}, remat {remat}, {rows} rows a shard"
        try:
            outcome = process.run(with_candidate(config, *candidate), topology, slices, label)
        except UserError as error:
            failures.append((label, str(error)))
            too_large.append(candidate)
            continue
        outcomes.append(outcome)
        if not outcome.fits:
            too_large.append(candidate)
    if not outcomes:
        raise UserError(f"nothing compiles on {topology}: {failures[0][1]}")
    return outcomes, failures


def device_count(config: Config, topology: str, slices: int) -> int:
    """Chips of a topology: the product of the sizes in its name; of "local" what is here."""
    if topology != LOCAL:
        sizes = topology.partition(":")[2].split("x")
        if not all(size.isdigit() for size in sizes):
            raise UserError(f"--topology={topology} is not of the form v5e:16x16.")
        return slices * math.prod(map(int, sizes))
    # Counted in another process: one that has looked for a TPU keeps it from those that compile.
    command = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def candidates(config: Config, chips: int, slices: int) -> Iterator[tuple[Mesh, str, int]]:
    """Meshes of all chips, remat policies and rows a shard of the batch; of each mesh what needs least memory first."""
    for tensor, copies in itertools.product(TENSOR, GROUPS):
        data = copies * slices
        if chips % (data * tensor) or chips // (data * tensor) < 1:
            continue
        mesh = Mesh(data=data, fsdp=chips // (data * tensor), context=config.mesh.context, tensor=tensor)
        if mesh.fsdp % mesh.context == 0:
            yield from (
                (dataclasses.replace(mesh, fsdp=mesh.fsdp // mesh.context), *rest)
                for rest in itertools.product(REMAT, ROWS)
            )


def with_candidate(config: Config, mesh: Mesh, remat: str, rows: int) -> Config:
    """The config on another mesh; the batch follows from the rows."""
    shards = math.prod(getattr(mesh, axis) for axis in sharding.RULES["batch"])
    return dataclasses.replace(
        config,
        mesh=mesh,
        batch_size=rows * shards * config.optimizer.accumulation,
        execution=dataclasses.replace(config.execution, remat=remat),
    )


def not_smaller(candidate: tuple[Mesh, str, int], other: tuple[Mesh, str, int]) -> bool:
    """Whether a candidate needs at least the memory of another: the same mesh, no fewer rows, no more remat."""
    return candidate[0] == other[0] and REMAT.index(candidate[1]) >= REMAT.index(other[1]) and candidate[2] >= other[2]
