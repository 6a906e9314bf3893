"""The report on the sources of a config, and the sheet of what the model will see, through the door `prepare`."""

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from mmcore_jax import config as config_lib
from mmcore_jax import prepare
from mmcore_jax.data import example, survey
from mmcore_jax.data.reader import Reader
from tests import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The tiny dataset, with a second shard of `edit_tone`: one example again, one damaged."""
    directory = tiny.write_dataset(tmp_path_factory.mktemp("data"))
    again = tiny.examples()["edit_tone"][0] | {"id": "again"}
    writer = ArrayRecordWriter(str(directory / "edit_tone-train-more.array_record"), "group_size:1")
    for record in (example.encode(again), b"damaged"):
        writer.write(record)
    writer.close()
    return directory


@pytest.fixture(scope="module")
def given(data):
    """Arguments of a stage 1 on it."""
    return [
        f"--config={tiny.REPOSITORY}/configs/stage1.py",
        *tiny.overrides("stage1", data),
        "--config.data.bad_record_limit=0.2",
    ]


def enter(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prepare", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        prepare.main()
    return stopped.value.code, capsys.readouterr()


def test_report(given, monkeypatch, capsys):
    code, printed = enter(given, monkeypatch, capsys)
    assert code == 0
    report = printed.out.split("\n\n")
    (tone,) = [part for part in report if part.strip().startswith("edit_tone")]
    count = len(tiny.examples()["edit_tone"])
    for line in (
        f"edit_tone: {count + 2} records",
        f"task edit_tone: {count + 1}",
        "duplicates: 1",
        "bad: 1: not a msgpack",
    ):
        assert line in tone
    assert f"pixels along a side, up to     16: {2 * (count + 1):>10}" in tone
    assert "duplicates: 0" in report[0]
    (used,) = [part for part in report if "share of each budget" in part]
    assert used.count("%") == 3  # of five budgets, which two are of the diffusion transformer


def test_a_survey_adds_up(given, data):
    config = config_lib.load(given[0].removeprefix("--config="), given[1:])
    reader = Reader(config)
    number = list(config.data.sources).index("edit_tone")
    whole = survey._count(reader, number, 0, len(reader.sources[number]))
    parts = [survey._count(reader, number, i, i + 1) for i in range(len(reader.sources[number]))]
    merged = survey._merge(parts)
    assert merged[:-1] == whole[:-1]
    np.testing.assert_array_equal(merged.hashes, whole.hashes)
    assert merged.hashes.dtype == np.uint64
    assert merged.duplicates == 1


def test_sheet(given, monkeypatch, capsys, tmp_path):
    """Two rows of each source, with all its images as the model sees them; `test_scores.py` has the page itself."""
    rows, draw = [], prepare.sheet
    monkeypatch.setattr(prepare, "sheet", lambda given, scale: rows.extend(given) or draw(given, scale))
    code, printed = enter([*given, "--show=2", f"--sheet={tmp_path / 'sheet.png'}"], monkeypatch, capsys)
    assert code == 0
    reader = Reader(config_lib.load(given[0].removeprefix("--config="), given[1:]))
    assert f"sheet.png: {2 * len(reader.sources)} examples" in printed.out.splitlines()[-1]
    prepared = reader.prepare(list(reader._data.sources).index("edit_tone"), 0)
    (row,) = [row for row in rows if row[0][1].startswith(f"{prepared.id}: ")]
    seen = [picture.vlm for picture in prepared.images if picture.vlm is not None]
    assert seen
    assert all(any(np.array_equal(image, cell) for cell, _ in row) for image in seen)
    assert Image.open(tmp_path / "sheet.png").width > 2 * 256


def test_what_carries_loss_stands_in_brackets(given):
    config = config_lib.load(given[0].removeprefix("--config="), given[1:])
    reader = Reader(config)
    number = list(config.data.sources).index("edit_tone")
    prepared = reader.prepare(number, 0)
    (_, text), *images = survey.view(prepared, reader.tokenizer)
    words = [segment["text"] for segment in reader.read(number, 0)["segments"] if segment["type"] == "text"]
    assert f"[{words[0]}]" in text.replace("[ ", "[")  # user text has a loss in this recipe
    assert "patches>" in text
    assert "queries>" in text
    assert [caption.split(",")[1].strip() for _, caption in images] == ["given", "generated"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nonsense=1"], "unrecognized arguments: --nonsense=1"),
        (["--dataset=openmoji", "--config=configs/stage1.py"], "not allowed with argument"),
    ],
)
def test_mistakes(arguments, words, monkeypatch, capsys):
    code, printed = enter(arguments, monkeypatch, capsys)
    assert code == 2
    assert words in printed.err
