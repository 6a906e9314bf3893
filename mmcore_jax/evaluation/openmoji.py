"""The OpenMoji suite: does a trained MMCORE draw what it is told, edit what it is shown, and by which pathway?

Pictures come from `draw(requests, pathways)` and features from `extract(images)`: arguments, so that the suite can be
tested with fakes. `n` cases, M candidates, `S` the side of an image; images are uint8 `[S, S, 3]`.
"""

import contextlib
import dataclasses
import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from mmcore_jax import config as config_lib
from mmcore_jax.config import ArrayRecord, Config, Source, split_step
from mmcore_jax.data import image as image_lib
from mmcore_jax.data import openmoji
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.sources import open_source
from mmcore_jax.evaluation import probes, scores
from mmcore_jax.evaluation.probes import Run
from mmcore_jax.evaluation.scores import Score, Scores
from mmcore_jax.evaluation.sheet import Cell
from mmcore_jax.progress import Progress

CANDIDATES = 100
FLOW_EXAMPLES = 32
PATHWAYS = ("both", "text", "visual")
# Kinds of edits; those that a run has not trained on are left out.
SINGLE, MULTIPLE = ("edit_tone", "edit_gender", "edit_colour"), ("compose", "compose_parts", *openmoji.SEQUENCES)
VISIBLE = 8  # of 255: a pixel has changed where a channel differs by more

_HEXCODE = re.compile(r"[0-9A-F]{3,}(-[0-9A-F]{3,})*(~\w+)?")

Draw = Callable[[Sequence[Example], str], np.ndarray]  # (requests, pathways) -> uint8 [n, S, S, 3]
Extract = Callable[[np.ndarray], np.ndarray]  # uint8 [n, S, S, 3] -> float32 [n, D]
Drawn = dict[tuple[str, str], np.ndarray]  # (set, pathways) -> uint8 [n, S, S, 3]
Sets = dict[str, dict[str, Score]]
Sheets = dict[str, list[list[Cell]]]


def evaluate(
    run: Run, data: "Drawings", draw: Draw, extract: Extract, cases: int, seed: int, progress: Progress
) -> tuple[Scores, Sheets]:
    """Scores a stage 2 and draws its sheets.

    Args:
      run: the stage 2.
      data: its dataset, at its size.
      draw: generates the last image of each request.
      extract: features of images, independent of what is trained.
      cases: how many of each set, at most.
      seed: chooses them.
      progress: wraps the long loops.
    """
    trained_on = training_examples(run.config)
    before = [example for config in earlier_stages(run.config) for example in training_examples(config)]
    quizzes = choose_quizzes(data, trained_on, cases, seed, before)
    edits = {task: choose_edits(data, task, cases, seed) for task in present_edits(trained_on)}
    drawn = draw_all(quizzes, edits, draw, progress)
    results = score_pictures(quizzes, edits, drawn, extract)
    results["flow_loss"] = score_flow(run, quizzes, edits, min(cases, FLOW_EXAMPLES), seed)
    return results, {"text_to_image": quiz_rows(quizzes, drawn), "edits": edit_rows(edits, drawn)}


# --- Data -------------------------------------------------------------------------------------------------------------


class Drawings:
    """The prepared dataset, its images decoded at the size of a model."""

    def __init__(self, directory: str, size: int) -> None:
        """Raises `UserError` where there is no dataset."""
        self._directory, self._size = directory, size
        self._pngs = openmoji.load_drawings(directory)
        self._families = openmoji.load_catalogue(directory)["families"]

    def examples(self, task: str, split: str) -> list[Example]:
        """All examples of a task."""
        shards = f"{self._directory}/{task}-{split}-*.array_record"
        return list(read(task, ArrayRecord(kind="array_record", shards=shards, weight=1.0)))

    def decode(self, encoded: Iterable[bytes]) -> np.ndarray:
        """Decodes images, `[n, S, S, 3]`."""
        return np.stack([image_lib.decode(image, self._size) for image in encoded])

    def family(self, example: Example) -> list[bytes]:
        """The different images of the family that an edit is of; empty if it is of none."""
        family = self._families.get(example["id"].split("/")[1], {"members": []})
        return list(dict.fromkeys(self._pngs[member["hexcode"]] for member in family["members"]))


