"""Scans: kept, used again only for what they were made of, the same with worker processes."""

import dataclasses
import json

import numpy as np
import pytest

from mmcore_jax.config import UserError
from mmcore_jax.data import scan
from mmcore_jax.data.example import BadExample
from mmcore_jax.data.reader import Reader
from tests.data.test_pipeline import data, make_config  # noqa: F401 (a fixture)


def plain(items, total, label):
    return items


def load(config, workers=0):
    return scan.load(config, Reader(config), 0, plain, workers)


@pytest.fixture
def config(data, tmp_path):  # noqa: F811
    """One source with damage, and an index that nothing else uses."""
    config = make_config(data, limit=0.5, sources=("partly",))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, index=str(tmp_path / "index")))


def test_a_scan_is_kept(config, tmp_path, monkeypatch):
    made = load(config)
    monkeypatch.setattr(scan, "_make", None)
    kept = load(config)
    np.testing.assert_array_equal(made.table, kept.table)
    assert (made.reasons, made.bad) == (kept.reasons, kept.bad)
    assert kept.usable.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10]
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_places_of_bad_records_are_logged_each_time(config, monkeypatch):
    """Of a kept scan too; no more than the first of each reason."""
    logged = []
    monkeypatch.setattr(scan.logging, "warning", lambda text, *values: logged.append(text % values))
    monkeypatch.setattr(scan, "_CASES_LOGGED", 1)
    budgets = dataclasses.replace(config.data.budgets, vlm_tokens=19)
    settings = dataclasses.replace(config.data, budgets=budgets, bad_record_limit=1.0)
    config = dataclasses.replace(config, data=settings)
    made = load(config)
    assert len(logged) == len(made.reasons) < sum(made.bad.values())
    first = list(logged)
    assert all(any(reason in line and "partly" in line for line in first) for reason in made.reasons)
    load(config)
    assert logged == first * 2


@pytest.mark.parametrize("what", ["budgets", "vlm_pixels", "tokenizer", "too_long", "shards"])
def test_a_scan_of_something_else_is_not_used(config, data, tmp_path, what):  # noqa: F811
    load(config)
    changed = config.data
    if what == "budgets":
        changed = dataclasses.replace(changed, budgets=dataclasses.replace(changed.budgets, vlm_tokens=70))
    if what == "vlm_pixels":
        changed = dataclasses.replace(changed, vlm_pixels=(64, 256))
    if what == "too_long":
        source = dataclasses.replace(changed.sources["partly"], too_long="truncate")
        changed = dataclasses.replace(changed, sources={"partly": source})
    if what == "shards":
        source = dataclasses.replace(changed.sources["partly"], shards=str(data / "drawings-*.array_record"))
        changed = dataclasses.replace(changed, sources={"partly": source})
    if what == "tokenizer":
        (tmp_path / "tokenizer").mkdir()
        for file in (data / "tokenizer").iterdir():
            (tmp_path / "tokenizer" / file.name).write_bytes(file.read_bytes())
        path = tmp_path / "tokenizer/tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text())))
        changed = dataclasses.replace(changed, tokenizer=str(tmp_path / "tokenizer"))
    load(dataclasses.replace(config, data=changed))
    assert len(list((tmp_path / "index").iterdir())) == 4


@pytest.mark.parametrize(
    ("count", "bad", "expected"),
    [
        (3, [], [2, 5, 8]),
        (3, [5], [2, 6, 8]),
        (3, [5, 6, 7], [2, 8, 9]),
        (3, range(3, 12), [2]),
        (20, [4], [2, 3, *range(5, 12)]),
    ],
)
def test_some_examples(count, bad, expected):
    """Evenly spaced, and in the place of a bad one the next."""

    def read(index):
        if index in bad:
            raise BadExample("damaged")
        return index

    found = scan.Scan(np.zeros(12, scan._RECORD), ["unusable"])
    found.table["reason"][:2] = 1
    assert found.some(count, read) == expected


def test_worker_processes_find_the_same(config, tmp_path, monkeypatch):
    alone = load(config)
    monkeypatch.setattr(scan, "_CHUNK", 3)
    together = load(
        dataclasses.replace(config, data=dataclasses.replace(config.data, index=str(tmp_path / "other"))), workers=2
    )
    np.testing.assert_array_equal(alone.table, together.table)
    assert alone.reasons == together.reasons


def test_an_index_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    settings = dataclasses.replace(config.data, index=str(tmp_path / "file/index"))
    with pytest.raises(
        UserError, match=r"cannot write the index of the data to .*name another place in config.data.index"
    ):
        load(dataclasses.replace(config, data=settings))
