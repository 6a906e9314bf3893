"""What came out: `report.md` and plots, from the logs and the scores of the runs alone.

What the report needs of them is also in `results.json`, which a report on another machine can take in.
"""

import dataclasses
import json
import pathlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mmcore_jax.ablation import statistics
from mmcore_jax.ablation.jobs import Family, Job, read_cases, seconds, write_json
from mmcore_jax.ablation.statistics import Interval, verdict
from mmcore_jax.ablation.table import COMPARISONS, LOWEST_TIMESTEP, STAGES, VARIANTS, Comparison, Metric
from mmcore_jax.config import UserError
from mmcore_jax.training.telemetry import read_metrics

RESULTS_FILE = "results.json"
_DROPPED = {"both": "nothing", "visual": "text", "text": "visual"}  # by what a variant draws by
_HOW_TO_READ = """\
A difference is (first - second), and all three means are over the seeds that have both. Intervals are of 95%: of the
values of all runs of a question, what neither the run nor the seed explains is taken to be noise of one spread. Where
the interval holds zero, the direction is not resolved; of a single seed there is none. These are networks of a few
million parameters on 32-pixel drawings: what they say of the paper's is a direction at most."""

Values = dict[str, float]
Run = tuple[str, str]
"""A stage and a variant of it."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run: `values` at its end, and over its steps the `curves` of its gauges, (step, value) each.

    Its scores are of `cases` cases of each set, None where it was not evaluated.
    """

    fingerprint: str
    seconds: float
    cases: int | None
    values: Values
    curves: dict[str, list[tuple[int, float]]]


class Results:
    """What is known of finished runs, by comparison."""

    def __init__(
        self,
        root: pathlib.Path,
        family: Family,
        comparisons: Sequence[Comparison],
        seeds: Sequence[int],
        others: dict[str, Record],
    ) -> None:
        """Reads the runs of `seeds`; those of other machines (`read_others`) come in addition."""
        taken = seconds(root)
        self.comparisons, self._family = comparisons, family
        self.seeds = sorted({*seeds, *map(_seed, others)})
        self.jobs = family.jobs(comparisons, self.seeds)
        own = {job.name: read_record(job, taken.get(job.name, 0.0)) for job in self.jobs if job.is_done}
        scored = {name for name, record in others.items() if record.cases is not None}
        # What was made again here, to begin from, has no scores.
        self._all = others | {name: one for name, one in own.items() if name not in scored or one.cases is not None}
        self._records = {job.name: self._all[job.name] for job in self.jobs if job.name in self._all}

    @property
    def left(self) -> list[str]:
        """The names of runs that are not done."""
        return [job.name for job in self.jobs if job.name not in self._records]

    @property
    def minutes(self) -> float:
        """Of training and evaluation."""
        return sum(record.seconds for record in self._records.values()) / 60

    def save(self, path: pathlib.Path) -> None:
        """Writes all that is known, of runs that nobody asked for, too."""
        write_json(path, {name: dataclasses.asdict(record) for name, record in self._all.items()})

    def record(self, variant: str, stage: str, seed: int) -> Record | None:
        """Of the run that serves a variant, if it is done."""
        return self._records.get(self._family.job(variant, stage, seed).name)

    def value(self, variant: str, stage: str, seed: int, metric: Metric) -> float | None:
        record = self.record(variant, stage, seed)
        return record and record.values.get(key_of(metric, variant))

    def means(self, question: str, metric: Metric) -> dict[Run, float]:
        """Of each run of a question over the seeds that it has."""
        values = defaultdict(list)
        for (run, _), value in self._values(question, metric).items():
            values[run].append(value)
        return {run: float(np.mean(of_seeds)) for run, of_seeds in values.items()}

    def both(self, one: Comparison, metric: Metric) -> tuple[float, float]:
        """The means of both sides over the seeds that have both."""
        pairs = [[self.value(side, one.stage, seed, metric) for side in one.sides] for seed in self.seeds]
        first, second = np.mean([pair for pair in pairs if None not in pair], axis=0)
        return float(first), float(second)

    def differences(self, question: str, metric: Metric) -> dict[str, Interval]:
        """Name of the comparison -> mean of (variant - against) over the seeds that have both."""
        titles = {_runs(one): one.title for one in self._of(question) if metric in one.metrics}
        found = statistics.differences(self._values(question, metric), [*titles])
        return {titles[pair]: interval for pair, interval in found.items()}

    def _of(self, question: str) -> list[Comparison]:
        return [one for one in self.comparisons if one.question == question]

    def _values(self, question: str, metric: Metric) -> dict[tuple[Run, int], float]:
        """By (run, seed)."""
        runs = dict.fromkeys(run for one in self._of(question) for run in _runs(one))
        found = {(run, seed): self.value(run[1], run[0], seed, metric) for run in runs for seed in self.seeds}
        return {key: value for key, value in found.items() if value is not None}