def training_examples(config: Config) -> list[Example]:
    """All examples of the sources that a run draws from."""
    drawn_from = {
        name: source
        for name, source in config.data.sources.items()
        if source.weight or any(weight for _, weight in source.schedule)
    }
    return [example for name, source in drawn_from.items() for example in read(name, source)]


def earlier_stages(config: Config) -> Iterator[Config]:
    """Those of the runs that a run's diffusion transformer comes from."""
    while (workdir := split_step(config.init.get("dit", "random"))[0]).joinpath("checkpoints").is_dir():
        config = config_lib.from_json(workdir / "config.json")
        yield config


def read(name: str, settings: Source) -> Iterator[Example]:
    """The examples of a source, without the bad records that training skips too."""
    source = open_source(name, settings)
    for index in range(len(source)):
        with contextlib.suppress(BadExample):
            yield source[index]


def images(example: Example) -> list[bytes]:
    """The encoded images of an example; the last one is what it asks for."""
    return [segment["image"] for segment in example["segments"] if segment["type"] == "image"]


def caption(example: Example) -> str:
    """The text of an example."""
    return " ".join(segment["text"] for segment in example["segments"] if segment["type"] == "text")


def caption_sets(
    data: Drawings, trained_on: Sequence[Example], before: Sequence[Example] = ()
) -> dict[str, list[Example]]:
    """Text-to-image examples by what a run has seen of them; sets that turn out empty are left out.

    `trained`: the run drew them. `unmemorised`: in the training split, from which stage 1 knows them, but in no example
    of the run, nor of those `before` it. `held_out`: in no training example at all.
    """
    seen = {image for example in (*trained_on, *before) for image in images(example)}
    train = data.examples("text_to_image", "train")
    known = seen | {images(example)[-1] for example in train}
    held_out = data.examples("text_to_image", "held_out")
    sets = {
        "trained": [e for e in trained_on if len(images(e)) == 1 and e["segments"][-1].get("generate")],
        "unmemorised": [e for e in train if images(e)[-1] not in seen],
        "held_out": [e for e in held_out if images(e)[-1] not in known],
    }
    return {name: examples for name, examples in sets.items() if examples}


def present_edits(trained_on: Sequence[Example]) -> list[str]:
    """The kinds of edits among the examples of a run."""
    tasks = {example["task"] for example in trained_on}
    return [task for task in SINGLE + MULTIPLE if task in tasks]


def concept(example: Example) -> str:
    """What an example is of, apart from what an edit changes: of several concepts, those that are held out, if any are.

    What has no id of a drawing is of itself.
    """
    pieces = example["id"].split("/")[1:]
    drawings = next((piece for piece in pieces if ">" in piece), pieces[0] if pieces else "").split(">")
    given = drawings if example["task"] in openmoji.SEQUENCES else drawings[:1]
    hexcodes = [hexcode for drawing in given for hexcode in drawing.split("+")]
    if not all(map(_HEXCODE.fullmatch, hexcodes)):
        return example["id"]
    bases = set(map(openmoji.base_concept, hexcodes))
    held_out = {base for base in bases if openmoji.split_of(base) == "held_out"}
    return "+".join(sorted(held_out or bases))


def shuffled(examples: Sequence[Example], seed: int, name: str) -> list[Example]:
    """A stable shuffle, by the seed and the name of the set."""
    order = np.random.default_rng((seed, zlib.crc32(name.encode()))).permutation(len(examples))
    return [examples[i] for i in order]


def round_robin(groups: Iterable[Sequence[Example]]) -> list[Example]:
    """The first of each group, then the second of each, and so on."""
    return [example for turn in itertools.zip_longest(*groups) for example in turn if example is not None]


# --- Cases ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Quiz:
    """Requests, and the different images among which the right one is to be recognised."""

    requests: list[Example]
    candidates: np.ndarray  # [M, S, S, 3]
    answers: np.ndarray  # [n]


