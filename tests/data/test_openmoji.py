"""The OpenMoji builder: names that read well, no concept on both sides of the split, complete and repeatable shards."""

import hashlib
import io
import itertools
import pathlib
import re
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from mmcore_jax import config as config_lib
from mmcore_jax.config import UserError
from mmcore_jax.data import example as examples_lib
from mmcore_jax.data import openmoji, text
from mmcore_jax.data import openmoji_pictures as pictures
from mmcore_jax.data import openmoji_words as words
from mmcore_jax.data.reader import Reader
from tests import tiny

SIZE = 16
MAX_TOKENS = 16


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "openmoji"
    assert openmoji.build(output, SIZE)
    return output


@pytest.fixture(scope="session")
def drawings():
    return openmoji.list_drawings()


@pytest.fixture(scope="session")
def items(drawings):
    """Every (task, split, example), with the hexcode in the place of the image."""
    core = {"1F34E", "2764", "1F408", "1F534", "1F426"}  # an apple, a heart, a cat; held out a circle, a bird
    families = [*openmoji.list_families(drawings), *openmoji.list_compositions(drawings, core)]
    return list(openmoji.list_examples(drawings, families, core, _stand_ins(drawings, families)))


def _stand_ins(drawings, families):
    members = (hexcode for family in families for hexcode, _ in family.members)
    return {hexcode: hexcode.encode() for hexcode in (*drawings, *members)}


def _shards(directory, task="*", split="*"):
    return sorted(directory.glob(f"{task}-{split}-*.array_record"))


def _texts(items):
    return [s["text"] for _, _, example in items for s in example["segments"] if s["type"] == "text"]


def _images(example):
    return [s["image"].decode() for s in example["segments"] if s["type"] == "image"]


def _concepts(example):
    """Bases of all that an example shows; of a picture made of two drawings, those of both."""
    names = (name.split("~")[0].split("+") if "+" in name else [name] for name in _images(example))
    return set(map(openmoji.base_concept, itertools.chain(*names)))


def _leaks(items):
    """Bases that are drawn by a held-out caption and are also somewhere in a training example."""
    held_out, train = set(), set()
    for task, split, example in items:
        if split == "train":
            train |= _concepts(example)
        elif task.startswith("text_to_image"):
            held_out |= _concepts(example)
    return held_out & train


# --- Split ------------------------------------------------------------------------------------------------------------


def test_no_concept_is_on_both_sides(items):
    assert not _leaks(items)


def test_a_split_by_image_is_caught(drawings, monkeypatch):
    by_image = property(lambda drawing: openmoji.split_of(drawing.hexcode))
    monkeypatch.setattr(openmoji.Drawing, "split", by_image)
    families = openmoji.list_families(drawings)
    broken = openmoji.list_examples(drawings, families, set(), _stand_ins(drawings, families))
    assert len(_leaks(broken)) > 20


def test_held_out_edits_start_from_held_out_concepts(items):
    for task, split, example in items:
        if split == "held_out" and task.startswith(("edit", "compose_parts")):
            assert set(map(openmoji.split_of, _concepts(example))) == {"held_out"}


def test_sequences_go_on_by_equal_steps(items):
    """Around the clock and the month, both ways; with a face or a phase that is held out, the whole document is."""
    for task, order, steps, named in (
        ("sequence_clock", openmoji._CLOCK, words.STEPS["clock"], 24 * 4),
        ("sequence_moon", openmoji._MOON, words.STEPS["moon"], 8 * 2),
    ):
        splits, found = set(), defaultdict(set)
        for _, split, example in (item for item in items if item[0] == task):
            hexcodes, texts = _images(example), _texts([(task, split, example)])
            held_out = any(openmoji.split_of(openmoji.base_concept(hexcode)) == "held_out" for hexcode in hexcodes)
            assert split == ("held_out" if held_out else "train")
            splits.add(split)
            first, second, third = (order.index(hexcode) for hexcode in hexcodes)
            step = (second - first) % len(order)
            assert step == (third - second) % len(order)
            if texts[0].startswith("next, "):
                assert texts[0] != texts[1]
                named -= 1
            else:
                assert texts == [next(text for n, text in steps.items() if n % len(order) == step)] * 2
                found[step].add(first)
        assert splits == {"train", "held_out"}
        assert named == 0
        assert {step: len(starts) for step, starts in found.items()} == {n % len(order): len(order) for n in steps}


