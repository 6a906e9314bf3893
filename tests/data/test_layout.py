"""Every entry of every gather table points to the right thing, on hand-written documents."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from mmcore_jax.data import example, layout, packing
from mmcore_jax.data.example import BadExample
from mmcore_jax.nn import patches as patches_lib
from mmcore_jax.nn.masks import CLEAN, IMAGE, NOISED, PAD, QUERY, TEXT, VISUAL
from tests import rows
from tests.rows import BUDGETS, CHARACTERS, CHAT, SIZES, document

ROW = rows.pack(rows.INTERLEAVED, rows.DRAWING)
PICTURES = [rows.picture(seed) for seed in (1, 2, 3, 4)]  # by slot
OPEN, CLOSE = {"user": "\x01user\n", "assistant": "\x01assistant\n"}, "\x02\n"
QUERIES, MERGED, PATCHES = "\x03" + "\x05" * 4 + "\x04", "\x03" + "\x05" * 4 + "\x04", 4


def ids(row=ROW):
    """The text of a row, one character a token."""
    used = row.tokens.meta.kind[0] != PAD
    assert not used[used.sum() :].any()
    return CHARACTERS.decode(row.tokens.ids[0][used])


def test_tokens_are_the_chat_format():
    interleaved = (
        OPEN["user"] + MERGED + "ab" + CLOSE
        + OPEN["assistant"] + QUERIES + MERGED + CLOSE
        + OPEN["user"] + "c" + CLOSE
        + OPEN["assistant"] + QUERIES + MERGED + "ok\x02"
    )  # fmt: skip
    drawing = OPEN["user"] + "def" + CLOSE + OPEN["assistant"] + QUERIES
    assert ids() == interleaved + drawing
    expected = [0] * len(interleaved) + [1] * len(drawing)
    np.testing.assert_array_equal(ROW.tokens.meta.document[0, : len(expected)], expected)


@pytest.mark.parametrize(
    ("segments", "expected", "learned"),
    [
        (
            ["q", ("assistant", "a"), "r", ("assistant", "b")],
            "{user}q{close}{assistant}a{close}{user}r{close}{assistant}b\x02",
            "a\x02b\x02",
        ),
        ([("assistant", "a"), ("assistant", "b")], "{assistant}ab\x02", "ab\x02"),
        ([("assistant", "a"), -1], "{assistant}a{image}", "a"),
        (["q", -1, ("assistant", "a"), "r"], "{user}q{close}{assistant}{image}{image}a{close}{user}r", "a\x02"),
        ([1, 2, "q"], "{user}{image}{image}q", ""),
    ],
)  # fmt: skip
def test_turns_close_once_and_only_assistant_text_is_learned(segments, expected, learned):
    row = rows.pack(document("turns", *segments))
    assert ids(row) == expected.format(**OPEN, close=CLOSE, image=QUERIES)
    targets = row.tokens.targets[0]
    assert CHARACTERS.decode(targets[targets >= 0]) == learned
    np.testing.assert_array_equal(row.tokens.ids[0, 1:][targets[:-1] >= 0], targets[targets >= 0])


@pytest.mark.parametrize(
    ("segments", "ends"),
    [
        (["a hat", -1], 0),
        (["swap", 1, "and", 2, "now", -3], 0),
        (["why", ("assistant", "so"), "then", ("assistant", "yes")], 2),
        ([1, "what", ("assistant", "this"), -2, "thanks"], 0),
    ],
)
@pytest.mark.parametrize("limit", [None, 1])
def test_learning_the_users_text_changes_no_token(segments, ends, limit):
    """What a VLM reads is the same in all stages; every turn ends once, and the assistant learns to end its own."""
    plain, item = (layout.make_item(document("x", *segments), CHAT, SIZES, learns, limit) for learns in (False, True))
    np.testing.assert_array_equal(item.ids, plain.ids)
    turns = CHARACTERS.decode(item.ids).split("\x01")[1:]
    assert all(turn.endswith(CLOSE) and turn.count("\x02") == 1 for turn in turns[:-1])
    assert (item.learned & (item.ids == 2)).sum() == (0 if limit else ends)


def test_targets_are_the_next_tokens_of_assistant_text():
    targets = ROW.tokens.targets[0]
    (where,) = np.nonzero(targets >= 0)
    assert CHARACTERS.decode(targets[where]) == "ok\x02"
    np.testing.assert_array_equal(ROW.tokens.ids[0, where + 1], targets[where])


def test_positions():
    """Text counts on; a grid spans time and space from where it begins, and the next text stands behind its side."""
    row = rows.pack(document("positions", "a", 1, "b"))
    start = ids(row).index("\x05")
    time, y, x = row.tokens.positions[0, start : start + 6].T
    assert list(time) == [start] * 4 + [start + 2, start + 3]
    assert list(y - start) == [0, 0, 1, 1, 2, 3]
    assert list(x - start) == [0, 1, 0, 1, 2, 3]
    second = rows.pack(rows.DRAWING, document("positions", "a")).tokens
    assert second.positions[0][second.meta.document[0] == 1][0].tolist() == [0, 0, 0]


def test_image_tokens_point_to_their_merged_patches():
    """Through `source`, an IMAGE token at (row, column) gets the pixels of that corner of its image."""
    tokens, merge, patch = ROW.tokens, SIZES.merge, SIZES.vision_patch
    kinds, frames = tokens.meta.kind[0], tokens.meta.frame[0]
    values = ROW.patches.values[0].reshape(-1, merge, merge, patch, patch, 3)
    seen = {frame: np.flatnonzero((kinds == IMAGE) & (frames == frame)) for frame in range(4)}
    assert [len(seen[frame]) for frame in range(4)] == [4, 4, 4, 0]
    for frame in range(3):
        for index, token in enumerate(seen[frame]):
            y, x = (merge * patch * corner for corner in divmod(index, 2))
            block = values[tokens.source[0, token]].transpose(0, 2, 1, 3, 4).reshape(merge * patch, merge * patch, 3)
            np.testing.assert_array_equal(block, PICTURES[frame][y : y + merge * patch, x : x + merge * patch])


def test_patches_stand_where_their_metadata_says():
    meta, patch = ROW.patches.meta, SIZES.vision_patch
    used = np.flatnonzero(meta.kind[0] == IMAGE)
    assert len(used) == 3 * 4**2
    for number in used:
        y, x = meta.row[0, number] * patch, meta.col[0, number] * patch
        expected = PICTURES[meta.frame[0, number]][y : y + patch, x : x + patch]
        np.testing.assert_array_equal(ROW.patches.values[0, number].reshape(patch, patch, 3), expected)
    assert (meta.document[0, used] == 0).all()


def oblong(generate=None):
    """An example about an image of 8 x 20 pixels, at most 128 of which the VLM sees."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    segments = [example.image(buffer.getvalue()), example.text("what?"), example.text("a strip", "assistant")]
    if generate is not None:
        segments.append(example.image(generate, generate=True))
    sizes = dataclasses.replace(SIZES, vlm_pixels=(16, 128), target_size=6)
    one = example.validate({"id": "oblong", "task": "test", "segments": segments})
    return pixels, rows.pack(one, sizes=sizes), layout.lengths(layout.make_item(one, CHAT, sizes), sizes)