def choose_quizzes(
    data: Drawings, trained_on: Sequence[Example], cases: int, seed: int, before: Sequence[Example] = ()
) -> dict[str, Quiz]:
    """The quiz of each of `caption_sets`."""
    sets = caption_sets(data, trained_on, before)
    return {name: choose_quiz(data, examples, cases, seed, name) for name, examples in sets.items()}


def choose_quiz(data: Drawings, examples: Sequence[Example], cases: int, seed: int, name: str) -> Quiz:
    """Draws up to `CANDIDATES` images, and requests for each of them in turn until there are `cases`."""
    groups: dict[bytes, list[Example]] = {}
    for example in shuffled(examples, seed, name):
        groups.setdefault(images(example)[-1], []).append(example)
    chosen = dict(itertools.islice(groups.items(), CANDIDATES))
    requests = round_robin(chosen.values())[:cases]
    number = {image: i for i, image in enumerate(chosen)}
    return Quiz(requests, data.decode(chosen), np.array([number[images(request)[-1]] for request in requests]))


@dataclasses.dataclass(frozen=True)
class Edit:
    """A request for an edit, and the images among which the right one is to be recognised."""

    request: Example
    inputs: np.ndarray  # [I, S, S, 3]
    source: np.ndarray  # [S, S, 3], the first of them; of a sequence the last
    target: np.ndarray  # [S, S, 3]
    members: np.ndarray  # [M, S, S, 3]
    answer: int

    @property
    def changed(self) -> np.ndarray:
        """Where the edit is visible, bool `[S, S]`."""
        return (np.abs(self.source.astype(np.int16) - self.target) > VISIBLE).any(axis=-1)


def choose_edits(data: Drawings, task: str, cases: int, seed: int) -> list[Edit]:
    """Draws held-out edits that change something visible. Members are the family, or else all targets of the task."""
    examples = data.examples(task, "held_out")
    targets = list(dict.fromkeys(images(example)[-1] for example in examples))
    made = (_make_edit(data, example, data.family(example) or targets) for example in shuffled(examples, seed, task))
    return list(itertools.islice((edit for edit in made if edit.changed.any()), cases))


def _make_edit(data: Drawings, example: Example, members: list[bytes]) -> Edit:
    *inputs, target = data.decode(images(example))
    source = inputs[-1 if example["task"] in openmoji.SEQUENCES else 0]
    return Edit(example, np.stack(inputs), source, target, data.decode(members), members.index(images(example)[-1]))


def draw_all(quizzes: dict[str, Quiz], edits: dict[str, list[Edit]], draw: Draw, progress: Progress) -> Drawn:
    """Draws every request by the pathways that its set is scored for."""
    jobs = {(name, pathways): quiz.requests for name, quiz in quizzes.items() for pathways in PATHWAYS}
    for task, chosen in edits.items():
        jobs |= {(task, pathways): [edit.request for edit in chosen] for pathways in PATHWAYS}
    return {job: draw(requests, job[1]) for job, requests in progress(jobs.items(), len(jobs), "drawing")}


# --- Scores -----------------------------------------------------------------------------------------------------------


def score_pictures(quizzes: dict[str, Quiz], edits: dict[str, list[Edit]], drawn: Drawn, extract: Extract) -> Scores:
    """Everything that is scored by pictures."""
    return {
        "text_to_image": {name: score_quiz(name, quiz, drawn, extract) for name, quiz in quizzes.items()},
        "edits": {task: score_edits(task, chosen, drawn) for task, chosen in edits.items()},
    }


def score_quiz(name: str, quiz: Quiz, drawn: Drawn, extract: Extract) -> dict[str, Score]:
    """Is what was drawn nearest to the right candidate, by features (cosine) and by pixels (squared error)?"""
    pictures = [drawn[name, pathways] for pathways in PATHWAYS]
    shown = [quiz.candidates, *pictures]
    known, *features = _split(extract(np.concatenate(shown)), shown)
    result, groups = {}, [concept(request) for request in quiz.requests]
    for pathways, drawings, feature in zip(PATHWAYS, pictures, features):
        by_pixels = np.stack([scores.squared_errors(drawing, quiz.candidates) for drawing in drawings])
        by_features = -scores.cosines(feature, known)
        result[f"{pathways}/top1_features"] = scores.proportion(scores.is_nearest(by_features, quiz.answers), groups)
        result[f"{pathways}/top1_pixels"] = scores.proportion(scores.is_nearest(by_pixels, quiz.answers), groups)
    chance = scores.exact(1 / len(quiz.candidates), len(quiz.requests))
    return result | {"chance/top1_features": chance, "chance/top1_pixels": chance}


