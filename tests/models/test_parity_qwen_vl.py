"""Qwen2.5-VL equals transformers on small random weights, through the key table and from the published arrays."""

import dataclasses
import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmcore_jax import config
from mmcore_jax.config import UserError
from mmcore_jax.models import qwen_vl
from mmcore_jax.nn import attention as attention_lib
from mmcore_jax.nn.masks import IMAGE
from mmcore_jax.pretrained import qwen_vl as keys
from mmcore_jax.pretrained import table as key_table
from tests.reference import randomise

TOLERANCE = 1e-4
IMAGE_ID, START_ID, END_ID = 290, 291, 292

VISION = config.QwenVision(
    width=32, depth=3, heads=2, mlp_width=48, patch_size=4, merge_size=2, window_size=16, full_attention_blocks=(1,)
)
TIED = config.QwenVL(
    width=64,
    depth=2,
    heads=4,
    mlp_width=96,
    vocab_size=300,
    kv_heads=2,
    mrope_section=(2, 3, 3),
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tie_embeddings=True,
    vision=VISION,
)
CONFIGS = {
    "tied": TIED,
    "untied": dataclasses.replace(TIED, tie_embeddings=False),
    "odd widths": dataclasses.replace(
        TIED,
        width=60,
        depth=3,
        heads=5,
        mlp_width=101,
        vocab_size=307,
        kv_heads=1,
        mrope_section=(1, 2, 3),
        tie_embeddings=False,
        vision=dataclasses.replace(VISION, width=24, heads=3, mlp_width=37, patch_size=3, window_size=18),
    ),
    "a key head for each query head": dataclasses.replace(
        TIED,
        depth=1,
        heads=2,
        kv_heads=2,
        mrope_section=(4, 6, 6),
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        vision=dataclasses.replace(VISION, depth=2, full_attention_blocks=(0, 1)),
    ),
    "merging 3 x 3, windows only": dataclasses.replace(
        TIED,
        heads=8,
        kv_heads=2,
        mrope_section=(2, 1, 1),
        vision=dataclasses.replace(VISION, patch_size=2, merge_size=3, window_size=12, full_attention_blocks=()),
    ),
}


@functools.cache
def make_reference(c):
    """The published implementation with every parameter random, and its state by the names of published files."""
    model = randomise(transformers.Qwen2_5_VLForConditionalGeneration(published_config(c)), 0.15, torch.bfloat16)
    return model, published_state(c, model.state_dict())


def published_config(c):
    return transformers.Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=c.width,
            num_hidden_layers=c.depth,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            intermediate_size=c.mlp_width,
            vocab_size=c.vocab_size,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters=dict(rope_type="default", mrope_section=list(c.mrope_section), rope_theta=c.rope_theta),
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=c.tie_embeddings,
        ),
        vision_config=dict(
            depth=c.vision.depth,
            hidden_size=c.vision.width,
            num_heads=c.vision.heads,
            intermediate_size=c.vision.mlp_width,
            patch_size=c.vision.patch_size,
            spatial_merge_size=c.vision.merge_size,
            temporal_patch_size=2,
            window_size=c.vision.window_size,
            fullatt_block_indexes=list(c.vision.full_attention_blocks),
            out_hidden_size=c.width,
            tokens_per_second=2,
        ),
        tie_word_embeddings=c.tie_embeddings,
        image_token_id=IMAGE_ID,
        vision_start_token_id=START_ID,
        vision_end_token_id=END_ID,
        video_token_id=293,
    )


def published_state(c, tensors):
    """NumPy arrays by the names of published files."""
    state = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value.numpy()
        for name, value in tensors.items()
    }
    if c.tie_embeddings:
        state.pop("lm_head.weight", None)
    return state


class Picture(NamedTuple):
    """An image of rows x cols merged patches."""

    seed: int
    rows: int
    cols: int


def text(seed, length):
    return np.random.default_rng(seed).integers(0, 280, length).tolist()