def test_the_longer_hand_of_a_clock_turns():
    """As OpenMoji draws it on the hour and half past; twelve o'clock hides it behind the shorter one."""

    def face(name):
        return np.asarray(pictures.rasterise(name, 72), int)

    for hour in ("1F550", "1F554", "1F55B"):
        on_the_hour, quarter_past, half_past, quarter_to = (face(f"{hour}~{minutes}") for minutes in ("00", 15, 30, 45))
        assert np.abs(on_the_hour - face(hour)).mean() < 1
        if hour != "1F55B":  # half past twelve alone is drawn with the shorter hand beyond the hour
            assert np.abs(half_past - face(f"{int(hour, 16) + 12:X}")).mean() < 1
        for drawn, blank in (quarter_past[36, [50, 22], 0], quarter_to[36, [22, 50], 0]):
            assert drawn < 64 < blank


def test_tone_scales_go_up_and_down(items):
    order, ways = list(openmoji.TONES), {"darker": 1, "lighter": -1}
    documents = [example for task, _, example in items if task == "sequence_tone"]
    assert len(documents) > 1000
    for example in documents:
        tones = [next(code for code in hexcode.split("-") if code in openmoji.TONES) for hexcode in _images(example)]
        texts = {segment["text"] for segment in example["segments"] if segment["type"] == "text"}
        (way,) = {text.split()[-1] for text in texts}
        assert list(np.diff([order.index(tone) for tone in tones])) == [ways[way]] * 2


def test_equal_pictures_are_on_one_side(built):
    catalogue = openmoji.load_catalogue(built)["drawings"]
    splits = defaultdict(set)
    for hexcode, png in openmoji.load_drawings(built).items():
        splits[png] |= {catalogue[drawn]["split"] for drawn in hexcode.split("~")[0].split("+")}
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize(
    "same",
    [
        ("1F469-1F3FD-200D-1F52C", "1F468-200D-1F52C", "1F9D1-200D-1F52C"),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "1F3C3-1F3FB-200D-2642-FE0F", "1F3C3"),
        ("2764", "1F499", "1FA77"),
        ("1F934", "1F478-1F3FF", "1FAC5"),
        ("1F468-200D-2764-FE0F-200D-1F468", "1F491-1F3FB", "1F469-1F3FB-200D-2764-FE0F-200D-1F468-1F3FB"),
        ("1F46A", "1F468-200D-1F469-200D-1F466", "1F9D1-200D-1F9D2"),
    ],
)
def test_base_concept_ignores_tone_gender_colour_and_direction(same):
    assert len(set(map(openmoji.base_concept, same))) == 1


def test_base_concept_keeps_concepts_apart():
    different = ("1F469-200D-1F52C", "1F469-200D-1F680", "1F469", "1F52C", "2764", "2764-FE0F-200D-1F525", "1F534")
    assert len(set(map(openmoji.base_concept, different))) == len(different)


def test_a_joined_concept_is_held_out_with_its_part():
    assert openmoji.split_of("1F525") == "train"
    assert openmoji.split_of("bird") == "held_out"
    assert openmoji.split_of(openmoji.base_concept("1F426-200D-1F525")) == "held_out"


# --- Counts -----------------------------------------------------------------------------------------------------------


def _count(items, *wanted):
    return sum((task, split) == wanted for task, split, _ in items)


def test_counts(items, drawings):
    assert 3250 <= len(drawings) <= 3311
    assert sum(drawing.tone is None for drawing in drawings.values()) >= 1600
    assert _count(items, "edit_tone", "train") + _count(items, "edit_tone", "held_out") == 330 * 6 * 5
    assert _count(items, "edit_gender", "train") + _count(items, "edit_gender", "held_out") >= 608
    assert _count(items, "edit_colour", "train") >= 174
    assert _count(items, "compose", "train") + _count(items, "compose", "held_out") >= 109
    for task in ("text_to_image", "edit_tone", "edit_gender"):
        held_out = _count(items, task, "held_out")
        assert 0.07 < held_out / (held_out + _count(items, task, "train")) < 0.15
    assert _count(items, "edit_colour", "held_out") >= 100
    assert _count(items, "edit_recolour", "train") == 30 / 24 * _count(items, "text_to_image_recolour", "train") > 7000
    assert _count(items, "edit_recolour", "held_out") >= 500


def test_ids_are_unique_and_name_the_task(items):
    ids = [example["id"] for _, _, example in items]
    assert len(set(ids)) == len(ids)
    assert all(example["id"].split("/")[0] == example["task"] == task for task, _, example in items)


def test_ids_hold_the_roles(items, drawings):
    for task, _, example in items:
        if task.startswith(("edit", "compose")):
            inputs, target = example["id"].split("/")[1 if task == "compose" else 2].split(">")
            assert [*inputs.split("+"), target] == _images(example)


