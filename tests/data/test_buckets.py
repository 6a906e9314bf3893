"""Buckets of aspect ratios: which one an example takes, one crop for all of it, batches of one bucket each."""

import dataclasses
import io
import itertools
import math

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from mmcore_jax import config as config_lib
from mmcore_jax.config import Budgets, UserError
from mmcore_jax.data import example, geometry, layout, packing, survey, text
from mmcore_jax.data.layout import Picture
from mmcore_jax.data.pipeline import Batches
from mmcore_jax.nn.masks import CLEAN, NOISED, VISUAL
from tests import rows, tiny

STEPS, BATCH, WINDOW = 16, 4, 48
WIDE, TALL = (16, 33), (32, 16)  # height and width of images
SIZES = dataclasses.replace(rows.SIZES, buckets=((4, 4), (3, 5), (5, 3)), latent_patch=2, latent_capacity=16)


def png(seed, height, width):
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def drawing(name, seed, size):
    return {
        "id": name,
        "task": "test",
        "segments": [example.text("red"), example.image(png(seed, *size), generate=True)],
    }


def edit(name, seed, given, size):
    segments = [example.image(png(seed, *given)), example.text("red"), example.image(png(seed + 1, *size), True)]
    return {"id": name, "task": "test", "segments": segments}


def caption(name, seed):
    segments = [example.image(png(seed, *WIDE)), example.text("what?"), example.text("red", "assistant")]
    return {"id": name, "task": "test", "segments": segments}


# --- One example ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "ratio", "bucket"),
    [
        (64, 1.0, (64, 64)),
        (64, 16 / 9, (48, 85)),
        (64, 9 / 16, (85, 48)),
        (64, 2.0, (45, 90)),
        (64, 0.5, (90, 45)),
        (4, 2.0, (3, 5)),
        (4, 0.5, (5, 3)),
        (4, 10.0, (1, 10)),
    ],
)
def test_a_bucket_is_as_large_as_the_square(side, ratio, bucket):
    config = config_lib.load(
        str(tiny.REPOSITORY / "configs/stage2.py"),
        [
            "--config.model.dit.position_grid=96",
            f"--config.data.image_size={4 * side}",
            f"--config.data.aspect_ratios=({ratio}, 1.0)",
        ],
    )
    sizes = geometry.derive(config.model, config.data)
    assert sizes.buckets[0] == bucket
    assert sizes.drawn(bucket) == (4 * bucket[0], 4 * bucket[1])
    assert math.prod(bucket) <= sizes.latent_capacity == side**2


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ("()", "aspect_ratios is empty: name one at least"),
        ("(30.0,)", r"aspect_ratios\[0\] in .* is 30.0, expected 0.05 to 20"),
        ("(4.0,)", "aspect_ratios 4 at image_size 32 makes 16 latent patches a side, but .*position_grid 8"),
    ],
)
def test_mistakes(ratios, words):
    file = str(tiny.REPOSITORY / "configs/stage2.py")

    def derive():
        config = config_lib.load(file, [f"--config.data.aspect_ratios={ratios}"])
        return geometry.derive(config.model, config.data)

    with pytest.raises(UserError, match=words):
        derive()


@pytest.mark.parametrize(
    ("size", "bucket"), [((9, 8), (4, 4)), (WIDE, (3, 5)), ((64, 75), (4, 4)), ((64, 90), (3, 5)), (TALL, (5, 3))]
)
def test_an_example_takes_the_nearest_bucket(size, bucket):
    item = layout.make_item(edit("edit", 0, (8, 8), size), rows.CHAT, SIZES)
    assert [frame.shape for frame in item.frames] == [bucket, bucket]
    taken = layout.lengths(item, SIZES)
    assert taken.latent_tokens == 2 * math.prod(bucket)
    assert layout.make_item(caption("caption", 0), rows.CHAT, SIZES).frames[0].shape is None