def _runs(one: Comparison) -> tuple[Run, Run]:
    return (one.stage, one.variant), (one.stage, one.against)


def read_others(
    files: Sequence[pathlib.Path], family: Family, comparisons: Sequence[Comparison], cases: int
) -> dict[str, Record]:
    """The runs in the `results.json` of other machines, or of earlier calls, by name.

    Raises:
      UserError: for a file that cannot be read, or is of runs with other settings or scored on other than `cases`.
    """
    found: dict[str, Record] = {}
    for file in files:
        try:
            known = {name: Record(**record) for name, record in json.loads(file.read_text()).items()}
            seeds = {_seed(name) for name in known}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not the results.json of an ablation ({error}).") from error
        for job in family.jobs(comparisons, sorted(seeds)):
            if job.name in known and known[job.name].fingerprint != job.fingerprint:
                raise UserError(
                    f"{file}: {job.name} was made with other settings than are asked for now: give the same, or do "
                    "without this file."
                )
            if job.name in known and known[job.name].cases not in (None, cases):
                raise UserError(f"{file}: {job.name} was scored with --cases={known[job.name].cases}: give the same.")
        found |= known
    return found


def _seed(name: str) -> int:
    """That of a run such as "seed0/stage1-lora"; `ValueError` for another name."""
    return int(name.partition("/")[0].removeprefix("seed"))


def read_record(job: Job, seconds: float) -> Record:
    """The gauges and the scores of a run that comparisons ask for."""
    metrics = [metric for one in COMPARISONS for metric in (*one.metrics, one.curve)]
    asked = {key_of(metric, variant) for metric in metrics for variant in VARIANTS}
    curves = defaultdict(list)
    for record in read_metrics(job.workdir):
        for key, value in gauge_values(record).items():
            if key in asked:
                curves[key].append((record["step"], value))
    values = {key: points[-1][1] for key, points in curves.items()}
    path = job.workdir / "evaluation/scores.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    for suite, sets in known.items():
        if suite != "settings":
            for name, scores in sets.items():
                values |= {f"{suite}/{name}/{key}": score["value"] for key, score in scores.items()}
    values = {key: values[key] for key in sorted(asked & values.keys())}
    return Record(job.fingerprint, seconds, read_cases(job), values, dict(curves))


def gauge_values(record: Values) -> Values:
    """The finite gauges in a record of `metrics.jsonl`; of losses by timestep also what a `Metric` means by them."""
    gauges = {key: value for key, value in record.items() if key.startswith("gauge/") and value is not None}
    bins = defaultdict(list)
    for key, value in gauges.items():
        name, _, timesteps = key.rpartition("/t_")
        if name and float(timesteps.partition("_")[0]) >= LOWEST_TIMESTEP:
            bins[name].append(value)
    return gauges | {key: float(np.mean(values)) for key, values in bins.items()}


def key_of(metric: Metric, variant: str) -> str:
    pathways = VARIANTS[variant].pathways
    return metric.key.format(pathways=pathways, dropped=_DROPPED[pathways])


# --- Markdown ---------------------------------------------------------------------------------------------------------


def write(root: pathlib.Path, results: Results) -> pathlib.Path:
    """Writes `report.md` and its plots, and returns its path.

    Raises:
      UserError: if matplotlib is missing or `root` cannot be written.
    """
    questions: dict[str, list[Comparison]] = defaultdict(list)
    for one in results.comparisons:
        questions[one.question].append(one)
    path = root / "report.md"
    try:
        results.save(root / RESULTS_FILE)
        lines = [*_head(results), *_summary(results)]
        if _plot_differences(root / "differences.png", results):
            lines += ["", "![differences](differences.png)"]
        for question, ones in questions.items():
            lines += _section(root, results, question, ones)
        path.write_text("\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {root}: {error.strerror}.") from error
    return path


def _head(results: Results) -> list[str]:
    sizes = {job.stage: f"{job.stage} {job.config.total_steps} x {job.config.batch_size}" for job in results.jobs}
    lines = [
        "# Ablations",
        "",
        f"Seeds {', '.join(map(str, results.seeds))}; {results.minutes:.0f} minutes of training and evaluation. "
        f"Steps x batch: {', '.join(sizes[stage] for stage in STAGES if stage in sizes)}.",
    ]
    if results.left:
        lines += ["", f"Not done yet: {', '.join(results.left)}."]
    return lines