def test_core_is_everyday_and_large_enough(built):
    core = [d for d in openmoji.load_catalogue(built)["drawings"].values() if d["core"]]
    assert sum(d["split"] == "train" for d in core) == 128
    assert sum(d["split"] == "held_out" for d in core) >= 40
    assert {"cat", "duck", "grapes", "house"} <= {d["name"] for d in core}
    assert max(len(d["name"].split()) for d in core) <= 2


# --- Wording ----------------------------------------------------------------------------------------------------------


def test_grammar(items):
    wrong = [
        r"\b(a|an|the) (a|an|the)\b(?! button)",
        r"\ban? (men|women|people|children|scissors|gloves|socks|eyes|bread)\b(?!'| crossing)",
        r"\ba ([ai]|o(?!ne))",
        r"\ba e(?!uro|we\b)",
        r"\ba u(?!ni)",
        r"\ban (?!hour|sos|ng|x-|up|um|un)[^aeio]",
        r"_|  |’|\{|\}",
    ]
    for content in set(_texts(items)):
        for pattern in wrong:
            assert not re.search(pattern, content), content


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("red apple", "a red apple"),
        ("apple", "an apple"),
        ("hourglass", "an hourglass"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("ewe", "a ewe"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("men holding hands", "men holding hands"),
        ("person lifting weights", "a person lifting weights"),
        ("cactus", "a cactus"),
        ("skis", "skis"),
        ("glass of milk", "a glass of milk"),
        ("cooked rice", "cooked rice"),
        ("sun", "the sun"),
        ("santa claus", "santa claus"),
    ],
)
def test_with_article(name, phrase):
    assert words.with_article(name) == phrase


def test_gender_instructions_agree_in_number(items):
    found = {t for task, _, example in items if task == "edit_gender" for t in _texts([(task, "", example)])}
    assert {"turn the man into a woman", "make them women", "change to a girl"} <= found
    assert not {t for t in found if re.search(r"\b(make it (wo)?men|make them a|an? (wo)?men)\b", t)}


@pytest.mark.parametrize(
    ("man", "states"),
    [
        ("1F468-200D-1F680", {"man", "woman"}),
        ("1F93C-200D-2642-FE0F", {"men", "women"}),
        ("1F468-1F3FB-200D-2764-FE0F-200D-1F468-1F3FB", {"men", "women"}),
        ("1F9DC-200D-2642-FE0F", {"merman", "mermaid"}),
        ("1F474-1F3FF", {"old man", "old woman"}),
    ],
)
def test_gender_families_name_what_is_drawn(drawings, man, states):
    families = {family.name: family for family in openmoji.list_families(drawings)}
    assert {state for _, state in families[f"gender-{man}"].members} == states


def test_a_colour_is_the_same_in_every_shape():
    shades = defaultdict(set)
    for shape, colours in openmoji._COLOURS.values():
        for colour, hexcode in colours.items():
            if shape in ("heart", "square", "circle", "diamond"):
                shades[colour].add(pictures.rasterise(hexcode, 36).getpixel((18, 18)))
    assert {colour: len(found) for colour, found in shades.items()} == dict.fromkeys(shades, 1)


def test_what_is_painted_is_clearly_of_that_colour(drawings):
    """Nothing else changes: where two members of a family differ, each has its own colour, or a blend with it."""
    families = [family for family in openmoji.list_families(drawings) if family.task == "edit_recolour"]
    names = {family.noun for family in families}
    assert {"cactus", "frog", "jeans"} <= names
    assert not names & {"black cat", "waving hand", "red heart", "full moon", "one o'clock"}
    for family in families[::20]:
        first, second = (np.asarray(pictures.rasterise(member, 288), int) for member, _ in family.members[:2])
        differ = np.abs(first - second).max(axis=-1) > 0
        assert 0.02 < differ.mean() < 0.9
        for picture, (_, colour) in zip((first, second), family.members):
            paint = [int(pictures.PALETTE[colour][i : i + 2], 16) for i in (1, 3, 5)]
            assert (picture[differ] == paint).all(axis=-1).mean() > 0.5


def test_parts_of_two_drawings_are_where_the_text_says(built):
    """Pixel by pixel; in a family, each of the two is the first in half of the pictures."""
    families = defaultdict(list)
    for path in _shards(built, "compose_parts", "held_out"):
        for record in ArrayRecordReader(str(path)).read_all():
            example = examples_lib.decode(record)
            *given, text, target = example["segments"]
            first, second, shown = (np.asarray(Image.open(io.BytesIO(s["image"]))) for s in (*given, target))
            along = {"put them beside each other": 1, "put the first above the second": 0}[text["text"]]
            is_first = np.indices((SIZE, SIZE))[along][..., None] < SIZE // 2
            np.testing.assert_array_equal(shown, np.where(is_first, first, second))
            families[example["id"].split("/")[1]].append((given[0]["image"], along))
    assert all(len(set(made)) == len(made) == 4 for made in families.values())