START, END = [START_ID], [END_ID]
# More than 600 tokens; images of different sizes: windows that divide them or not, and one inside a window.
LONG = [
    [*text(0, 20), *START],
    Picture(1, 3, 5),
    [*END, *text(1, 300), *START],
    Picture(2, 4, 2),
    [*END, *text(2, 250), *START],
    Picture(3, 1, 1),
    [*END, *text(3, 30)],
]
SHORT = [[*text(4, 5), *START], Picture(4, 2, 3), [*END, *text(5, 40)]]
FIRST = [START, Picture(5, 2, 2), [*END, *START], Picture(6, 1, 4), [*END, *text(7, 9)]]
PLAIN = [text(6, 77)]
BATCH = [LONG, SHORT, PLAIN, FIRST]


def arrays(c, rows, side="right"):
    """What the published processor makes of rows of text (lists of ids) and pictures."""
    ids, pixels, grids = [], [], []
    patch, merge = c.vision.patch_size, c.vision.merge_size
    for row in rows:
        ids.append([])
        for part in row:
            if isinstance(part, Picture):
                ids[-1] += [IMAGE_ID] * (part.rows * part.cols)
                shape = (part.rows * part.cols * merge**2, 6 * patch**2)
                pixels.append(np.random.default_rng(part.seed).normal(size=shape).astype(np.float32))
                grids.append((1, part.rows * merge, part.cols * merge))
            else:
                ids[-1] += part
    length = max(map(len, ids))
    before = [length - len(row) if side == "left" else 0 for row in ids]
    made = dict(input_ids=np.full((len(ids), length), 7), attention_mask=np.zeros((len(ids), length), int))
    for number, (row, start) in enumerate(zip(ids, before)):
        made["input_ids"][number, start : start + len(row)] = row
        made["attention_mask"][number, start : start + len(row)] = 1
    if pixels:
        made |= dict(pixel_values=np.concatenate(pixels), image_grid_thw=np.array(grids))
    return made


def run_theirs(theirs, given):
    return theirs(**tensors(given)).logits.float()


def tensors(given):
    made = {name: torch.from_numpy(value) for name, value in given.items()}
    if "pixel_values" in made:
        made["mm_token_type_ids"] = (made["input_ids"] == IMAGE_ID).int()
    return made


def make_model(c, **changes):
    settings = dict(compute_dtype="float32", frozen_dtype="float32", attention="dense", scan_layers=True, remat="none")
    return qwen_vl.QwenVLModel(c, config.Execution(**settings | changes))


def shapes(model):
    prompts = prepare(model.config, arrays(model.config, [SHORT]))
    boxed = jax.eval_shape(model.init, jax.random.key(0), prompts)["params"]
    return jax.tree.map(lambda leaf: leaf.unbox(), boxed, is_leaf=lambda leaf: hasattr(leaf, "unbox"))


def load(model, state):
    return key_table.load(keys.entries(model.config), state, shapes(model))


def prepare(c, given):
    return qwen_vl.prepare(c, **given, image_token=IMAGE_ID)


def difference(ours, theirs, given):
    valid = given["attention_mask"].astype(bool)
    return float(np.abs((np.asarray(ours) - theirs)[valid]).max())


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tied", {}),
        ("untied", dict(attention="blockwise")),
        ("odd widths", dict(scan_layers=False)),
        ("a key head for each query head", {}),
        ("merging 3 x 3, windows only", dict(attention="blockwise", scan_layers=False)),
    ],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits(name, changes, side, monkeypatch, record_property):
    monkeypatch.setattr(attention_lib, "BLOCK", 64)
    c = CONFIGS[name]
    theirs, state = make_reference(c)
    model = make_model(c, **changes)
    given = arrays(c, BATCH, side)
    assert given["input_ids"].shape[1] > 600
    with torch.no_grad():
        expected = run_theirs(theirs, given).numpy()
    ours = qwen_vl.forward(model, load(model, state), **given, image_token=IMAGE_ID)
    found = difference(ours, expected, given)
    record_property("max_difference", found)
    assert 0.3 < expected.std() < 3
    assert found < TOLERANCE


def test_text_alone(record_property):
    theirs, state = make_reference(TIED)
    given = arrays(TIED, [PLAIN, [text(8, 30)]])
    with torch.no_grad():
        expected = run_theirs(theirs, given).numpy()
    model = make_model(TIED)
    found = difference(qwen_vl.forward(model, load(model, state), **given), expected, given)
    record_property("max_difference", found)
    assert found < TOLERANCE


