"""What a recipe needs on some devices, and how long a step will take: compiled, measured and predicted."""

import dataclasses
import math
import os
import re
import time
from typing import Any

import jax

from mmcore_jax import sharding
from mmcore_jax.config import Config, UserError
from mmcore_jax.data import geometry
from mmcore_jax.nn.masks import PAD
from mmcore_jax.planning import hlo
from mmcore_jax.planning.kernels import Kernels, kernels
from mmcore_jax.planning.predict import Prediction, chip_of, links, predict
from mmcore_jax.planning.program import Program, devices, full_row, program
from mmcore_jax.training.flops import peak_flops, step_flops

PACKAGE = "mmcore_jax"
TEMPORARIES = 5
# An array that collectives make whole on every device is worth a warning from this share of its memory on.
LARGE_SHARE = 1 / 64
GIB = 1 << 30


@dataclasses.dataclass
class Transfer:
    """Collectives of one kind along the same mesh axes: how many in a step, bytes, seconds, and those waited for."""

    kind: str
    axes: str
    count: int
    bytes: float
    seconds: float
    exposed: float


@dataclasses.dataclass
class Large:
    """An array that takes much of a device's memory: its bytes, what it is, and the line that made it."""

    bytes: float
    kind: str
    where: str


@dataclasses.dataclass
class Outcome:
    """A recipe on some devices. Bytes are of one device, FLOPs of the whole step but for `compiled_flops`.

    `seconds` is None where the time cannot be predicted, `capacity` where the memory of the device is not known;
    `rows` counts what a step of full rows holds.
    """

    recipe: str
    topology: str
    device: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    total_steps: int
    memory: dict[str, float]
    needed: float
    capacity: float | None
    model_flops: dict[str, float]
    rows: dict[str, int]
    peak: float | None
    seconds: float | None = None
    kinds: dict[str, float] = dataclasses.field(default_factory=dict)
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    cycles: float = 0.0
    compiled_flops: float = 0.0
    transfers: list[Transfer] = dataclasses.field(default_factory=list)
    temporaries: list[Large] = dataclasses.field(default_factory=list)
    replicated: list[Large] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    advice: list[str] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.needed <= self.capacity

    @property
    def mfu(self) -> float | None:
        """Share of the peak that model FLOPs take."""
        return self.seconds and self.peak and self.model_flops["total"] / self.seconds / self.chips / self.peak

    @property
    def days(self) -> float | None:
        """Of the recipe's `total_steps`, at the predicted speed."""
        return self.seconds and self.seconds * self.total_steps / 86400

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        derived = {"fits": self.fits, "mfu": self.mfu, "days": self.days}
        return dataclasses.asdict(self) | derived | {"chip_hours": self.days and 24 * self.days * self.chips}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Outcome":
        """The inverse of `dataclasses.asdict`."""
        nested = {"transfers": Transfer, "temporaries": Large, "replicated": Large}
        return cls(**fields | {name: [kind(**item) for item in fields[name]] for name, kind in nested.items()})


def evaluate(config: Config, topology: str, slices: int = 1) -> Outcome:
    """Compiles the step of a run and says what it takes.

    Raises:
      UserError: if the topology is unknown, the mesh or the batch does not fit it, or the compiler gives up.
    """
    made = program(config, devices(topology, slices))
    outcome = _prepare(config, made, topology, slices)
    begin = time.monotonic()
    try:
        compiled = made.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _out_of_memory(outcome, str(error))
    else:
        _read_memory(outcome, compiled.memory_analysis())
        _read_program(outcome, made, compiled, kernels(config, full_row(config)))
    outcome.compile_seconds = time.monotonic() - begin
    outcome.advice = advice(config, outcome, slices)
    if geometry.one_bucket(config):
        outcome.notes.append("the autoencoder runs before the step, a program for each aspect ratio: not counted here")
    return outcome


