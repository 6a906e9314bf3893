"""The suite on a small synthetic dataset, with generators whose scores are known beforehand."""

import dataclasses
import io
import itertools
import json
import pathlib
import sys

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from flax.traverse_util import unflatten_dict
from PIL import Image

from mmcore_jax import config as config_lib
from mmcore_jax import evaluate, sharding
from mmcore_jax.data import example as example_lib
from mmcore_jax.data import image as image_lib
from mmcore_jax.data import layout, packing, text
from mmcore_jax.evaluation import openmoji, probes, scores
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.training.state import make_plan

SIZE = 32
ROOT = pathlib.Path(__file__).parents[2]
COLOURS = ["red", "green", "blue", "black", "white", "brown"]

# --- A dataset --------------------------------------------------------------------------------------------------------


def _png(pixels):
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def _drawing(number):
    """A coarse random picture, with a band at its top that stays white."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    pixels[:8] = 255
    return pixels


def _captioned(name, png, task="text_to_image"):
    for variant, words in enumerate(("a drawing of", "draw")):
        segments = [example_lib.text(f"{words} {name}"), example_lib.image(png, generate=True)]
        yield {"id": f"{task}/{name}/{variant}", "task": task, "segments": segments}


def _edits(task, family, pngs):
    for (source, _), (goal, colour) in itertools.permutations(zip(pngs, COLOURS), 2):
        segments = [
            example_lib.image(pngs[source]),
            example_lib.text(f"make it {colour}"),
            example_lib.image(pngs[goal], True),
        ]
        yield {"id": f"{task}/{family}/{source}>{goal}", "task": task, "segments": segments}


def _family(name, members):
    """Drawings that differ in the colour of a square."""
    pngs = {}
    for number in range(members):
        pixels = _drawing(name)
        pixels[12:28, 12:28] = np.random.default_rng(1000 + number).integers(0, 256, 3)
        pngs[f"{name}-{number}"] = _png(pixels)
    return pngs


def _write(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """130 drawings to train on, of which 115 are core and t128 is in a trained family; 120 held out, one a twin."""
    root = tmp_path_factory.mktemp("openmoji")
    train = {f"t{number}": _png(_drawing(number)) for number in range(130)}
    held_out = {f"h{number}": _png(_drawing(500 + number)) for number in range(119)} | {"twin": train["t129"]}
    families = {task: (_family(900 + i, n), _family(950 + i, n)) for i, (task, n) in enumerate(FAMILIES.items())}
    families["edit_gender"][0]["t128"] = train["t128"]
    almost = image_lib.decode(families["edit_gender"][1]["951-0"], SIZE).copy()
    almost[20, 20] ^= 1
    families["edit_gender"][1]["951-2"] = _png(almost)

    shards = {
        "text_to_image_core-train": [
            e for n in range(115) for e in _captioned(f"t{n}", train[f"t{n}"], "text_to_image_core")
        ],
        "text_to_image-train": [e for name, png in train.items() for e in _captioned(name, png)],
        "text_to_image-held_out": [e for name, png in held_out.items() for e in _captioned(name, png)],
    }
    catalogue = {}
    for task, pair in families.items():
        for split, members in zip(("train", "held_out"), pair):
            shards[f"{task}-{split}"] = list(_edits(task, f"{task}-{split}", members))
            catalogue[f"{task}-{split}"] = {"members": [{"hexcode": name, "state": ""} for name in members]}
    for name, examples in shards.items():
        _write(root / f"{name}-00000-of-00001.array_record", map(example_lib.encode, examples))
    pngs = (
        train
        | held_out
        | {name: png for pair in families.values() for members in pair for name, png in members.items()}
    )
    records = [msgpack.packb({"hexcode": name, "png": png}) for name, png in pngs.items()]
    _write(root / "drawings.array_record", records)
    (root / "catalogue.json").write_text(json.dumps({"families": catalogue}))
    words = [s["text"] for examples in shards.values() for e in examples for s in e["segments"] if s["type"] == "text"]
    text.train_tokenizer(words, 600, root / "tokenizer")
    return root


FAMILIES = {"edit_tone": 6, "edit_gender": 2, "edit_colour": 4}


@pytest.fixture(scope="session")
def data(directory):
    return openmoji.Drawings(str(directory), SIZE)


@pytest.fixture(scope="session")
def trained_on(data):
    return [e for task in ("text_to_image_core", *FAMILIES) for e in data.examples(task, "train")]


# --- Generators -------------------------------------------------------------------------------------------------------


def _truth(requests, pathways):
    return np.stack([image_lib.decode(openmoji.images(request)[-1], SIZE) for request in requests])


def _someone_elses_truth(requests, pathways):
    return np.roll(_truth(requests, pathways), 1, axis=0)


def _copy(requests, pathways):
    return np.stack([image_lib.decode(openmoji.images(request)[0], SIZE) for request in requests])


def _noise(requests, pathways):
    return np.random.default_rng(len(pathways)).integers(0, 256, (len(requests), SIZE, SIZE, 3), np.uint8)


def _pixels(images):
    return images.reshape(len(images), -1).astype(np.float32) - 128


def _score(data, trained_on, draw, cases=100):
    quizzes = openmoji.choose_quizzes(data, trained_on, cases, 0)
    edits = {task: openmoji.choose_edits(data, task, cases, 0) for task in openmoji.present_edits(trained_on)}
    drawn = openmoji.draw_all(quizzes, edits, draw, lambda items, total, label: items)
    return openmoji.score_pictures(quizzes, edits, drawn, _pixels)


def _values(sets, metric, columns=openmoji.PATHWAYS):
    return [
        metrics[f"{column}/{metric}"].value
        for metrics in sets.values()
        for column in columns
        if f"{column}/{metric}" in metrics
    ]


def test_drawing_the_truth_is_right_everywhere(data, trained_on):
    results = _score(data, trained_on, _truth)
    assert _values(results["text_to_image"], "top1_features") == [1.0] * 9
    assert _values(results["text_to_image"], "top1_pixels") == [1.0] * 9
    assert _values(results["edits"], "accuracy") == [1.0] * 9
    for error in ("error_ratio", "error_inside", "error_outside"):
        assert _values(results["edits"], error) == [0.0] * 9


def test_drawing_the_truth_of_another_request_is_wrong(data, trained_on):
    results = _score(data, trained_on, _someone_elses_truth)
    assert _values(results["text_to_image"], "top1_features") == [0.0] * 9
    assert _values(results["text_to_image"], "top1_pixels") == [0.0] * 9


def test_copying_the_source_is_the_baseline(data, trained_on):
    edits = _score(data, trained_on, _copy)["edits"]
    assert _values(edits, "accuracy") == [0.0] * 9
    assert _values(edits, "error_ratio") == [1.0] * 9
    assert _values(edits, "error_outside") == [0.0] * 9
    assert min(_values(edits, "error_inside")) > 0.01
    for metrics in edits.values():
        for name in ("accuracy", "error_ratio", "error_inside", "error_outside"):
            assert metrics[f"both/{name}"] == metrics[f"copy/{name}"]


def test_noise_is_about_as_good_as_guessing(data, trained_on):
    results = _score(data, trained_on, _noise)
    for metrics in results["text_to_image"].values():
        assert metrics["both/top1_features"].value <= metrics["chance/top1_features"].value + 0.06
    for metrics in results["edits"].values():
        score = metrics["both/accuracy"]
        assert score.low <= metrics["chance/accuracy"].value <= score.high
        assert metrics["both/error_ratio"].value > 1
    assert _values(results["text_to_image"], "top1_pixels", ["chance"]) == [0.01, 1 / 14, 0.01]
    assert results["edits"]["edit_tone"]["chance/accuracy"].value == pytest.approx(1 / 6)


# --- Cases ------------------------------------------------------------------------------------------------------------


def _names(examples):
    return {example["id"].split("/")[1] for example in examples}


def test_sets_hold_what_a_run_has_drawn_has_not_drawn_and_has_never_seen(data, trained_on):
    sets = openmoji.caption_sets(data, trained_on)
    assert _names(sets["trained"]) == {f"t{n}" for n in range(115)}
    assert _names(sets["unmemorised"]) == {f"t{n}" for n in range(115, 128)} | {"t129"}  # t128 is in a trained edit
    assert _names(sets["held_out"]) == {f"h{n}" for n in range(119)}  # and not the twin of t129


def test_what_an_earlier_stage_has_drawn_is_memorised(data, trained_on):
    before = [example for example in data.examples("text_to_image", "train") if _names([example]) == {"t120"}]
    assert before
    sets = openmoji.caption_sets(data, trained_on, before)
    assert _names(sets["unmemorised"]) == {f"t{n}" for n in range(115, 128)} - {"t120"} | {"t129"}
    assert _names(sets["trained"]) == {f"t{n}" for n in range(115)}


def test_earlier_stages_are_runs(tmp_path):
    first, second, third = (tmp_path / name for name in ("published", "stage2", "sft"))
    for directory, before in ((second, first), (third, second)):
        config = config_lib.load(str(ROOT / "configs/stage2.py"), [f"--config.init.dit={str(before)!r}"])
        (directory / "checkpoints").mkdir(parents=True)
        (directory / "config.json").write_text(config.to_json())
    first.mkdir()
    (first / "config.json").write_text("{}")
    config = config_lib.load(str(ROOT / "configs/stage2.py"), [f"--config.init.dit={str(third)!r}"])
    assert [one.init["dit"] for one in openmoji.earlier_stages(config)] == [str(second), str(first)]


def test_a_run_on_everything_has_nothing_unmemorised(data, trained_on):
    sets = openmoji.caption_sets(data, trained_on + data.examples("text_to_image", "train"))
    assert set(sets) == {"trained", "held_out"}


def test_a_quiz_asks_for_each_candidate_before_any_again(data, trained_on):
    examples = openmoji.caption_sets(data, trained_on)["trained"]
    few, many = (openmoji.choose_quiz(data, examples, cases, 0, "trained") for cases in (12, 1000))
    assert len(few.candidates) == len(many.candidates) == 100
    assert len(np.unique(many.candidates, axis=0)) == 100
    assert (len(few.requests), len(many.requests)) == (12, 200)
    assert many.answers.tolist() == [*range(100), *range(100)]
    assert len({request["id"] for request in many.requests}) == 200
    assert [r["id"] for r in many.requests[:12]] == [r["id"] for r in few.requests]
    other = openmoji.choose_quiz(data, examples, 12, 1, "trained")
    assert [r["id"] for r in other.requests] != [r["id"] for r in few.requests]


def test_edits_that_nobody_can_see_are_left_out(data):
    edits = openmoji.choose_edits(data, "edit_gender", 100, 0)
    pairs = {edit.request["id"].split("/")[-1] for edit in edits}
    assert pairs == {"951-0>951-1", "951-1>951-0", "951-2>951-1", "951-1>951-2"}  # 951-0 and 951-2 differ by one level


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("caption/1F236/0", "1F236"),
        ("edit_tone/tone-1F468-200D-1F373/1F468-1F3FB-200D-1F373>1F468-1F3FC-200D-1F373/0", "1F9D1-200D-1F373"),
        ("edit_gender/gender-1F468-1F3FB-200D-1F373/1F469-200D-1F373>1F468-200D-1F373/1", "1F9D1-200D-1F373"),
        ("edit_colour/colour-circle/1F534>1F7E0/0", "circle"),
        ("compose/1F426+1F525>1F426-200D-1F525", "bird"),  # held out, which 1F525 is not
        ("compose_parts/parts-1F354+1F525/1F525+1F354>1F525+1F354~above", "1F354+1F525"),
        ("sequence_moon/moon/1F314>1F315>1F316/0", "1F316"),
        ("000017", "000017"),
        ("shards/00/17", "shards/00/17"),
        ("mnist/3.0.1/train/17", "mnist/3.0.1/train/17"),
    ],
)
def test_the_concept_of_an_example(name, concept):
    assert openmoji.concept({"id": name, "task": name.split("/")[0]}) == concept


def test_the_answer_is_the_target_among_the_members(data):
    for edit in openmoji.choose_edits(data, "edit_tone", 30, 0):
        assert len(edit.members) == 6
        assert (edit.members[edit.answer] == edit.target).all()
        assert edit.changed[20, 20]
        assert not edit.changed[:12].any()


def test_a_sequence_is_compared_with_its_last_input(data):
    """And a composition with its first; the sheet shows all that is given."""
    examples = data.examples("edit_tone", "held_out")
    given, last = [openmoji.images(examples[number])[0] for number in (0, -1)], openmoji.images(examples[1])[-1]
    assert len({*given, last}) == 3
    for task, number in (("sequence_clock", 1), ("compose", 0), ("compose_parts", 0)):
        segments = [*map(example_lib.image, given), example_lib.text("next"), example_lib.image(last, True)]
        edit = openmoji._make_edit(data, {"id": f"{task}/x/y", "task": task, "segments": segments}, [*given, last])
        np.testing.assert_array_equal(edit.source, data.decode(given)[number])
        np.testing.assert_array_equal(edit.inputs, data.decode(given))
        assert edit.answer == 2
        (row,) = openmoji.edit_rows({task: [edit]}, {(task, "both"): edit.target[None]})
        assert [words for _, words in row] == ["next", "", "drawn", "truth", ""]


# --- Probes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(directory):
    """A random model that has every part."""
    stage1, stage2 = (config_lib.load(str(ROOT / "configs" / f"stage{n}.py")) for n in (1, 2))
    vlm = dataclasses.replace(stage2.model.vlm, depth=1, vision=dataclasses.replace(stage2.model.vlm.vision, depth=1))
    vlm = dataclasses.replace(vlm, vision=dataclasses.replace(vlm.vision, full_attention_blocks=(0,)))
    model = dataclasses.replace(
        stage2.model,
        vlm=vlm,
        dit=dataclasses.replace(stage2.model.dit, depth=1),
        vision_target=stage1.model.vision_target,
    )
    config = dataclasses.replace(
        stage2, model=model, objectives=dataclasses.replace(stage2.objectives, alignment=stage1.objectives.alignment)
    )
    composed = MMCORE(config.model, config.execution)
    plan = make_plan(config, composed, sharding.make_mesh(config.mesh), packing.placeholder(config))
    rng = np.random.default_rng(0)
    params = {
        path: rng.normal(float(path.endswith("scale")), 0.1, leaf.shape).astype(np.float32)
        for path, leaf in plan.shapes.items()
    }
    params["statistics/target_mean"] = np.zeros((4, 128), np.float32)
    return probes.Run(config, composed, unflatten_dict(params, sep="/"), text.load_tokenizer(directory / "tokenizer"))


def test_flow_losses_do_not_depend_on_how_they_are_batched(run, data):
    examples = [*data.examples("text_to_image", "train")[:2], *data.examples("edit_tone", "held_out")[:1]]
    whole, parts = (probes.flow_losses(run, examples, 0, batch_size) for batch_size in (3, 2))
    assert whole.shape == (3, len(probes.DROPPED), probes.TIMESTEP_BINS)
    np.testing.assert_allclose(whole, parts, rtol=1e-4)
    nothing, without_text, without_visual, neither = np.moveaxis(whole, 1, 0)
    for dropped in (without_text, without_visual, neither):
        assert (nothing != dropped).all()


@pytest.mark.parametrize("pathway", ["text", "visual"])
def test_flow_losses_are_of_the_pathway_that_is_said_to_be_dropped(run, data, pathway):
    """What stands for an embedding that was dropped counts where that one was, and nowhere else."""
    conditioning = run.params["conditioning"]
    other = {**conditioning, f"{pathway}_null": conditioning[f"{pathway}_null"] + 1.0}
    examples = data.examples("edit_tone", "held_out")[:2]
    before, after = (
        np.moveaxis(probes.flow_losses(one, examples, 0, 2), 1, 0)
        for one in (run, run._replace(params={**run.params, "conditioning": other}))
    )
    changed = {name for name, x, y in zip(probes.DROPPED, before, after) if (x != y).any()}
    assert changed == {pathway, "both"}


def test_predicted_embeddings_know_the_request_and_not_its_answer(run, data):
    examples = data.examples("edit_tone", "held_out")[:2]
    other = [
        e | {"segments": [*e["segments"][:-1], data.examples("text_to_image", "train")[0]["segments"][-1]]}
        for e in examples
    ]
    predicted = probes.predicted_embeddings(run, examples)
    np.testing.assert_array_equal(predicted, probes.predicted_embeddings(run, other))
    np.testing.assert_allclose(predicted[:1], probes.predicted_embeddings(run, examples[:1]), atol=1e-4)
    assert np.abs(predicted[0] - predicted[1]).max() > 1e-3


def test_the_last_generated_image_counts():
    generated = np.array([[True, True, False], [False, True, False], [True, False, True]])
    batch = layout.Interleaved(np.arange(3), None, None, layout.Images(None, None, generated, None, None), None)
    values = np.arange(9).reshape(3, 3, 1)
    np.testing.assert_array_equal(probes.of_last_generated(values, batch), [[1], [4], [8]])


def test_target_embeddings_keep_their_order(run):
    images = np.stack([_drawing(2), _drawing(1), _drawing(2)])
    embedded = probes.target_embeddings(run, images)
    np.testing.assert_array_equal(embedded[0], embedded[2])
    np.testing.assert_allclose(embedded[1], probes.target_embeddings(run, images[1:2])[0], atol=1e-4)
    assert np.abs(embedded[0] - embedded[1]).max() > 1e-3


# --- The door ---------------------------------------------------------------------------------------------------------


def _enter(monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of the door."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        evaluate.main()
    return exit_.value.code, *capsys.readouterr()


def _workdir(tmp_path, stage):
    (tmp_path / "config.json").write_text(config_lib.load(str(ROOT / "configs" / f"{stage}.py")).to_json())
    return tmp_path


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("stage2", ("--suite=openmojo",), "--suite openmojo does not exist; there are openmoji, alignment"),
        ("stage1", ("--suite=openmoji",), "is a run of stage1, which draws nothing: give the workdir of a stage 2"),
        ("stage0", ("--suite=alignment",), "is a run of stage0, which aligns nothing: give the workdir of a stage 1"),
        (
            "stage2",
            ("--suite=openmoji", "--data=nowhere"),
            "nowhere/drawings.array_record does not exist: make it with",
        ),
        ("stage2", ("--suite=openmoji", "--cases=0"), "--cases and --steps must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, stage, arguments, message):
    code, _, error = _enter(monkeypatch, capsys, f"--workdir={_workdir(tmp_path, stage)}", *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_directory_that_is_no_workdir(tmp_path, monkeypatch, capsys):
    code, _, error = _enter(monkeypatch, capsys, f"--workdir={tmp_path}", "--suite=openmoji")
    assert code == 2
    assert "is not the workdir of a run" in error


def test_scores_for_the_same_settings_are_not_made_again(tmp_path, monkeypatch, capsys):
    workdir = _workdir(tmp_path, "stage2")
    calls = []

    def suite(arguments):
        calls.append(arguments.cases)
        return {"edits": {"edit_tone": {"both/accuracy": scores.exact(0.5, 4)}}}, {"edits": [[(_drawing(0), "a")]]}

    monkeypatch.setitem(evaluate.SUITES, "openmoji", suite)
    for arguments in ((), (), ("--cases=7",), ("--cases=7", "--seed=1"), ("--cases=7", "--seed=1"), ("--steps=3",)):
        code, output, _ = _enter(monkeypatch, capsys, f"--workdir={workdir}", "--suite=openmoji", *arguments)
        assert code == 0
        assert "edits: edit_tone" in output
    assert calls == [100, 7, 7, 100]
    stored = json.loads((workdir / "evaluation" / "scores.json").read_text())
    assert stored["settings"]["sampling"]["steps"] == 3
    assert stored["edits"]["edit_tone"]["both/accuracy"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 4}
    assert Image.open(workdir / "evaluation" / "edits.png").width >= 96