def score_edits(task: str, edits: list[Edit], drawn: Drawn) -> dict[str, Score]:
    """Scores what was drawn by each pathway, and copying the source."""
    columns = {pathways: drawn[task, pathways] for pathways in PATHWAYS}
    columns["copy"] = np.stack([edit.source for edit in edits])
    result = {
        f"{column}/{name}": score
        for column, pictures in columns.items()
        for name, score in _edit_scores(edits, pictures).items()
    }
    return result | {"chance/accuracy": _chance(edits)}


def _chance(edits: list[Edit]) -> Score:
    """The share of edits that guessing among the members gets right."""
    return scores.exact(float(np.mean([1 / len(edit.members) for edit in edits])), len(edits))


def _edit_scores(edits: list[Edit], pictures: np.ndarray) -> dict[str, Score]:
    """`error_ratio` is against copying the source; `inside` and `outside` of the region that the edit changes."""
    right = [
        scores.is_nearest(scores.squared_errors(picture, edit.members)[None], np.array([edit.answer]))[0]
        for edit, picture in zip(edits, pictures)
    ]
    sources, targets = np.stack([edit.source for edit in edits]), np.stack([edit.target for edit in edits])
    changed, groups = np.stack([edit.changed for edit in edits]), [concept(edit.request) for edit in edits]
    errors, copied = scores.squared_errors(pictures, targets), scores.squared_errors(sources, targets)
    return {
        "accuracy": scores.proportion(np.array(right), groups),
        "error_ratio": scores.ratio(errors, copied, groups),
        "error_inside": scores.mean(scores.masked_errors(pictures, targets, changed), groups),
        "error_outside": scores.mean(scores.masked_errors(pictures, targets, ~changed), groups),
    }


def score_alignment(run: Run, data: Drawings, seed: int) -> Sets:
    """Does a stage 1 predict the visual embeddings of the right image?

    Of edits also: of the right one among the members of the family, which tells whether the change is predicted.
    """
    trained_on = training_examples(run.config)
    tasks = present_edits(trained_on)
    sets = caption_sets(data, trained_on)
    sets = {name: sets[name] for name in ("trained", "held_out") if name in sets}
    sets |= {task: data.examples(task, "held_out") for task in tasks}
    quizzes = {name: choose_quiz(data, examples, CANDIDATES, seed, name) for name, examples in sets.items()}
    families = {task: choose_edits(data, task, CANDIDATES, seed) for task in tasks if task != "compose"}

    groups = [quiz.requests for quiz in quizzes.values()]
    groups += [[edit.request for edit in edits] for edits in families.values()]
    predicted = _split(probes.predicted_embeddings(run, list(itertools.chain(*groups))), groups)
    images_known = [quiz.candidates for quiz in quizzes.values()]
    images_known += [edit.members for edits in families.values() for edit in edits]
    known = _split(probes.target_embeddings(run, np.concatenate(images_known)), images_known)

    result = {name: _quiz_alignment(quiz, next(predicted), next(known)) for name, quiz in quizzes.items()}
    for task, edits in families.items():
        result[task] |= _family_alignment(edits, next(predicted), list(itertools.islice(known, len(edits))))
    return result


def _quiz_alignment(quiz: Quiz, predicted: np.ndarray, known: np.ndarray) -> dict[str, Score]:
    """Cosine, and retrieval among the images of the set. The cosine by chance is that with the other images."""
    by_query = np.mean([scores.cosines(predicted[:, q], known[:, q]) for q in range(known.shape[1])], axis=0)
    cases, others = np.arange(len(predicted)), max(len(known) - 1, 1)
    own, groups = by_query[cases, quiz.answers], [concept(request) for request in quiz.requests]
    right = scores.is_nearest(-_flat_cosines(predicted, known), quiz.answers)
    return {
        "predicted/cosine": scores.mean(own, groups),
        "predicted/retrieval": scores.proportion(right, groups),
        "chance/cosine": scores.mean((by_query.sum(axis=1) - own) / others, groups),
        "chance/retrieval": scores.exact(1 / len(known), len(cases)),
    }