def test_white_is_not_painted_on_what_has_white(drawings):
    families = {f.noun: dict(f.members) for f in openmoji.list_families(drawings) if f.task == "edit_recolour"}
    assert any("white" in members.values() for members in families.values())
    for name in ("information sign", "japanese acceptable button"):
        assert "white" not in families[name].values()


def test_names_and_captions_are_distinct(drawings):
    names = [drawing.name for drawing in drawings.values()]
    assert len(set(names)) == len(names)
    owners = defaultdict(set)
    for drawing in (d for d in drawings.values() if d.tone is None):
        variants = words.captions(drawing.name, drawing.aliases, drawing.hexcode)
        assert len(set(variants)) == len(variants)
        for caption in variants:
            owners[caption].add(drawing.hexcode)
    assert all(len(found) == 1 for found in owners.values())


# --- Shards -----------------------------------------------------------------------------------------------------------


def test_every_example_decodes_and_is_counted(built):
    metadata = openmoji.load_metadata(built)
    for task in openmoji.TASKS:
        for split in openmoji.SPLITS:
            readers = [ArrayRecordReader(str(path)) for path in _shards(built, task, split)]
            decoded = [examples_lib.decode(record) for reader in readers for record in reader.read_all()]
            assert len(decoded) == metadata["counts"][task][split] > 0
            assert {example["task"] for example in decoded} == {task}
    assert "CC BY-SA 4.0" in metadata["attribution"]


def test_drawings_are_pictures_on_white(built):
    pngs = openmoji.load_drawings(built)
    catalogue = openmoji.load_catalogue(built)
    members = {member["hexcode"] for family in catalogue["families"].values() for member in family["members"]}
    assert pngs.keys() == catalogue["drawings"].keys() | members
    heart = np.asarray(Image.open(io.BytesIO(pngs["2764"])))
    assert heart.shape == (SIZE, SIZE, 3)
    assert heart[0, 0].tolist() == [255, 255, 255]
    red, green, blue = heart[SIZE // 2, SIZE // 2].tolist()
    assert red > 150
    assert max(green, blue) < 100


def test_tokens_are_about_words(built):
    tokenizer = text.load_tokenizer(built / "tokenizer")
    reader = ArrayRecordReader(str(_shards(built, "text_to_image_core", "train")[0]))
    captions = [examples_lib.decode(record)["segments"][0]["text"] for record in reader.read_all()]
    lengths = [len(ids) for ids in tokenizer(captions)["input_ids"]]
    assert np.mean(lengths) - np.mean([len(caption.split()) for caption in captions]) < 0.2
    assert max(lengths) <= MAX_TOKENS


def test_building_twice_gives_the_same_bytes(built, tmp_path):
    openmoji.build(tmp_path / "again", SIZE)
    assert _digests(built) == _digests(tmp_path / "again")


def test_a_second_run_does_nothing(built):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert not openmoji.build(built, SIZE)
    assert before == {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert [path.name for path in built.parent.iterdir()] == [built.name]


def _digests(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def test_another_size_in_the_same_place(built):
    with pytest.raises(UserError, match="holds drawings of 16 pixels"):
        openmoji.build(built, SIZE * 2)


def test_a_directory_with_other_things(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an OpenMoji dataset"):
        openmoji.build(tmp_path)


def test_a_missing_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match="pip install resvg-py"):
        openmoji.build(tmp_path / "openmoji")


def test_reading_what_is_not_there(tmp_path):
    for read in (openmoji.load_metadata, openmoji.load_catalogue, openmoji.load_drawings):
        with pytest.raises(UserError, match="does not exist: make it with"):
            read(tmp_path)


def test_the_door_answers_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "mmcore_jax.prepare", "--output", str(tmp_path / "file" / "openmoji")]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("stage", ["stage1_sft", "stage2_sft"])
def test_every_document_has_room_in_a_row(stage, built):
    file = str(tiny.REPOSITORY / f"configs/{stage}.py:openmoji_documents")
    reader = Reader(config_lib.load(file, tiny.flags(tiny.elsewhere(file, built))))
    assert {"compose_parts", "sequence_clock", "sequence_tone"} <= {source.name for source in reader.sources}
    for number, source in enumerate(reader.sources):
        for index in range(0, len(source), 7):
            reader.measure(number, index)  # raises what is too long