def test_the_vlm_sees_an_image_in_its_own_shape():
    """8 x 20 pixels shrink to 4 x 16: the nearest multiples of a merged patch within the limit, as published."""
    pixels, row, taken = oblong()
    meta = row.patches.meta
    used = meta.kind[0] == IMAGE
    assert taken.vision_patches == used.sum() == 2 * 8
    assert np.sum(row.tokens.meta.kind == IMAGE) == 1 * 4
    np.testing.assert_array_equal(meta.row[0, used], [0, 0, 1, 1] * 4)
    np.testing.assert_array_equal(meta.col[0, used], [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7])
    seen = np.zeros((2, 8, 2, 2, 3), np.uint8)
    seen[meta.row[0, used], meta.col[0, used]] = row.patches.values[0, used].reshape(-1, 2, 2, 3)
    expected = Image.fromarray(pixels).resize((16, 4), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(seen.swapaxes(1, 2).reshape(4, 16, 3), expected)
    assert not row.images.pixels.any()
    assert not row.images.targets.any()


def test_beside_a_generated_image_all_parts_see_the_same_square():
    pixels, row, taken = oblong(rows.png(7))
    assert taken.vision_patches == 4 * 4
    meta, square = row.patches.meta, pixels[:, 6:14]
    used = meta.kind[0] == IMAGE
    seen = np.zeros((4, 4, 2, 2, 3), np.uint8)
    seen[meta.row[0, used], meta.col[0, used]] = row.patches.values[0, used].reshape(-1, 2, 2, 3)
    np.testing.assert_array_equal(seen.swapaxes(1, 2).reshape(8, 8, 3), square)
    np.testing.assert_array_equal(row.images.pixels[0, :2], [square, rows.picture(7)])
    target = Image.fromarray(rows.picture(7)).resize((6, 6), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(row.images.targets[0, :2], [np.zeros((6, 6, 3)), target])


def test_images():
    np.testing.assert_array_equal(ROW.images.pixels[0, :4], PICTURES)
    np.testing.assert_array_equal(ROW.images.generated[0], [False, True, True, True, False, False])
    np.testing.assert_array_equal(ROW.images.number[0], [0, 1, 2, 0, 0, 0])
    kinds, frames = ROW.tokens.meta.kind[0], ROW.tokens.meta.frame[0]
    for slot in (1, 2, 3):
        where = ROW.images.queries[0, slot]
        np.testing.assert_array_equal(where, np.flatnonzero((kinds == QUERY) & (frames == slot)))
        np.testing.assert_array_equal(ROW.tokens.source[0, where], range(4))


def test_context_is_the_text_of_its_frame_and_its_queries():
    meta, source = ROW.diffusion.context_meta, ROW.diffusion.context_source[0]
    kinds, frames = meta.kind[0], meta.frame[0]
    for slot, text in ((1, "ab"), (2, "c"), (3, "def")):
        where = source[(kinds == TEXT) & (frames == slot)]
        assert CHARACTERS.decode(ROW.tokens.ids[0, where]) == text
        np.testing.assert_array_equal(source[(kinds == VISUAL) & (frames == slot)], slot * 4 + np.arange(4))
    assert set(frames[kinds != PAD]) == {1, 2, 3}
    np.testing.assert_array_equal(meta.document[0, kinds != PAD], np.where(frames == 3, 1, 0)[kinds != PAD])


def test_latents_are_copies_of_their_frames():
    meta, source = ROW.diffusion.latent_meta, ROW.diffusion.latent_source[0]
    kinds, frames = meta.kind[0], meta.frame[0]
    copies = {(int(kind), int(frame)) for kind, frame in zip(kinds, frames) if kind != PAD}
    # An input has no NOISED copy, and the last generated frame of a document no CLEAN one.
    assert copies == {(CLEAN, 0), (CLEAN, 1), (NOISED, 1), (NOISED, 2), (NOISED, 3)}
    for kind, frame in copies:
        where = (kinds == kind) & (frames == frame)
        np.testing.assert_array_equal(source[where], frame * PATCHES + np.arange(PATCHES))
        np.testing.assert_array_equal(meta.row[0, where], [-1, -1, 0, 0])
        np.testing.assert_array_equal(meta.col[0, where], [-1, 0, -1, 0])
        assert (meta.document[0, where] == (frame == 3)).all()


def test_latent_source_picks_the_patches_of_the_picture():
    """`latent_source` counts patches as `patchify` orders them."""
    size = SIZES.latent_patch
    flat = np.asarray(patches_lib.patchify(ROW.images.pixels, size)).reshape(-1, size * size * 3)
    meta = ROW.diffusion.latent_meta
    for number in np.flatnonzero(meta.kind[0] == NOISED):
        y, x = ((int(field[0, number]) + 1) * size for field in (meta.row, meta.col))
        expected = PICTURES[meta.frame[0, number]][y : y + size, x : x + size].reshape(-1)
        np.testing.assert_array_equal(flat[ROW.diffusion.latent_source[0, number]], expected)


def test_visual_tokens_stand_on_the_image_grid():
    """A 2 x 2 query grid over a 4 x 4 latent grid: each query at the middle of its quarter."""
    sizes = dataclasses.replace(SIZES, buckets=((4, 4),), latent_patch=2, latent_capacity=16)
    row = rows.pack(rows.DRAWING, sizes=sizes)
    meta = row.diffusion.context_meta
    where = meta.kind[0] == VISUAL
    assert list(zip(meta.row[0, where], meta.col[0, where])) == [(-1, -1), (-1, 1), (1, -1), (1, 1)]


def test_captions_have_no_diffusion_tokens():
    row = rows.pack(document("caption", 1, ("assistant", "a cat")))
    assert not row.diffusion.context_meta.kind.any()
    assert not row.diffusion.latent_meta.kind.any()
    assert not row.images.generated.any()


def test_what_is_unused_is_empty():
    row = rows.pack(rows.DRAWING)
    used = layout.lengths(layout.make_item(rows.DRAWING, CHAT, SIZES), SIZES)
    assert (row.tokens.meta.kind[0] != PAD).sum() == used.vlm_tokens
    assert (row.patches.meta.kind[0] != PAD).sum() == used.vision_patches == 0
    assert (row.diffusion.context_meta.kind[0] != PAD).sum() == used.context_tokens == 7
    assert (row.diffusion.latent_meta.kind[0] != PAD).sum() == used.latent_tokens == 4
    assert not row.tokens.ids[0, used.vlm_tokens :].any()
    assert (row.tokens.targets[0] == -1).all()
    for meta in (row.tokens.meta, row.patches.meta, row.diffusion.context_meta, row.diffusion.latent_meta):
        np.testing.assert_array_equal(meta.index[0], np.arange(meta.index.shape[1]))


def test_lengths_are_what_is_written():
    items = [layout.make_item(one, CHAT, SIZES) for one in (rows.INTERLEAVED, rows.DRAWING)]
    total = np.sum([layout.lengths(item, SIZES) for item in items], axis=0)
    kinds = (ROW.tokens.meta, ROW.patches.meta, ROW.diffusion.context_meta, ROW.diffusion.latent_meta)
    written = [int((meta.kind != PAD).sum()) for meta in kinds]
    assert [*written, 4] == total.tolist()


def test_shapes_do_not_depend_on_what_is_in_them():
    shapes = [
        jax.tree.map(np.shape, rows.pack(*examples)) for examples in ((rows.DRAWING,), (rows.INTERLEAVED, rows.DRAWING))
    ]
    assert shapes[0] == shapes[1]


def test_exceeded_names_the_budget():
    taken = layout.Lengths(5, 0, 0, 0, 7)
    assert layout.exceeded(taken, BUDGETS) == "more images than config.data.budgets.images 6"
    assert layout.exceeded(taken._replace(images=6), BUDGETS) is None


def test_pairs():
    image, tokens = layout.make_pair(document("pair", 1, "abcdef"), CHAT.encode, 4)
    assert image == rows.png(1)
    assert CHARACTERS.decode(tokens) == "abcd"
    batch = packing.assemble_pairs([(PICTURES[0], tokens[:2]), (PICTURES[1], tokens), None], 6, 8, 4)
    np.testing.assert_array_equal(batch.row, [6, 7, 8])
    np.testing.assert_array_equal(batch.valid, [[True, True, False, False], [True] * 4, [False] * 4])
    np.testing.assert_array_equal(batch.pixels, [*PICTURES[:2], np.zeros_like(PICTURES[0])])
    assert batch.ids[0].tolist() == [ord("a"), ord("b"), 0, 0]
    with pytest.raises(BadExample):
        layout.make_pair(document("no image", "abc"), CHAT.encode, 4)
