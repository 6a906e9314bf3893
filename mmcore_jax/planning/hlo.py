"""Reads the text of a compiled module (HLO, as `compiled.as_text()` prints it): what runs, how often, on how much.

The text of a compiled module is scheduled: the order of lines is the order of execution. Sizes are those of one device.
Pure functions of text; nothing here needs the compiler or a device.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# The opcodes that move data between devices, by the name without "-start" and "-done".
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_STARTS, _DONES = ([f"{name}-{end}" for name in (*COLLECTIVES, "async")] for end in ("start", "done"))
# What takes no time and touches no memory of its own.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "opt-barrier")
FREE += ("recv", "recv-done", "send-done")
_PASSING_ON = (*(name for name in FREE if name != "recv"), "send", "while", "call", "conditional", "custom-call")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128, "bf16": 16}
_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]*)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
# Between slices: hosts transfer what every chip sends, and each receives the result.
_SENT = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}x\{0:(\d+)\}"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="[^"]*"')
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")


class Array(NamedTuple):
    """The type of an array. `bytes` is what it takes in memory, its tiles padded; `space` 0 is the main memory."""

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    space: int


class Instruction(NamedTuple):
    """One line. `arrays` are its results, `operands` names in the same computation, `text` the rest of the line."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def bytes(self) -> int:
        """Bytes of its results in the main memory."""
        return sum(array.bytes for array in self.arrays if array.space == 0)

    @property
    def cycles(self) -> float:
        """The compiler's estimate, 0 where it has none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return float(found[1]) if found else 0.0

    @property
    def op_name(self) -> str:
        """The path of the operation in the program, such as "jit(step)/transpose(jvp(vlm))/dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        """The name of a computation that it calls as `attribute`."""
        found = re.search(rf'\b{attribute}=[%"]?([\w.\-]+)', self.text)
        return found[1] if found else None


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """Computations by name, instructions by name in order of execution, the last one being the result."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[str, int, int]]  # source file, line, and the frame that called


class Collective(NamedTuple):
    """A transfer between devices. `bytes`: of the whole that a group of devices shares; `groups` are of partitions."""

    kind: str
    bytes: int
    group: tuple[int, ...]


# --- Parsing ----------------------------------------------------------------------------------------------------------


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
      ValueError: if the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _lines(text):
        opened = _COMPUTATION.match(line)
        if opened:
            current = computations.setdefault(opened[2], {})
            entry = opened[2] if opened[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line)):
            instruction = _instruction(found[2], found[3])
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text of the compiled module has no entry computation")
    return Module(computations, entry, _frames(text))


def _lines(text: str) -> Iterator[str]:
    """Lines without comments, and without the metadata of kernels, which holds newlines and braces."""
    for line in re.sub(r", kernel_metadata=\{.*?\}\}?(?=[,\n])", "", text, flags=re.DOTALL).splitlines():
        yield re.sub(r"/\*.*?\*/", "", line)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    close = _closing("(" + rest, 0) - 1
    operands = re.findall(r"%([\w.\-]+)", rest[:close])
    # A constant and a parameter keep their value: trip counts are read from it.
    kept = rest if opcode in ("constant", "parameter") else rest[close + 1 :]
    return Instruction(name, opcode, _arrays(kind), tuple(operands), kept)


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    return len(text)


@functools.lru_cache(maxsize=1 << 16)
def _arrays(kind: str) -> tuple[Array, ...]:
    return tuple(_array(*found) for found in _ARRAY.findall(kind))