def test_misplaced_second_image_is_noticed():
    theirs, state = make_reference(TIED)
    given, model = arrays(TIED, [LONG]), make_model(TIED)
    with torch.no_grad():
        expected = run_theirs(theirs, given).numpy()
    prompts = prepare(TIED, given)
    second = (prompts.meta.kind == IMAGE) & (prompts.source >= 15) & (prompts.source < 23)
    assert second.sum() == 8
    broken = prompts._replace(positions=prompts.positions + second[..., None])
    assert difference(qwen_vl._forward(model, load(model, state), broken), expected, given) > 100 * TOLERANCE


def test_vision_tower(record_property):
    """The tower alone: window attention, rotary code and merger, over several images that are packed with padding."""
    c = CONFIGS["untied"]
    theirs, state = make_reference(c)
    given, model = arrays(c, BATCH), make_model(c)
    params, prompts = load(model, state), prepare(c, given)

    def merged(vision):
        tower = qwen_vl.VisionTower(vision, c.width, model.execution)
        tokens = jax.jit(tower.apply)({"params": params["vision"]}, prompts.patches, prompts.patch_meta)
        return np.asarray(tokens)[prompts.patch_meta.kind[:, :: vision.merge_size**2] == IMAGE]

    with torch.no_grad():
        out = theirs.model.visual(torch.from_numpy(given["pixel_values"]), torch.from_numpy(given["image_grid_thw"]))
    expected = out.pooler_output.numpy()
    found = float(np.abs(merged(c.vision) - expected).max())
    record_property("max_difference", found)
    assert found < TOLERANCE
    assert np.abs(merged(dataclasses.replace(c.vision, window_size=1024)) - expected).max() > 0.01


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_positions_are_those_of_the_published_code(name, side):
    c = CONFIGS[name]
    theirs, _ = make_reference(c)
    given = arrays(c, BATCH, side)
    made = tensors(given)
    positions, _ = theirs.model.get_rope_index(
        made["input_ids"], made["mm_token_type_ids"], made["image_grid_thw"], attention_mask=made["attention_mask"]
    )
    valid = given["attention_mask"].astype(bool)
    ours = prepare(c, given).positions
    np.testing.assert_array_equal(positions.permute(1, 2, 0).numpy()[valid], ours[valid])


# --- Gradients and precision ------------------------------------------------------------------------------------------


def test_gradients(record_property):
    """Of every parameter, the vision tower's included, for a random projection of the logits."""
    c = CONFIGS["odd widths"]
    theirs, state = make_reference(c)
    given, model = arrays(c, [SHORT, FIRST, PLAIN]), make_model(c)
    valid = given["attention_mask"].astype(bool)[..., None]
    weights = np.random.default_rng(0).normal(size=(*valid.shape[:2], c.vocab_size)).astype(np.float32)
    weights = weights * valid / np.sqrt(weights.size)
    theirs.zero_grad()
    (run_theirs(theirs, given) * torch.from_numpy(weights)).sum().backward()
    gradients = published_state(c, {name: parameter.grad for name, parameter in theirs.named_parameters()})
    expected = key_table.load(keys.entries(c), gradients, shapes(model))
    ours = gradient(model, load(model, state), prepare(c, given), weights)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    found = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), ours, expected)
    record_property("max_difference", max(jax.tree.leaves(found)))
    record_property("scale", scale)
    assert 0.3 < scale < 30
    assert max(jax.tree.leaves(found)) < TOLERANCE
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))


def gradient(model, params, prompts, weights):
    def loss(params):
        return jnp.sum(model.apply({"params": params}, prompts) * weights)

    return jax.jit(jax.grad(loss))(params)


def test_gradients_do_not_depend_on_how_the_program_runs():
    c = dataclasses.replace(TIED, vision=dataclasses.replace(VISION, depth=2))
    _, state = make_reference(c)
    given = arrays(c, [FIRST])
    weights = np.random.default_rng(0).normal(size=(*given["input_ids"].shape, c.vocab_size)).astype(np.float32)
    arguments = (load(make_model(c), state), prepare(c, given), weights / np.sqrt(weights.size))
    expected = gradient(make_model(c), *arguments)
    looped, unrolled = dict(scan_layers=True), dict(scan_layers=False)
    for changes in (looped | dict(remat="dots"), looped | dict(remat="full"), unrolled, unrolled | dict(remat="full")):
        chex.assert_trees_all_close(gradient(make_model(c, **changes), *arguments), expected, atol=2e-5)