def test_all_images_of_an_edit_are_cropped_alike():
    """The bucket of 3 x 5 patches of the target, 16 x 33, leaves 16 x 27 of it, and 19 x 32 of the source, 32 x 32."""
    item = layout.make_item(
        edit("edit", 3, (32, 32), WIDE), rows.CHAT, dataclasses.replace(SIZES, vlm_pixels=(16, 640))
    )
    source, target = (layout.picture(frame, SIZES) for frame in item.frames)
    left = Image.fromarray(pixels(3, 32, 32)).crop((0, 6, 32, 25))
    right = Image.fromarray(pixels(4, *WIDE)).crop((3, 0, 30, 16))
    for picture, crop in ((source, left), (target, right)):
        expected = crop.resize((10, 6), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(picture.pixels, expected)
    assert item.frames[0].size == (20, 32)  # multiples of 4 near to the crop
    np.testing.assert_array_equal(source.vlm, left.resize((32, 20), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(target.target, right.resize((8, 8), Image.Resampling.BICUBIC))


def test_tokens_of_several_buckets_in_a_row():
    """Latents given, they stand beside each other: each frame's patches, and its queries spread over it."""
    shown = geometry.without(SIZES, ["latents"])
    row = []
    for one in (drawing("wide", 1, WIDE), edit("tall", 2, WIDE, TALL)):
        item = layout.make_item(one, rows.CHAT, SIZES)
        row.append((item, [Picture() for _ in item.frames]))
    batch = packing.assemble([row], 0, Budgets(200, 0, 40, 60, 3), shown)
    assert batch.images.pixels.size == 0
    meta, source = batch.diffusion.latent_meta, batch.diffusion.latent_source[0]
    for kind, slot, (height, width) in ((NOISED, 0, (3, 5)), (CLEAN, 1, (5, 3)), (NOISED, 2, (5, 3))):
        where = (meta.kind[0] == kind) & (meta.frame[0] == slot)
        expected = np.mgrid[:height, :width].reshape(2, -1) - [[(height + 1) // 2], [(width + 1) // 2]]
        np.testing.assert_array_equal([meta.row[0, where], meta.col[0, where]], expected)
        np.testing.assert_array_equal(source[where], 16 * slot + np.arange(height * width))
    meta = batch.diffusion.context_meta
    where = meta.kind[0] == VISUAL
    assert list(zip(meta.frame[0, where], meta.row[0, where], meta.col[0, where])) == [
        *((0, -2, -2), (0, -2, 0), (0, 0, -2), (0, 0, 0)),
        *((2, -2, -2), (2, -2, 0), (2, 0, -2), (2, 0, 0)),
    ]


# --- Batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards of drawings of three shapes, edits of two, captions, and a tokenizer."""
    directory = tmp_path_factory.mktemp("data")
    sizes = [(16, 16), WIDE, TALL]
    sources = {
        "drawings": [drawing(f"drawing-{i}", i, sizes[i % 3]) for i in range(41)],
        "edits": [edit(f"edit-{i}", 100 + i, sizes[i % 3], sizes[i % 2]) for i in range(17)],
        "captions": [caption(f"caption-{i}", 200 + i) for i in range(11)],
    }
    for name, examples in sources.items():
        writer = ArrayRecordWriter(str(directory / f"{name}-00000-of-00001.array_record"), "group_size:1")
        for one in examples:
            writer.write(example.encode(one))
        writer.close()
    text.train_tokenizer(["red what?", "user\n", "assistant\n"], 300, directory / "tokenizer")
    return directory


def make_config(data, ratios=(1.0, 2.0, 0.5), required=(), window=WINDOW):
    """The shipped recipe, on this data."""
    shipped = config_lib.load(str(tiny.REPOSITORY / "configs/stage2.py"))
    weights = {"drawings": 3.0, "edits": 1.0, "captions": 1.0}
    sources = {
        name: config_lib.ArrayRecord(
            kind="array_record", shards=f"{data}/{name}-*.array_record", weight=weight, required=name in required
        )
        for name, weight in weights.items()
    }
    settings = dataclasses.replace(
        shipped.data,
        sources=sources,
        tokenizer=str(data / "tokenizer"),
        index=str(data / "index"),
        image_size=16,
        aspect_ratios=ratios,
        vlm_pixels=(64, 256),
        window=window,
        budgets=Budgets(vlm_tokens=110, vision_patches=32, context_tokens=40, latent_tokens=32, images=3),
    )
    return dataclasses.replace(shipped, data=settings, total_steps=STEPS, batch_size=BATCH)


@pytest.fixture(scope="module")
def expected(data):
    batches = Batches(make_config(data))
    return [batches[step] for step in range(STEPS)]


def test_a_batch_has_one_bucket(expected):
    """That of all its images, and captions beside them."""
    assert {batch.arrays.images.pixels.shape[2:4] for batch in expected} == {(16, 16), (12, 20), (20, 12)}
    assert any(name.startswith("caption") for batch in expected for row in batch.ids for name in row)
    for batch in expected:
        meta = batch.arrays.diffusion.latent_meta
        size = batch.arrays.images.pixels.shape[2] * batch.arrays.images.pixels.shape[3] // 16
        for b, ids in enumerate(batch.ids):
            copies = sum(name.startswith("drawing") + 2 * name.startswith("edit") for name in ids)
            assert np.count_nonzero(meta.kind[b]) == copies * size
            assert batch.arrays.images.generated[b].sum() == sum(not name.startswith("caption") for name in ids)
        assert any(batch.ids)


def test_images_lose_nothing_but_the_crop(expected):
    """What stands in a row is what its ids say, scaled by area or bicubically."""
    for batch in expected[:6]:
        height, width = batch.arrays.images.pixels.shape[2:4]
        for b, names in enumerate(batch.ids):
            if not names or not names[0].startswith("drawing"):
                continue
            number = int(names[0].split("-")[1])
            size = [(16, 16), WIDE, TALL][number % 3]
            image = Image.fromarray(pixels(number, *size))
            box = layout.image_lib.middle(image, (height, width))
            found = batch.arrays.images.pixels[b, 0]
            np.testing.assert_array_equal(found, layout.image_lib.scale(image, height, width, box))


def test_windows_begin_with_batches_and_lose_no_example(data):
    planner = Batches(make_config(data))._planner
    position = planner.start
    for window in range(1, 6):
        following = planner.after(position)
        draws = [draw for row in range(position.row, following.row) for draw in planner.row(row)]
        assert len(draws) == WINDOW
        assert (following.window, following.row % BATCH) == (window, 0)
        position = following


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_order_does_not_depend_on_the_number_of_hosts(data, expected, hosts):
    """Nor on where a run stops: it goes on from a position with another number of hosts."""
    step = 5
    for start, first in ((None, 0), (expected[step - 1].position, step)):
        parts = [Batches(make_config(data), index, hosts, start) for index in range(hosts)]
        for number in range(first, STEPS, 3):
            slices = [part[number] for part in parts]
            assert [*itertools.chain(*(one.ids for one in slices))] == expected[number].ids
            found = np.concatenate([one.arrays.images.pixels for one in slices])
            np.testing.assert_array_equal(found, expected[number].arrays.images.pixels)
            assert [one.position for one in slices] == [expected[number].position] * hosts


def test_a_required_source_is_in_every_batch_of_every_bucket(data):
    for required in ((), ("drawings",)):
        batches = Batches(make_config(data, required=required, window=96))
        holding = [any("drawing" in name for row in batches[step].ids for name in row) for step in range(STEPS)]
        assert all(holding) >= bool(required)
    with pytest.raises(UserError, match="'captions' is required in every batch, but stands in"):
        Batches(make_config(data, required=("captions",), window=24))


def test_a_report_counts_buckets(data):
    batches = Batches(make_config(data))
    lines = [survey.bucket_lines(batches._reader, found) for found in batches.scans]
    assert lines[0] == ["aspect ratio 1.00: 14", "aspect ratio 1.67: 14", "aspect ratio 0.60: 13"]
    assert lines[2] == ["aspect ratio 1.00: 0", "aspect ratio 1.67: 0", "aspect ratio 0.60: 0"]  # of captions


def test_all_is_packed_together_where_latents_are_given(data):
    """One bucket, or none to encode: rows and order are those of the packing alone."""
    config = make_config(data)
    given = dataclasses.replace(config, data=dataclasses.replace(config.data, features=("latents",)))
    assert geometry.one_bucket(config)
    assert not geometry.one_bucket(given)
    assert not geometry.one_bucket(make_config(data, ratios=(1.0,)))
    assert not geometry.one_bucket(dataclasses.replace(config, model=dataclasses.replace(config.model, dit=None)))