def _family_alignment(edits: list[Edit], predicted: np.ndarray, known: list[np.ndarray]) -> dict[str, Score]:
    right = [
        scores.is_nearest(-_flat_cosines(rows[None], members), np.array([edit.answer]))[0]
        for rows, members, edit in zip(predicted, known, edits)
    ]
    return {
        "predicted/retrieval_in_family": scores.proportion(np.array(right), [concept(e.request) for e in edits]),
        "chance/retrieval_in_family": _chance(edits),
    }


def _split(rows: np.ndarray, groups: Sequence[Sequence]) -> Iterator[np.ndarray]:
    """Cuts rows into pieces as long as the groups that they were made from."""
    return iter(np.split(rows, np.cumsum([len(group) for group in groups])[:-1]))


def _flat_cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return scores.cosines(*(rows.reshape(len(rows), -1) for rows in (x, y)))


def score_flow(run: Run, quizzes: dict[str, Quiz], edits: dict[str, list[Edit]], cases: int, seed: int) -> Sets:
    """The flow loss by bins of the timestep, with either pathway dropped, both or none."""
    one_input = [[edit.request for edit in chosen] for task, chosen in edits.items() if task in SINGLE]
    sets = {
        "trained": quizzes["trained"].requests if "trained" in quizzes else [],
        "held_out_edits": round_robin(one_input),
    }
    sets = {name: requests[:cases] for name, requests in sets.items() if requests}
    losses = _split(probes.flow_losses(run, list(itertools.chain(*sets.values())), seed), list(sets.values()))
    return {name: _flow_scores(rows, list(map(concept, sets[name]))) for name, rows in zip(sets, losses)}


def _flow_scores(losses: np.ndarray, groups: Sequence[str]) -> dict[str, Score]:
    result = {}
    for dropped, rows in zip(probes.DROPPED, np.moveaxis(losses, 1, 0)):
        for number, name in enumerate(probes.timestep_bins()):
            result[f"drop_{dropped}/{name}"] = scores.mean(rows[:, number], groups)
        result[f"drop_{dropped}/t_0.0_1.0"] = scores.mean(rows.mean(axis=1), groups)
    return result


# --- Sheets -----------------------------------------------------------------------------------------------------------

_ABREAST = 4  # cases in a row of a sheet
_SHOWN = {"trained": 24, "unmemorised": 12, "held_out": 12}
_EDITS_SHOWN = 12
_SPACE = np.full((1, 3, 3), 255, np.uint8), ""


def quiz_rows(quizzes: dict[str, Quiz], drawn: Drawn) -> list[list[Cell]]:
    """Cases of each set: the truth under its caption, then what was drawn by each pathway."""
    rows = []
    for name, quiz in quizzes.items():
        cells = []
        for i, request in enumerate(quiz.requests[: _SHOWN[name]]):
            truth = quiz.candidates[quiz.answers[i]], f"{name.replace('_', ' ')}: {caption(request)}"
            cells.append([truth, *((drawn[name, pathways][i], pathways) for pathways in PATHWAYS)])
        rows += _abreast(cells)
    return rows


def edit_rows(edits: dict[str, list[Edit]], drawn: Drawn) -> list[list[Cell]]:
    """Cases of each kind: what is given above the instruction, what was drawn by both pathways, the truth."""
    rows = []
    for task, chosen in edits.items():
        cells = []
        for edit, picture in zip(chosen[:_EDITS_SHOWN], drawn[task, "both"]):
            given = [(image, "") for image in edit.inputs[1:]]
            first = edit.inputs[0], caption(edit.request)
            cells.append([first, *given, (picture, "drawn"), (edit.target, "truth")])
        rows += _abreast(cells)
    return rows


def _abreast(cases: list[list[Cell]]) -> list[list[Cell]]:
    spaced = [[*case, _SPACE] for case in cases]
    return [list(itertools.chain(*spaced[i : i + _ABREAST])) for i in range(0, len(spaced), _ABREAST)]