def _prepare(config: Config, made: Program, topology: str, slices: int) -> Outcome:
    device, row = made.mesh.devices.flat[0], full_row(config)
    flops = {part: config.batch_size * count for part, count in step_flops(config, made.plan, row).items()}
    memory = _argument_bytes(made)
    return Outcome(
        recipe=f"{config.stage} {config.recipe}",
        topology=topology if slices == 1 else f"{slices} x {topology}",
        device=device.device_kind,
        chips=made.mesh.size,
        mesh={name: size for name, size in made.mesh.shape.items() if size > 1},
        batch_size=config.batch_size,
        remat=config.execution.remat,
        total_steps=config.total_steps,
        memory=memory,
        needed=sum(memory.values()),
        capacity=_capacity(device, made.mesh.size),
        model_flops=flops,
        rows={name: config.batch_size * count for name, count in _row_counts(row).items()},
        peak=peak_flops(device),
        replicated=_replicated(made),
    )


def _row_counts(row: Any) -> dict[str, int]:
    if not hasattr(row, "tokens"):
        return {"images": 1, "text tokens": int(row.valid.sum())}
    diffusion = row.diffusion.context_meta.kind.size + row.diffusion.latent_meta.kind.size
    tokens = int((row.tokens.meta.kind != PAD).sum())
    return {"generated images": int(row.images.generated.sum()), "VLM tokens": tokens, "diffusion tokens": diffusion}


# --- Memory -----------------------------------------------------------------------------------------------------------


def _argument_bytes(made: Program) -> dict[str, float]:
    """Bytes of one device by what they are, without the padding of tiles."""
    state, constants, batch = made.arguments
    kinds = {
        "parameters": state.params,
        "moments": state.opt_state,
        "EMA": state.ema,
        "frozen": constants,
        "batch": batch,
    }
    return {name: float(sum(map(_shard_bytes, jax.tree.leaves(tree)))) for name, tree in kinds.items()}


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _replicated(made: Program) -> list[Large]:
    """Large arrays of the state and of the constants that every device holds whole."""
    if made.mesh.size == made.mesh.shape["data"]:
        return []
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(made.arguments[:2]):
        if leaf.size >= sharding.LARGE and leaf.sharding.is_fully_replicated:
            name = next(key.key for key in reversed(path) if hasattr(key, "key"))
            found.append(Large(_shard_bytes(leaf), f"{leaf.dtype}{list(leaf.shape)}", name))
    return sorted(found, key=lambda large: -large.bytes)


def _capacity(device: jax.Device, count: int) -> float | None:
    """Bytes that programs may use; emulated devices share the memory of the machine."""
    chip = chip_of(device)
    if chip:
        return chip.memory
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    return (device.memory_stats() or {}).get("bytes_limit")


def _read_memory(outcome: Outcome, stats: Any) -> None:
    known = sum(outcome.memory.values())
    outcome.memory["padding"] = max(0.0, stats.argument_size_in_bytes - known)
    outcome.memory["results"] = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    outcome.memory["activations, temporaries"] = stats.temp_size_in_bytes
    outcome.memory["program"] = stats.generated_code_size_in_bytes
    outcome.needed = sum(outcome.memory.values())


_SIZE = r"([\d.]+)([KMGT]?)B?"


def _out_of_memory(outcome: Outcome, message: str) -> None:
    """What the compiler says of a program that does not fit: how much it takes, and its largest arrays."""
    used = re.search(rf"Used {_SIZE} of {_SIZE} hbm", message)
    alone = re.search(rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)", message)
    if used:
        outcome.memory["activations, temporaries"] = max(0.0, _bytes(used[1], used[2]) - outcome.needed)
    elif alone:
        outcome.memory["activations, temporaries"] = _bytes(alone[1], alone[2])
    else:
        first = message.split("\n")[0]
        raise UserError(f"the step does not compile, and the compiler does not say how much is missing: {first}")
    outcome.needed = sum(outcome.memory.values())
    if outcome.capacity:  # the compiler rounds, and may have less to give
        outcome.needed = max(outcome.needed, math.nextafter(outcome.capacity, math.inf))
    for part in re.split(r"\n\s*\d+\. ", message)[1:]:
        size, kind = re.search(rf"Size: {_SIZE}", part), re.search(r"Shape: (\S+)", part)
        operator = re.search(r'op_name="([^"]*)"', part)
        if size and kind and operator:
            file, line = re.search(r'source_file="([^"]*)"', part), re.search(r"source_line=(\d+)", part)
            where = f"{file[1][max(0, file[1].rfind(f'{PACKAGE}/')) :]}:{line[1]}" if file and line else operator[1]
            outcome.temporaries.append(Large(_bytes(size[1], size[2]), kind[1].split("{")[0], where))
    del outcome.temporaries[TEMPORARIES:]


