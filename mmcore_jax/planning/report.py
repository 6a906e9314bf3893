"""Puts outcomes into words and tables."""

from collections.abc import Iterable, Sequence

from mmcore_jax.planning.outcome import GIB, Large, Outcome

CONVENTION = (
    "Rows are full, each example a text and a generated image. Model FLOPs: attention by its mask, nothing computed\n"
    "again, frozen parts by what they need. Times are estimates: 10% for language models, 25% for MMDiT."
)


def report(outcome: Outcome) -> str:
    """The whole report, a paragraph for each question."""
    parts = [[_title(outcome)], _memory(outcome), _flops(outcome), _collectives(outcome), _time(outcome)]
    parts += [_large("largest temporaries", outcome.temporaries), _warnings(outcome), _advice(outcome), [CONVENTION]]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def ranking(outcomes: Sequence[Outcome], failures: Sequence[tuple[str, str]]) -> str:
    """Outcomes of a search, best first: those that fit by images (or rows) a second, then by what is missing."""
    lines = [["mesh", "remat", "rows", "memory", "step", "rows/s", "MFU"]]
    for outcome in sorted(outcomes, key=_rank):
        memory = f"{outcome.needed / GIB:.2f} GiB"
        if not outcome.fits:
            memory += f", {(outcome.needed - outcome.capacity) / GIB:.2f} too much"
        lines.append([_mesh(outcome), outcome.remat, f"{outcome.batch_size}", memory, *_speed(outcome)])
    return "\n".join([*table(lines), *(f"{label}: {reason}" for label, reason in failures)])


def _rank(outcome: Outcome) -> tuple[bool, float]:
    if outcome.fits:
        return False, (outcome.seconds or outcome.needed) / outcome.batch_size
    return True, outcome.needed


def _speed(outcome: Outcome) -> list[str]:
    if not outcome.fits or not outcome.seconds:
        return ["", "", ""]
    mfu = f"{outcome.mfu:.1%}" if outcome.mfu else ""
    return [f"{1e3 * outcome.seconds:.0f} ms", f"{outcome.batch_size / outcome.seconds:.1f}", mfu]


def table(lines: Iterable[Sequence[str]]) -> list[str]:
    """Cells below each other, the first column to the left and the others to the right."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]


def _mesh(outcome: Outcome) -> str:
    return " x ".join(f"{name} {size}" for name, size in outcome.mesh.items()) or "one device"


def _title(outcome: Outcome) -> str:
    where = f"{outcome.topology} ({outcome.chips} x {outcome.device})"
    return (
        f"{outcome.recipe} on {where}: {_mesh(outcome)}, {outcome.batch_size} rows a step, remat {outcome.remat}; "
        f"compiled in {outcome.compile_seconds:.0f} s"
    )


def _memory(outcome: Outcome) -> list[str]:
    lines = [[name, f"{size / GIB:.3f}"] for name, size in outcome.memory.items() if size]
    lines.append(["total", f"{outcome.needed / GIB:.3f}"])
    if outcome.capacity:
        lines.append(["of", f"{outcome.capacity / GIB:.3f}"])
        left = (outcome.capacity - outcome.needed) / GIB
        lines.append(["left" if outcome.fits else "OUT OF MEMORY by", f"{abs(left):.3f}"])
    return ["memory of a device, GiB", *_indented(lines)]


def _flops(outcome: Outcome) -> list[str]:
    total = outcome.model_flops["total"]
    lines = [[part, f"{flops / 1e12:.2f}", f"{flops / total:.1%}"] for part, flops in outcome.model_flops.items()]
    if outcome.compiled_flops:
        run = outcome.compiled_flops * outcome.chips
        lines.append(["as compiled, on all devices", f"{run / 1e12:.2f}", f"{run / total:.1%}"])
    return ["model FLOPs of a step, 10^12", *_indented(lines)]


def _collectives(outcome: Outcome) -> list[str]:
    if not outcome.transfers:
        return []
    lines = [["", "along", "count", "MiB", "ms", "exposed ms"]]
    for one in outcome.transfers:
        times = [f"{1e3 * one.seconds:.2f}", f"{1e3 * one.exposed:.2f}"] if outcome.seconds else ["", ""]
        lines.append([one.kind, one.axes, f"{one.count:,}", f"{one.bytes / 2**20:,.1f}", *times])
    return ["collectives of a step, each device", *_indented(lines)]


def _time(outcome: Outcome) -> list[str]:
    if not outcome.seconds:
        return []
    lines = [[name, f"{1e3 * seconds:,.1f} ms"] for name, seconds in outcome.kinds.items()]
    parts = sorted(outcome.parts.items(), key=lambda item: -item[1])
    lines += [[f"in {part}", f"{1e3 * seconds:,.1f} ms"] for part, seconds in parts]
    lines.append(["step", f"{1e3 * outcome.seconds:,.1f} ms"])
    lines.append(["the compiler's estimate, loops included", f"{outcome.cycles / 1e6:,.1f} Mcycles"])
    lines += [[f"{name}/s", f"{count / outcome.seconds:,.1f}"] for name, count in outcome.rows.items()]
    if outcome.mfu:
        lines.append(["MFU", f"{outcome.mfu:.1%}"])
    lines.append([f"{outcome.total_steps:,} steps", f"{outcome.days:,.1f} days"])
    lines.append(["", f"{24 * outcome.days * outcome.chips:,.0f} chip-hours"])
    return ["predicted time", *_indented(lines)]


def _large(title: str, found: Sequence[Large]) -> list[str]:
    return [title, *_indented([one.where, one.kind, f"{one.bytes / GIB:.3f} GiB"] for one in found)] if found else []


def _warnings(outcome: Outcome) -> list[str]:
    whole = [
        f"warning: whole on every device: {one.where} ({one.kind}), {one.bytes / GIB:.3f} GiB"
        for one in outcome.replicated
    ]
    return whole + [f"warning: {note}" for note in outcome.notes]


def _advice(outcome: Outcome) -> list[str]:
    return ["to fit, try in this order", *(f"  {line}" for line in outcome.advice)] if outcome.advice else []


def _indented(lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"  {line}" for line in table(lines)]