def _array(dtype: str, dims: str, layout: str) -> Array:
    sizes = tuple(int(size.strip(" <=")) for size in dims.split(",") if size.strip())
    padded, (order, _, tiling) = list(sizes), layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    minor_first = [int(axis) for axis in order.split(",") if axis]
    for axis, size in zip(minor_first, reversed(tile[1].split(",")) if tile else ()):
        padded[axis] = -(-padded[axis] // int(size)) * int(size)
    space = re.search(r"S\((\d+)\)", tiling)
    return Array(dtype, sizes, math.prod(padded) * _bits(dtype) // 8, int(space[1]) if space else 0)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 0


def _frames(text: str) -> dict[int, tuple[str, int, int]]:
    """The table of stack frames at the head of a module, empty where there is none."""

    def table(title: str) -> dict[int, str]:
        found = re.search(rf"^{title}\n((?:\d+ .*\n?)+)", text, flags=re.MULTILINE)
        rows = (row.split(" ", 1) for row in found[1].splitlines()) if found else ()
        return {int(number): value for number, value in rows}

    def field(row: str, name: str) -> int:
        found = re.search(rf"\b{name}=(\d+)", row)
        return int(found[1]) if found else 0

    names, locations, rows = table("FileNames"), table("FileLocations"), table("StackFrames")
    # Some versions count the frames that called from 1, with 1 for none: there the first frame is its own parent.
    first = min(rows, default=0)
    shift = bool(rows) and field(rows[first], "parent_frame_id") == first
    frames = {}
    for number, row in rows.items():
        location = locations[field(row, "file_location_id")]
        file = names[field(location, "file_name_id")].strip('"')
        frames[number] = file, field(location, "line"), field(row, "parent_frame_id") - shift
    return frames


# --- Where an instruction comes from ----------------------------------------------------------------------------------


def source(module: Module, instruction: Instruction, package: str) -> str:
    """The innermost line of `package` that made an instruction, as "package/nn/attention.py:38"; "" if unknown."""
    found = re.search(r"stack_frame_id=(\d+)", instruction.text)
    number = int(found[1]) if found else 0
    while number in module.frames:
        file, line, number = module.frames[number]
        if f"{package}/" in file:
            return f"{file[file.rindex(f'{package}/') :]}:{line}"
    file = re.search(r'source_file="([^"]*)"', instruction.text)
    line = re.search(r"source_line=(\d+)", instruction.text)
    if not file:
        return ""
    start = file[1].rfind(f"{package}/")
    return f"{file[1][max(start, 0) :]}:{line[1] if line else '?'}"


# --- How often --------------------------------------------------------------------------------------------------------


def trips(module: Module, loop: Instruction) -> int:
    """How often the body of a `while` runs: the count the compiler notes, else the bound in its condition, else 1."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
    if known:
        return int(known[1])
    condition = module.computations.get(loop.called("condition") or "", {})
    reached = list(condition.values())
    reached += [inner for line in reached for inner in module.computations.get(line.called("calls") or "", {}).values()]
    bounds = [re.match(r"(\d+)\)", line.text) for line in reached if line.opcode == "constant"]
    counts = [int(bound[1]) for bound in bounds if bound]
    return max(counts, default=1)


def branches(instruction: Instruction) -> list[str]:
    """The computations of which a `conditional` runs one."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [name for kind in ("true", "false") if (name := instruction.called(f"{kind}_computation"))]


def executed(module: Module, name: str | None = None, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
    """Yields (computation, instruction, times) for all that runs outside of fusions, bodies of loops in place."""
    name = name or module.entry
    for instruction in module.computations[name].values():
        yield name, instruction, times
        if instruction.opcode == "while":
            yield from executed(module, instruction.called("body"), times * trips(module, instruction))
        elif instruction.opcode == "call":
            yield from executed(module, instruction.called("to_apply"), times)
        elif instruction.opcode == "conditional":
            for branch in branches(instruction):
                yield from executed(module, branch, times)


# --- How much ---------------------------------------------------------------------------------------------------------


def flops(module: Module, computation: str, instruction: Instruction) -> float:
    """FLOPs of the matrix products and convolutions of an instruction, or of what it fuses, run once."""
    inside = module.computations[computation]
    if instruction.opcode == "fusion":
        called = instruction.called("calls")
        return sum(flops(module, called, line) for line in module.computations[called].values())
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, *(inside[name].arrays[0].dims for name in instruction.operands))
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        dims = inside[instruction.operands[0]].arrays[0].dims
        depth = math.prod(dims[int(axis)] for axis in contracted[1].split(",") if axis) if contracted else 1
        return 2.0 * math.prod(instruction.arrays[0].dims) * depth
    return 0.0


def _convolution_flops(instruction: Instruction, left: Sequence[int], right: Sequence[int]) -> float:
    """Products of matrices are convolutions on TPUs, with a batch as a window; only what is in bounds counts."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.text) or " ")[0]))
    groups = re.search(r"batch_group_count=(\d+)", instruction.text)
    sizes = [dict(zip(label, dims)) for label, dims in zip(labels.groups(), (left, right, instruction.arrays[0].dims))]
    total = 2.0 * sizes[0]["b"] * sizes[2]["f"] * sizes[1]["i"] / (int(groups[1]) if groups else 1)
    for number, axis in enumerate(sorted(label for label in labels[1] if label.isdigit())):
        total *= _in_bounds(
            *(size[axis] for size in sizes),
            *(int(_item(window, name, number, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate")),
            int(_item(window, "pad", number, "0_0").split("_")[0]),
        )
    return total


def _item(window: dict[str, str], name: str, number: int, default: object) -> str:
    return window[name].split("x")[number] if name in window else str(default)


@functools.lru_cache(maxsize=4096)
def _in_bounds(size: int, kernel: int, out: int, stride: int, dilate: int, kernel_dilate: int, pad: int) -> int:
    """How many pairs of an output and a kernel position meet an input value, along one axis."""
    places = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_dilate - pad
    return int(np.count_nonzero((places % dilate == 0) & (places >= 0) & (places // dilate < size)))


def traffic(module: Module, computation: str, instruction: Instruction) -> int:
    """Bytes that an instruction reads from the main memory and writes to it, run once.

    What takes a slice of an operand reads the slice only; what updates a slice in place writes the slice only.
    """
    inside, shared = module.computations[computation], _shared(instruction)
    made = (array.bytes for i, array in enumerate(instruction.arrays) if array.space == 0 and i not in shared)
    total = min(_written(module, inside, instruction), sum(made))
    for number, name in enumerate(instruction.operands):
        if number not in shared.values():
            read = _read(module, {instruction.name: instruction}, inside[name], number)
            total += min(read, inside[name].bytes)
    return total


def _shared(instruction: Instruction) -> dict[int, int]:
    """Results that lie where an operand does, by number: what a fusion passes on."""
    listed = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.text)
    pairs = re.findall(r"\{(\d*)\}: \((\d+),", listed[1]) if listed else ()
    return {int(result or 0): int(operand) for result, operand in pairs}


def _read(module: Module, lines: Computation, value: Instruction, number: int | None = None) -> int:
    """Bytes of `value` that its users among `lines` read, or the only one of them as its operand `number`."""
    total, whole = 0, sum(array.bytes for array in value.arrays)
    for user in lines.values():
        for place, name in enumerate(user.operands):
            if name != value.name or (number is not None and place != number):
                continue
            if user.opcode == "bitcast":
                total += _read(module, lines, user)
            elif user.opcode == "fusion":
                inner = module.computations[user.called("calls")]
                total += _read(module, inner, _parameter(inner, place))
            elif user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode != "dynamic-update-slice" or place != 0:
                return whole
    return min(total, whole)


def _parameter(lines: Computation, number: int) -> Instruction:
    return next(line for line in lines.values() if line.opcode == "parameter" and line.text.startswith(f"{number})"))


def _written(module: Module, lines: Computation, value: Instruction) -> int:
    """Bytes that making `value` among `lines` writes."""
    if value.opcode == "fusion":
        inner = module.computations[value.called("calls")]
        return _written(module, inner, list(inner.values())[-1])
    if value.opcode == "bitcast" and value.operands[0] in lines:
        return _written(module, lines, lines[value.operands[0]])
    if value.opcode == "tuple":
        return sum(_written(module, lines, lines[name]) for name in value.operands)
    if value.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in lines[value.operands[1]].arrays)
    return sum(array.bytes for array in value.arrays)


# --- Between devices --------------------------------------------------------------------------------------------------


def collective(module: Module, computation: str, instruction: Instruction) -> Collective | None:
    """The transfer that an instruction starts, or is; None for all others, and for the end of one."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        inside = module.computations[computation]
        given = sum(array.bytes for name in instruction.operands for array in inside[name].arrays)
        results = _results(instruction)
        whole = given if kind == "reduce-scatter" else sum(array.bytes for array in results)
        return Collective(kind, whole, _group(instruction.text))
    if kind == "send":
        return _between_slices(module.computations[computation], instruction)
    called = instruction.called("calls") or ""
    if called.startswith("all-reduce-scatter"):
        found = next(_inside(module, called))
        return found._replace(kind="reduce-scatter")
    return next(_inside(module, called), None) if is_start(instruction) else None


def is_start(instruction: Instruction) -> bool:
    """Whether an instruction starts a transfer that another ends."""
    if instruction.opcode == "fusion":
        return "async-collective-start" in instruction.name
    return instruction.opcode in _STARTS or instruction.opcode == "send"


def is_done(instruction: Instruction) -> bool:
    """Whether an instruction waits for a transfer that another has started."""
    if instruction.opcode == "fusion":
        return "async-collective-done" in instruction.name
    return instruction.opcode in _DONES or instruction.opcode == "recv-done"


def sender(inside: Computation, instruction: Instruction) -> str | None:
    """Of what ends a transfer between slices, the name of what has started it; None for everything else."""
    if instruction.opcode != "recv-done":
        return None
    met = _RENDEZVOUS.search(inside[instruction.operands[0]].text)
    sends = (line for line in inside.values() if line.opcode == "send")
    return next((line.name for line in sends if met and met[0] in line.text), None)


def _between_slices(inside: Computation, instruction: Instruction) -> Collective | None:
    """The transfer that a chip's `send` belongs to, in which the chips at its place in all slices take part.

    Should it not say which these are, all chips do.
    """
    found, among = _SENT.search(instruction.text), _SLICES.search(instruction.text)
    if not found:
        return None
    kind = found[1].lower().replace("_", "-")
    sent = sum(array.bytes for array in inside[instruction.operands[0]].arrays)
    if not among:
        return Collective(kind, sent, ())
    slices, in_slice = len(among[1].split(",")), 1 + int(among[2])
    group = tuple(range(0, slices * in_slice, in_slice))
    return Collective(kind, sent * slices if kind == "all-gather" else sent, group)


def _inside(module: Module, name: str | None) -> Iterator[Collective]:
    for line in module.computations.get(name or "", {}).values():
        found = collective(module, name, line)
        if found:
            yield found
        elif line.opcode == "fusion":
            yield from _inside(module, line.called("calls"))


def _results(instruction: Instruction) -> tuple[Array, ...]:
    """The arrays that a collective gives: of a start with (operands, results, ...), the results."""
    count = len(instruction.operands)
    if not instruction.opcode.endswith("-start") or instruction.opcode == "all-reduce-start":
        return instruction.arrays
    return instruction.arrays[count : 2 * count]


def _group(text: str) -> tuple[int, ...]:
    """The first group of partitions that exchange data; of a permutation, the first chain; () for all of them."""
    named = _NAMED_GROUPS.search(text)
    if named:
        return _named_group(*named.groups())
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        dims = [int(size) for size in iota[3].split(",")]
        order = [int(axis) for axis in iota[4].split(",")] if iota[4] else range(len(dims))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(int(iota[1]), int(iota[2]))
        return tuple(ids[0].tolist())
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text)
    if not listed:
        return ()
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        moved = [tuple(map(int, pair.split(","))) for pair in re.findall(r"[\d]+,[\d]+", pairs[1])]
        return next((pair for pair in moved if pair[0] != pair[1]), moved[0])
    return tuple(int(number) for number in listed[1].split(","))


def _named_group(mesh: str, dims: str | None, order: str | None, chosen: str) -> tuple[int, ...]:
    """The first group of `mesh['a'=2,'b'=8] {'a','b':(2)4}`: all of a, and of b the axis of 4 behind one of 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if dims:
        whole = ids.reshape([int(size) for size in dims.split(",")])
        ids = whole.transpose([int(axis) for axis in order.split(",")]) if order else whole
    parts, index = [], []
    taken = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)}
    for name, size in sizes.items():
        before, inside = (int(x) if x else default for x, default in zip(taken.get(name, ("", "")), (1, size)))
        parts += [before, inside, size // before // inside]
        index += [0, slice(None) if name in taken else 0, 0]
    return tuple(ids.reshape(parts)[tuple(index)].ravel().tolist())


def axes(group: Sequence[int], mesh: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the partitions of a group differ; all of them for the group ()."""
    if not group:
        return tuple(name for name, size in mesh.items() if size > 1)
    places = np.array(np.unravel_index(np.array(group), tuple(mesh.values())))
    return tuple(name for name, along in zip(mesh, places) if np.unique(along).size > 1)


# --- Memory -----------------------------------------------------------------------------------------------------------


def largest(module: Module, package: str, count: int) -> list[tuple[int, str, str]]:
    """The largest arrays that the program makes: (bytes, type, source line), each line and type once."""
    made: dict[tuple[str, str], int] = collections.Counter()
    for _, instruction, _ in executed(module):
        if (
            instruction.opcode in _PASSING_ON
            or instruction.opcode.endswith(("-start", "-done"))
            or is_done(instruction)
        ):
            continue
        shared = _shared(instruction)
        for array in (array for i, array in enumerate(instruction.arrays) if i not in shared):
            where = source(module, instruction, package) or instruction.op_name.rsplit("/", 1)[-1] or instruction.name
            if array.space == 0 and array.bytes:
                made[f"{array.dtype}[{','.join(map(str, array.dims))}]", where] = array.bytes
    ranked = sorted(made.items(), key=lambda item: -item[1])[:count]
    return [(size, kind, where) for (kind, where), size in ranked]