def test_bfloat16_is_as_close_to_the_truth_as_the_published_code(record_property):
    c = CONFIGS["untied"]
    theirs, state = make_reference(c)
    given, model = arrays(c, BATCH), make_model(c, compute_dtype="bfloat16")
    valid = given["attention_mask"].astype(bool)
    with torch.no_grad():
        truth = run_theirs(theirs, given).numpy()[valid]
        half = transformers.Qwen2_5_VLForConditionalGeneration(published_config(c)).eval().bfloat16()
        half.load_state_dict(theirs.state_dict())
        published = run_theirs(half, given).numpy()[valid]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), load(model, state))
    ours = np.asarray(qwen_vl.forward(model, params, **given, image_token=IMAGE_ID))[valid]
    errors = {name: float(np.sqrt(np.mean((x - truth) ** 2))) for name, x in (("ours", ours), ("theirs", published))}
    for name, error in errors.items():
        record_property(name, error)
    assert 0 < errors["ours"] < 1.5 * errors["theirs"]


# --- Shapes and mistakes ----------------------------------------------------------------------------------------------


def published(width, depth, heads, kv_heads, mlp_width, vocab_size, tied):
    vision = config.QwenVision(1280, 32, 16, 3420, 14, 2, 112, (7, 15, 23, 31))
    return config.QwenVL(
        width, depth, heads, mlp_width, vocab_size, kv_heads, (16, 24, 24), 1e6, 1e-6, tied, vision
    )  # fmt: skip


@pytest.mark.parametrize(
    ("c", "count"),
    [
        (published(2048, 36, 16, 2, 11008, 151936, True), 3_754_622_976),
        (published(3584, 28, 28, 4, 18944, 152064, False), 8_292_166_656),
    ],
    ids=["3B", "7B"],
)
def test_parameter_counts(c, count):
    with torch.device("meta"):
        theirs = transformers.Qwen2_5_VLForConditionalGeneration(published_config(c))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(make_model(c)))) == count


def test_round_trip_of_the_table():
    c = CONFIGS["untied"]
    _, state = make_reference(c)
    like, table = shapes(make_model(c)), keys.entries(c)
    chex.assert_trees_all_equal(dict(key_table.export(table, key_table.load(table, state, like))), state)
    with pytest.raises(ValueError, match=r"'extra' is left over"):
        key_table.load(table, state | {"extra": state["model.norm.weight"]}, like)
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        key_table.load([entry for entry in table if entry.theirs != "model.norm.weight"], state, like)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given["image_grid_thw"].__setitem__((0, 0), 2), "2 time steps, a video"),
        (lambda given: given["image_grid_thw"].__setitem__((0, 1), 3), "multiple of 2 patches"),
        (lambda given: given["image_grid_thw"].__setitem__((0, 1), 6), r"\[6, 8\] image tokens a row"),
        (lambda given: given["input_ids"].__setitem__((0, 0), 300), "reach 300, outside the vocabulary of 300"),
        (lambda given: given.update(pixel_values=given["pixel_values"][1:]), r"shape \(55, 96\)"),
        (lambda given: given.update(pixel_values=None), r"shape \(0, 96\)"),
        (lambda given: given.update(image_grid_thw=None), r"images of \[\]"),
    ],
)
def test_mistakes_are_explained(change, message):
    given = arrays(TIED, [SHORT, FIRST])
    change(given)
    with pytest.raises(UserError, match=message):
        prepare(TIED, given)


def test_pixels_may_be_traced():
    _, state = make_reference(TIED)
    given, model = arrays(TIED, [SHORT]), make_model(TIED)
    params, pixels = load(model, state), given.pop("pixel_values")

    def total(pixels):
        return qwen_vl.forward(model, params, pixel_values=pixels, **given, image_token=IMAGE_ID).sum()

    assert np.abs(jax.grad(total)(pixels)).min(axis=1).max() > 0


def test_no_patches_at_all():
    """As in a batch of text alone."""
    assert qwen_vl.normalize(jnp.zeros((2, 0, 48), jnp.uint8)).shape == (2, 0, 96)
