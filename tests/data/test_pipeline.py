"""Batches from shards: one order whatever the number of processes, any step without replay, bad records counted."""

import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mmcore_jax import config, prepare
from mmcore_jax.config import UserError
from mmcore_jax.data import example, text
from mmcore_jax.data.pipeline import Batches, Ledger, check_contents
from mmcore_jax.data.sources import open_source
from mmcore_jax.data.sources.sharded import Sharded
from tests.rows import document, png

ROOT = pathlib.Path(__file__).parents[2]
STEPS, BATCH = 12, 4
WORDS = ["red", "green", "blue", "round", "square"]


def drawings(count):
    return [document(f"drawing-{i}", " ".join(WORDS[: 1 + i % 5]), -(1 + i)) for i in range(count)]


def edits(count):
    return [document(f"edit-{i}", 100 + i, "make it red", -(200 + i)) for i in range(count)]


def write(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory of shards and a tokenizer."""
    directory = tmp_path_factory.mktemp("data")
    encoded = [example.encode(one) for one in drawings(13)]
    write(directory / "drawings-00000-of-00002.array_record", encoded[:7])
    write(directory / "drawings-00001-of-00002.array_record", encoded[7:])
    write(directory / "edits-00000-of-00001.array_record", [example.encode(one) for one in edits(7)])
    headless, cut, endless = (document(name, "red", -1) for name in ("headless", "cut", "endless"))
    headless["segments"][1]["image"] = b"<html>404</html>"
    cut["segments"][1]["image"] = png(1)[:-30]
    endless["segments"][0]["text"] = "red " * 200
    records = [*encoded[:8], b"\xc1", *map(example.encode, (headless, cut, endless))]
    write(directory / "partly-00000-of-00001.array_record", records)
    text.train_tokenizer([" ".join(WORDS), "make it red", "user\n", "assistant\n"], 300, directory / "tokenizer")
    return directory


def array_record(shards, weight=1.0):
    return config.ArrayRecord(kind="array_record", shards=str(shards), weight=weight)


def make_config(data, layout="interleaved", limit=0.01, sources=("drawings", "edits"), window=10):
    """The shipped recipe, on this data."""
    shipped = config.load(str(ROOT / f"configs/{'stage0' if layout == 'pairs' else 'stage2'}.py"))
    named = {
        name: array_record(data / f"{name}-*.array_record", weight=3.0 if name == "drawings" else 1.0)
        for name in sources
    }
    settings = dataclasses.replace(
        shipped.data,
        sources=named,
        tokenizer=str(data / "tokenizer"),
        index=str(data / "index"),
        image_size=8,
        vlm_pixels=(64, 64),
        window=window,
        bad_record_limit=limit,
        budgets=config.Budgets(vlm_tokens=80, vision_patches=16, context_tokens=40, latent_tokens=24, images=4),
    )
    return dataclasses.replace(shipped, data=settings, total_steps=STEPS, batch_size=BATCH)


def join(slices):
    """The arrays of a global batch, from those of the processes."""
    return jax.tree.map(lambda *x: np.concatenate(x), *(batch.arrays for batch in slices))


@pytest.fixture(scope="module")
def expected(data):
    batches = Batches(make_config(data))
    return [batches[step] for step in range(STEPS)]


def test_batches_have_rows_of_several_examples(expected):
    for batch in expected:
        assert batch.arrays.row.tolist() == list(range(BATCH))
        assert len(batch.ids) == BATCH
        documents = batch.arrays.tokens.meta.document.max(axis=1) + 1
        np.testing.assert_array_equal(documents, [len(row) for row in batch.ids])
    assert max(len(row) for batch in expected for row in batch.ids) > 1


def test_pixels_are_those_of_the_ids(expected):
    """What stands in a row is what its ids say."""
    for row, names in enumerate(expected[0].ids):
        slot = 0
        for name in names:
            kind, number = name.split("-")
            seeds = [1 + int(number)] if kind == "drawing" else [100 + int(number), 200 + int(number)]
            for seed in seeds:
                image = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
                np.testing.assert_array_equal(expected[0].arrays.images.pixels[row, slot], image)
                slot += 1


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_order_does_not_depend_on_the_number_of_processes(data, expected, processes):
    parts = [Batches(make_config(data), index, processes) for index in range(processes)]
    for step in (0, 1, 5, STEPS - 1):
        slices = [part[step] for part in parts]
        chex.assert_trees_all_equal(join(slices), expected[step].arrays)
        assert list(itertools.chain(*(one.ids for one in slices))) == expected[step].ids


def test_200_steps_on_other_numbers_of_hosts(data):
    """The same examples in the same rows, also where a run stops and goes on with another number of hosts."""
    steps, rows = 200, 8
    settings = dataclasses.replace(make_config(data), total_steps=steps, batch_size=rows)
    whole = [(batch.ids, batch.position) for batch in Batches(settings)]
    expected = [ids for ids, _ in whole]
    for hosts in (2, 4, 8):
        parts = [Batches(settings, index, hosts) for index in range(hosts)]
        assert [global_ids(parts, step) for step in range(steps)] == expected
    step = int(np.random.default_rng(0).integers(steps))
    parts = [Batches(settings, index, 4, whole[step - 1][1]) for index in range(4)]
    assert [global_ids(parts, later) for later in range(step, steps)] == expected[step:]


def test_workers_end_with_a_run_that_is_killed(data, tmp_path):
    """What is left of a killed run would hold its memory for ever."""
    script = tmp_path / "run.py"
    script.write_text(
        "import dataclasses, multiprocessing, pathlib, sys, time\n"
        "from mmcore_jax.data.pipeline import Batches\n"
        "from tests.data.test_pipeline import make_config\n"
        "if __name__ == '__main__':\n"
        "    settings = make_config(pathlib.Path(sys.argv[1]))\n"
        "    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, workers=1))\n"
        "    batches = Batches(settings).iterate(0)\n"
        "    next(batches)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    with subprocess.Popen([sys.executable, script, data], stdout=subprocess.PIPE, text=True, env=environment) as run:
        worker = int(run.stdout.readline())
        os.kill(worker, 0)
        run.kill()
    for _ in range(100):
        time.sleep(0.1)
        path = pathlib.Path(f"/proc/{worker}/cmdline")
        if not path.exists() or not path.read_bytes():  # gone, or ended and not yet collected
            return
    raise AssertionError(f"process {worker} is still there")


def global_ids(parts, step):
    """What stands in the rows of a global batch, from those of the processes."""
    return [*itertools.chain(*(part[step].ids for part in parts))]


def test_any_step_without_replay(data, expected):
    fresh = Batches(make_config(data))
    for step in (9, 3, 11, 0):
        batch = fresh[step]
        chex.assert_trees_all_equal(batch.arrays, expected[step].arrays)
        assert batch.ids == expected[step].ids


def test_iterating_from_a_step(data, expected):
    for first in (0, 7):
        ids = [batch.ids for batch in Batches(make_config(data)).iterate(first)]
        assert ids == [batch.ids for batch in expected[first:]]


def test_threads_do_not_change_the_order(data, expected):
    """Several threads that plan windows at once agree with one that does."""
    batches = Batches(make_config(data))
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        ids = [batch.ids for batch in threads.map(batches.__getitem__, range(STEPS))]
    assert ids == [batch.ids for batch in expected]


def test_workers_and_another_number_of_processes_continue(data, expected):
    """A run that stops and goes on from its position, with another number of processes, and worker processes."""
    first = 5
    settings = make_config(data)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, workers=2))
    start = expected[first - 1].position
    parts = [Batches(settings, index, 2, start).iterate(first) for index in range(2)]
    for batch, *slices in zip(expected[first:], *parts, strict=True):
        chex.assert_trees_all_equal(join(slices), batch.arrays)
        assert list(itertools.chain(*(one.ids for one in slices))) == batch.ids
        assert [one.position for one in slices] == [batch.position] * 2
        np.testing.assert_array_equal(slices[0].drawn, batch.drawn)


def test_seeds_differ(data, expected):
    other = Batches(dataclasses.replace(make_config(data), seed=1))
    assert [other[step].ids for step in range(3)] != [batch.ids for batch in expected[:3]]


def test_bad_records_are_skipped_and_counted(data):
    """What the scan finds is not drawn; the image that is cut is found when it is read, and shifts no other example."""
    settings = make_config(data, limit=0.5, sources=("partly",))
    batches = Batches(settings)
    (scan,) = batches.scans
    assert scan.bad == {
        "not a msgpack record (FormatError)": 1,
        "image has no header of a known format": 1,
        "more vlm tokens than config.data.budgets.vlm_tokens 80": 1,
    }
    ledger, seen = Ledger(settings), []
    for step in range(STEPS):
        ledger.add(batches[step])
        seen += itertools.chain(*batches[step].ids)
    ((source, reason, count),) = ledger.record()["lost"]
    assert (source, reason) == ("partly", "image does not decode (OSError)")
    drawn = ledger.record()["drawn"][0]
    assert drawn == count + len(seen)
    assert set(seen) == {f"drawing-{i}" for i in range(8)}
    assert ledger.metrics() == {"data/share/partly": 1.0, "data/bad/partly": count}
    assert Ledger(settings, None, ledger.record()).record() == ledger.record()


def test_damaged_images_are_not_shown(data, tmp_path, capsys):
    """The scan does not see that one is cut: its header is whole."""
    batches = Batches(make_config(data, limit=0.5, sources=("partly",)))
    assert len(batches.scans[0].usable) == 9
    assert [one["id"] for one in batches.examples(9)] == [f"drawing-{i}" for i in range(8)]
    prepare._show(batches._reader, batches.scans, 9, tmp_path / "sheet.png")
    assert "sheet.png: 8 examples" in capsys.readouterr().out


def test_a_record_that_is_another_than_was_measured_is_left_out(data):
    """As where the images beside JSON lines are replaced: what is larger now would not fit into its row."""
    batches = Batches(make_config(data))
    table = np.array(batches.scans[0].table)
    table["lengths"][3, 0] -= 1
    batches.scans[0] = batches.scans[0]._replace(table=table)
    found = [batches[step] for step in range(STEPS)]
    assert {skipped.reason for batch in found for skipped in batch.skipped} == {
        "other tokens or images than when it was measured"
    }
    assert all("record 3" in skipped.where for batch in found for skipped in batch.skipped)


def test_a_tokenizer_with_more_tokens_than_the_vocabulary_is_refused(data):
    """Their embeddings would all be that of the last one."""
    for layout, part in (("interleaved", "vlm"), ("pairs", "vision_target.text")):
        settings = make_config(data, layout, sources=("drawings",))
        network = settings.model.vlm or settings.model.vision_target.text
        few = dataclasses.replace(network, vocab_size=100)
        if part == "vlm":
            model = dataclasses.replace(settings.model, vlm=few)
        else:
            target = dataclasses.replace(settings.model.vision_target, text=few)
            model = dataclasses.replace(settings.model, vision_target=target)
        with pytest.raises(UserError, match=f"has 3.. tokens, more than config.model.{part}.vocab_size 100"):
            Batches(dataclasses.replace(settings, model=model))


def test_what_the_order_follows_from_is_the_same_everywhere_and_later(data, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data, moved, ignore=shutil.ignore_patterns("index"))
    ours, theirs = Batches(make_config(data)).contents, Batches(make_config(moved)).contents
    check_contents([ours, theirs], ours)
    check_contents([ours], None)
    write(moved / "edits-more.array_record", [example.encode(one) for one in edits(1)])
    more = Batches(make_config(moved))
    assert {name for name in ours if more.contents[name] != ours[name]} == {"edits"}
    with pytest.raises(UserError, match=r"'edits' is not the same everywhere: process 2 of 3 finds"):
        check_contents([ours, ours, more.contents], ours)
    with pytest.raises(UserError, match=r"'edits' has other records than this run has drawn from so far"):
        check_contents([more.contents] * 2, ours)
    (table, reasons), scans = more.scans[0], more.scans
    table = np.array(table)
    table["reason"][3] = 1  # could not be read here
    more.scans = [type(scans[0])(table, reasons), *scans[1:]]
    del more.contents
    assert more.contents["drawings"] != ours["drawings"]


def test_other_processes_hash_no_shards(data, monkeypatch):
    pickled = pickle.dumps(Batches(make_config(data)))
    monkeypatch.setattr(Sharded, "fingerprint", None)
    assert len(pickle.loads(pickled)) == STEPS  # noqa: S301


def test_too_many_bad_records_stop_the_run(data):
    with pytest.raises(
        UserError, match=r"'partly' has 3 bad records of 12, more than config.data.bad_record_limit 0.1 allows"
    ):
        Batches(make_config(data, limit=0.1, sources=("partly",)))
    settings = make_config(data, limit=0.5, sources=("partly",))
    batches = Batches(settings)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, bad_record_limit=0.05))
    ledger = Ledger(settings)
    with pytest.raises(UserError, match=r"'partly' has . bad records of .*allows; most often .*image"):
        list(map(ledger.add, batches))


@pytest.mark.parametrize(("policy", "how"), [("truncate", "text truncated"), ("downscale", None)])
def test_too_long_for_a_row(data, policy, how):
    """`endless` has a text of 200 words, which smaller images do not help."""
    settings = make_config(data, limit=0.5, sources=("partly",))
    source = dataclasses.replace(settings.data.sources["partly"], too_long=policy)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, sources={"partly": source}))
    batches = Batches(settings)
    shortened = [case for step in range(STEPS) for case in batches[step].skipped if not case.lost]
    names = {name for step in range(STEPS) for row in batches[step].ids for name in row}
    assert {case.reason for case in shortened} == ({how} if how else set())
    assert ("endless" in names) == bool(how)


def test_missing_data(data):
    with pytest.raises(UserError, match="'nowhere' finds no shards at"):
        Batches(make_config(data, sources=("nowhere",)))


def test_a_missing_shard(data, tmp_path):
    (tmp_path / "tokenizer").symlink_to(data / "tokenizer")
    source = data / "drawings-00000-of-00002.array_record"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    with pytest.raises(UserError, match=r"lacks the shard .*drawings-00001-of-00002.array_record"):
        Batches(make_config(tmp_path, sources=("drawings",)))


def test_pairs(data):
    settings = make_config(data, layout="pairs")
    whole, parts = Batches(settings), [Batches(settings, index, 2) for index in range(2)]
    for step in (0, 5):
        chex.assert_trees_all_equal(join([part[step] for part in parts]), whole[step].arrays)
        assert [len(row) for row in whole[step].ids] == [1] * BATCH
    assert whole[0].arrays.valid.any(axis=1).all()


def test_an_empty_source_is_refused(tmp_path):
    write(tmp_path / "none-00000-of-00001.array_record", [])
    with pytest.raises(UserError, match="'none' is empty"):
        open_source("none", array_record(tmp_path / "none-*.array_record"))