def _summary(results: Results) -> list[str]:
    rows = []
    for one in results.comparisons:
        metric = one.metrics[0]
        difference = results.differences(one.question, metric).get(one.title)
        if difference:
            first, second = results.both(one, metric)
            said = one.paper if one.paper == "not reported" else f"{one.paper} ({one.where})"
            here = verdict(difference, metric.more_is_better, one.paper)
            label = f"{metric.label} ({_arrow(metric)})"
            rows.append(
                [one.question, one.title, label, _number(first), _number(second), _show(difference)]
                + [str(difference.n), said, here]
            )
    if not rows:
        return ["", "No two runs can be compared yet."]
    head = ["question", "compared", "measure", "first", "second", "difference", "seeds", "paper", "here"]
    return ["", "## Summary", "", *_table(head, rows), "", _HOW_TO_READ]


def _section(root: pathlib.Path, results: Results, question: str, ones: list[Comparison]) -> list[str]:
    """A question: its curves, every measure of every run, and every difference."""
    metrics = list(dict.fromkeys(metric for one in ones for metric in one.metrics))
    runs = list(dict.fromkeys(run for one in ones for run in _runs(one)[::-1]))
    if not any(results.record(side, one.stage, seed) for one in ones for side in one.sides for seed in results.seeds):
        return []
    means, differences = ({m: find(question, m) for m in metrics} for find in (results.means, results.differences))
    head = [f"{metric.label} ({_arrow(metric)})" for metric in metrics]
    shown = [["-".join(run), *(_number(means[m][run]) if run in means[m] else "" for m in metrics)] for run in runs]
    compared = [
        [one.title, *(_show(differences[m].get(one.title) if m in one.metrics else None) for m in metrics)]
        for one in ones
    ]
    lines = ["", f"## {question[0].upper()}{question[1:]}", "", *_table(["run", *head], shown)]
    lines += ["", *_table(["difference", *head], compared)]
    name = f"{question.replace(' ', '_')}.png"
    if _plot_curves(root / name, results, ones):
        lines += ["", f"![{question}]({name})"]
    return lines


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _arrow(metric: Metric) -> str:
    return "more is better" if metric.more_is_better else "less is better"


def _show(interval: Interval | None) -> str:
    if interval is None:
        return ""
    if not np.isfinite(interval.low):
        return _number(interval.mean)
    return f"{_number(interval.mean)} [{_number(interval.low)}, {_number(interval.high)}]"


def _number(value: float) -> str:
    return f"{value:.3f}"


# --- Plots ------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the plots need matplotlib: install it with `pip install matplotlib`.") from error
    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


def _plot_curves(path: pathlib.Path, results: Results, ones: list[Comparison]) -> bool:
    """The gauge of a question over the steps: each seed thin, their mean thick. Returns whether there was anything."""
    figure, axes = _figure(7, 4)
    curve = ones[0].curve
    sides = dict.fromkeys((one.stage, side) for one in ones for side in one.sides[::-1])
    for number, (stage, variant) in enumerate(sides):
        records = filter(None, (results.record(variant, stage, seed) for seed in results.seeds))
        curves = [tuple(zip(*points)) for one in records if (points := one.curves.get(key_of(curve, variant)))]
        for steps, values in curves:
            axes.plot(steps, values, color=f"C{number}", alpha=0.3, linewidth=0.8)
        if curves:
            mean = np.mean([values for _, values in curves], axis=0)
            axes.plot(curves[0][0], mean, color=f"C{number}", linewidth=2, label=f"{variant} ({len(curves)})")
    if not axes.lines:
        return False
    axes.set(xlabel=f"step of {ones[0].stage}", ylabel=f"{curve.label} ({_arrow(curve)})", title=ones[0].question)
    if not curve.more_is_better:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="variant (seeds)")
    figure.savefig(path, dpi=120)
    return True


def _plot_differences(path: pathlib.Path, results: Results) -> bool:
    """The deciding difference of each comparison, as a share of the second, positive where the first is better."""
    rows = []
    for one in results.comparisons:
        metric = one.metrics[0]
        difference = results.differences(one.question, metric).get(one.title)
        if difference:
            _, second = results.both(one, metric)
            scale = (100 if metric.more_is_better else -100) / max(abs(second), 1e-9)
            half = difference.high - difference.mean
            rows.append((one, scale * difference.mean, abs(scale) * half if np.isfinite(half) else 0.0))
    if not rows:
        return False
    figure, axes = _figure(9, 1.4 + 0.35 * len(rows))
    colours = {"better": "C2", "worse": "C3", "not reported": "C7"}
    for number, (one, mean, half) in enumerate(reversed(rows)):
        inside = colours[one.paper] if half else "white"
        axes.errorbar(mean, number, xerr=half, fmt="o", color=colours[one.paper], markerfacecolor=inside, capsize=3)
    axes.set_yticks(
        range(len(rows)), [f"{one.title}: {one.metrics[0].label}" for one, *_ in reversed(rows)], fontsize=8
    )
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    key = "in the paper, green: better, red: worse,\ngrey: not reported; hollow: one seed"
    axes.set_xlabel(f"how much better the first is, %\n({key})")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