def _bytes(number: str, unit: str) -> float:
    return float(number) * 1024 ** " KMGT".index(unit or " ")


# --- The compiled program ---------------------------------------------------------------------------------------------


def _read_program(outcome: Outcome, made: Program, compiled: Any, kernels: Kernels) -> None:
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        outcome.notes.append(f"the compiler does not print this program, so its time is unknown: {_first_line(error)}")
        return
    module, wired = hlo.parse(text), links(made.mesh)
    found = predict(module, dict(made.mesh.shape), wired, kernels)
    outcome.cycles, outcome.compiled_flops = found.cycles, found.flops
    outcome.transfers = _transfers(found)
    outcome.temporaries = [Large(*item) for item in hlo.largest(module, PACKAGE, TEMPORARIES)]
    if outcome.capacity:
        outcome.replicated += _gathered(module, outcome)
    if wired:
        outcome.seconds, outcome.kinds, outcome.parts = found.seconds, dict(found.kinds), dict(found.parts)
        outcome.kinds["exposed transfers"] = sum(transfer.exposed for transfer in outcome.transfers)
    if found.kernels:
        names = ", ".join(f"{name} ({count})" for name, count in found.kernels.items())
        outcome.notes.append(f"kernels whose time is not known and not counted: {names}")


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _transfers(found: Prediction) -> list[Transfer]:
    listed = [
        Transfer(kind, " x ".join(axes) or "none", entry.count, entry.bytes, entry.seconds, entry.exposed)
        for (kind, axes), entry in found.transfers.items()
    ]
    return sorted(listed, key=lambda transfer: -transfer.bytes)


def _gathered(module: hlo.Module, outcome: Outcome) -> list[Large]:
    """Large arrays that a gather makes whole on every device."""
    found = {}
    for name, line, _ in hlo.executed(module):
        transfer = hlo.collective(module, name, line)
        if transfer and transfer.kind == "all-gather" and transfer.bytes > LARGE_SHARE * outcome.capacity:
            where = hlo.source(module, line, PACKAGE) or line.op_name or line.name
            found[where] = Large(transfer.bytes, "an all-gather", where)
    return sorted(found.values(), key=lambda large: -large.bytes)


# --- What to change ---------------------------------------------------------------------------------------------------


def advice(config: Config, outcome: Outcome, slices: int = 1) -> list[str]:
    """What makes a program smaller that does not fit, what helps most and costs least first; none for one that fits."""
    if outcome.fits:
        return []
    rows = config.batch_size / config.optimizer.accumulation / _shards(outcome)
    held = sum(outcome.memory[name] for name in ("parameters", "moments", "EMA", "frozen"))
    given, made_by = config.data.features, {"latents": "autoencoder", "targets": "vision_target"}
    changes = []
    if config.execution.remat != "full":
        changes.append("--config.execution.remat=full")
    if config.execution.attention == "dense":
        changes.append("--config.execution.attention=blockwise")
    if rows > 1:
        changes.append(
            f"--config.optimizer.accumulation={config.optimizer.accumulation * math.ceil(rows)}: one row a device at "
            f"once instead of {rows:.0f}, at the same batch size"
        )
    more = [kind for kind, part in made_by.items() if kind not in given and outcome.model_flops.get(part)]
    if more:
        parts = " and ".join(made_by[kind] for kind in more)
        changes.append(f'"--config.data.features={(*given, *more)!r}": what {parts} make is made once, beforehand')
    if outcome.mesh.get("data", 1) > slices:
        changes.append("config.mesh.data smaller and config.mesh.fsdp larger: parameters and moments in more pieces")
    if held > outcome.capacity / 2:
        changes.append(f"more devices: {held / GIB:.1f} GiB of each hold parameters, moments, EMA and frozen weights")
    if rows <= 1:
        changes.append("--config.mesh.context=2 (or tensor=2) and half of config.batch_size: two devices share a row")
        changes.append("smaller config.data.budgets: a row is the least that a device works on")
    return changes


def _shards(outcome: Outcome) -> int:
    return math.prod(outcome.mesh.get(axis, 1) for axis in sharding.RULES["batch"])
