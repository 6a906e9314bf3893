"""Predicts the time of a step from its compiled module, for TPUs: what the compiler estimates, corrected.

The compiler's estimate of cycles leaves out transfers between devices, kernels and asynchronous copies, is too high for
what memory bounds, and a little too high for matrix products. So each product takes at least what the chip's peak
allows, everything at least what its memory allows, and transfers run beside the computation, in one queue within a
slice and one between slices: what is waited for is exposed. Where the figures come from: Google's tables of the chips,
and training runs that others have published, of which the predicted MFU was between 6% too low and 5% too high for
language models.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import numpy as np

from mmcore_jax.planning import hlo
from mmcore_jax.planning.hlo import Collective, Instruction, Module
from mmcore_jax.planning.kernels import Kernels
from mmcore_jax.training.flops import peak_flops

ESTIMATE_OF_PRODUCTS, ESTIMATE_OF_OTHERS = 0.85, 0.35  # share of the compiler's estimate that is taken
REACHED_PEAK, REACHED_BANDWIDTH, REACHED_LINKS = 0.95, 0.8, 0.9  # share of the chip's figures that is reached
GIB = 1 << 30
_PART = re.compile(r"/(vlm[.\w]*/vision|vlm|queries|connector|vision_target|conditioning|frames|dit|autoencoder)\b")
_LIBRARIES = ("__cublas", "__cudnn")  # of GPUs: products that the module does not show
REST, NONE = "the rest", Kernels()
HOP = 1e-6  # seconds from a chip to the next


@dataclasses.dataclass(frozen=True)
class Chip:
    """Bytes of memory that programs may use, and what a chip does in a second.

    Bytes from memory, bytes to other chips (`links`) and to other slices (`network`), cycles. The links form a torus of
    `torus` axes; one that is not a multiple of `wraps` chips long is a line, and of three axes so are the others. Its
    FLOPs are in `training/flops.py`.
    """

    memory: float
    bandwidth: float
    links: float
    network: float
    clock: float
    torus: int
    wraps: int


# By a prefix of `device_kind`: the first that matches.
CHIPS = {
    "TPU v5 lite": Chip(15.75 * GIB, 819e9, 200e9, 3.125e9, 1.5e9, torus=2, wraps=16),
    "TPU v5": Chip(95.74 * GIB, 2765e9, 600e9, 6.25e9, 1.75e9, torus=3, wraps=4),
    "TPU v6": Chip(31.25 * GIB, 1640e9, 448e9, 12.5e9, 1.75e9, torus=2, wraps=16),
}


def chip_of(device: jax.Device) -> Chip | None:
    """The figures of a device, None where they are not known."""
    return next((chip for prefix, chip in CHIPS.items() if device.device_kind.startswith(prefix)), None)


@dataclasses.dataclass(frozen=True)
class Links:
    """The devices in the order of the partitions, and where each is: its slice, and its coordinates there."""

    chip: Chip
    peak: float
    places: np.ndarray  # [devices, 1 + torus axes]

    def seconds(self, transfer: Collective) -> float:
        """How long a transfer takes, alone."""
        group = transfer.group or range(len(self.places))
        spans = [np.unique(along) for along in self.places[list(group)].T]
        slices, *along = (span.size for span in spans)
        axes = [
            (span.size, REACHED_LINKS * self._bandwidth(axis, span))
            for axis, span in enumerate(spans[1:])
            if span.size > 1
        ]
        inside = math.prod(along)
        seconds = HOP * sum(size // 2 for size in along)
        if transfer.kind == "all-to-all":  # what stands in the way is half of the longest axis
            seconds += max((transfer.bytes * max(1, size / 4) / bandwidth for size, bandwidth in axes), default=0.0)
        elif axes:
            seconds += _moved(transfer, inside) / sum(bandwidth for _, bandwidth in axes)
        if slices > 1:
            shared = 1 if transfer.kind in ("all-to-all", "collective-permute") else inside
            seconds += _moved(transfer, slices) / shared / (REACHED_LINKS * self.chip.network)
        return seconds

    def _bandwidth(self, axis: int, span: np.ndarray) -> float:
        """Bytes a second among chips at the places `span`, evenly spaced, along an axis of the torus.

        A ring has twice that of a line. Where other groups lie in between, they share the links.
        """
        sizes = [np.unique(along).size for along in self.places[:, 1:].T]
        stride = int(span[1] - span[0])
        # A slice of cubes has rings along all axes or none.
        needed = sizes if self.chip.torus == 3 else [sizes[axis]]
        ring = span.size * stride == sizes[axis] and all(each % self.chip.wraps == 0 for each in needed)
        return self.chip.links / self.chip.torus / (1 if ring else 2) / stride


def links(mesh: jax.sharding.Mesh) -> Links | None:
    """The links between the devices of a mesh, None where the chip is not known."""
    devices = list(mesh.devices.flat)
    chip = chip_of(devices[0])
    if chip is None:
        return None
    places = np.array([(getattr(device, "slice_index", 0), *device.coords[: chip.torus]) for device in devices])
    return Links(chip, peak_flops(devices[0]), places)


def _moved(transfer: Collective, devices: int) -> float:
    """Bytes through the links of a device, where `devices` share the transfer."""
    if transfer.kind == "collective-permute":
        return transfer.bytes
    once = transfer.bytes * (devices - 1) / devices
    return 2 * once if transfer.kind == "all-reduce" else once


@dataclasses.dataclass
class Transfers:
    """All transfers of a kind along the same mesh axes, in a step: seconds, and those of them that are waited for."""

    count: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0


@dataclasses.dataclass
class Prediction:
    """A step, or some of it: `seconds` and `cycles` in all, FLOPs that really run.

    Of `seconds`, what is computed is listed by `kinds` of work and by `parts` of the model.
    """

    seconds: float = 0.0
    cycles: float = 0.0
    flops: float = 0.0
    kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    parts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    transfers: dict[tuple[str, tuple[str, ...]], Transfers] = dataclasses.field(default_factory=dict)
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # of unknown time

    def include(self, other: "Prediction", times: int) -> None:
        """Adds what runs `times` times."""
        self.cycles += times * other.cycles
        self.flops += times * other.flops
        for mine, theirs in zip((self.kinds, self.parts, self.kernels), (other.kinds, other.parts, other.kernels)):
            for name, value in theirs.items():
                mine[name] += times * value
        for key, found in other.transfers.items():
            total = self.transfers.setdefault(key, Transfers())
            for field in dataclasses.fields(Transfers):
                setattr(total, field.name, getattr(total, field.name) + times * getattr(found, field.name))


def predict(module: Module, mesh: dict[str, int], links: Links | None, kernels: Kernels = NONE) -> Prediction:
    """Runs through a program in its order. Without `links`, FLOPs, cycles and transfers are counted, not timed."""
    return _run(module, module.entry, REST, mesh, links, kernels)


def _run(
    module: Module, name: str, part: str, mesh: dict[str, int], links: Links | None, kernels: Kernels
) -> Prediction:
    """Runs through a computation, which belongs to a `part` of the model where an instruction does not say."""
    total, free = Prediction(), {"links": 0.0, "network": 0.0}
    pending: dict[str, tuple[float, Transfers]] = {}
    origins: dict[str, str] = {}  # what holds a transfer that has been started -> its start
    for line in module.computations[name].values():
        where = _part(line) or part
        nested = _nested(module, line, where, mesh, links, kernels)
        origin = next((start for start in map(origins.get, line.operands) if start in pending), None)
        origin = origin or hlo.sender(module.computations[name], line)
        if nested:
            for one, times in nested:
                total.include(one, times)
                total.seconds += times * one.seconds
        elif hlo.is_done(line):
            total.seconds += _wait(total.seconds, *pending.pop(origin)) if origin in pending else 0.0
        elif found := hlo.collective(module, name, line):
            entry = total.transfers.setdefault((found.kind, hlo.axes(found.group, mesh)), Transfers())
            seconds = links.seconds(found) if links else 0.0
            entry.count += 1
            entry.bytes += found.bytes
            entry.seconds += seconds
            queue = "network" if line.opcode == "send" else "links"
            free[queue] = max(free[queue], total.seconds) + seconds
            if hlo.is_start(line):
                pending[line.name], origins[line.name] = (free[queue], entry), line.name
            else:
                total.seconds += _wait(total.seconds, free[queue], entry)
        elif line.opcode not in hlo.FREE:
            _compute(total, module, name, line, where, links, kernels)
        if origin in pending and line.name not in pending:
            origins[line.name] = origin
    for end, entry in pending.values():
        total.seconds += _wait(total.seconds, end, entry)
    return total


def _wait(now: float, end: float, entry: Transfers) -> float:
    waited = max(0.0, end - now)
    entry.exposed += waited
    return waited


def _part(line: Instruction) -> str | None:
    """Which part of the model an instruction belongs to, by its path, such as "MMCORE.embed/vlm.embed/vision/dot"."""
    found = _PART.search(line.op_name)
    return found and re.sub(r"\.\w+", "", found[1])


def _nested(
    module: Module, line: Instruction, part: str, mesh: dict[str, int], links: Links | None, kernels: Kernels
) -> Sequence[tuple[Prediction, int]]:
    """What a loop, a call or a choice runs, and how often; of a choice the longest branch."""

    def run(name: str) -> Prediction:
        return _run(module, name, part, mesh, links, kernels)

    if line.opcode == "while":
        return [(run(line.called("body")), hlo.trips(module, line))]
    if line.opcode == "call":
        return [(run(line.called("to_apply")), 1)]
    if line.opcode == "conditional":
        choices = [run(branch) for branch in hlo.branches(line)]
        return [(max(choices, key=lambda choice: (choice.seconds, choice.flops)), 1)]
    return ()


def _compute(
    total: Prediction, module: Module, name: str, line: Instruction, part: str, links: Links | None, kernels: Kernels
) -> None:
    total.cycles += line.cycles
    if line.opcode == "custom-call" and not line.cycles:
        if line.called("custom_call_target") == "tpu_custom_call":
            _kernel(total, module, name, line, part, links, kernels)
        elif line.called("custom_call_target").startswith(_LIBRARIES):
            total.kernels[line.called("custom_call_target")] += 1
        return
    flops = hlo.flops(module, name, line)
    total.flops += flops
    if links is None or line.opcode.endswith(("-start", "-done")):
        return
    chip = links.chip
    memory = hlo.traffic(module, name, line) / (REACHED_BANDWIDTH * chip.bandwidth)
    if flops:
        seconds = max(ESTIMATE_OF_PRODUCTS * line.cycles / chip.clock, flops / (REACHED_PEAK * links.peak), memory)
    else:
        seconds = max(ESTIMATE_OF_OTHERS * line.cycles / chip.clock, memory)
    _take(total, "matrix products" if flops else "vector work and copies", part, seconds)


def _kernel(
    total: Prediction, module: Module, name: str, line: Instruction, part: str, links: Links | None, kernels: Kernels
) -> None:
    cost = kernels.cost(module, name, line)
    if cost is None:
        total.kernels[line.op_name.rsplit("/", 1)[-1] or line.name] += 1
        return
    flops, reached = cost
    total.flops += flops
    if links:
        _take(total, "attention kernels", part, flops / (reached * links.peak))


def _take(total: Prediction, kind: str, part: str, seconds: float) -> None:
    total.kinds[kind] += seconds
    total.parts[part] += seconds
    total.seconds += seconds
