"""SigLIP and SigLIP2 equal transformers on small random weights, through the key table."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmcore_jax import config
from mmcore_jax.models import siglip
from mmcore_jax.models.siglip import SiglipModel
from mmcore_jax.nn.patches import patchify
from mmcore_jax.pretrained import siglip as keys
from mmcore_jax.pretrained import table as key_table
from tests.reference import randomise, state_of

TOLERANCE = 1e-4
CONFIG = config.Siglip(
    vision=config.SiglipVision(width=32, depth=3, heads=4, mlp_width=48, image_size=24, patch_size=4),
    text=config.SiglipText(width=32, depth=2, heads=2, mlp_width=40, vocab_size=100, max_length=17),
)


def run_everything(model, images, ids, valid):
    return model.patch_features(images), *model(images, ids, valid)


def build(c, naflex=False):
    """Their model of the sizes of ours."""

    def tower(c):
        return dict(
            hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads, intermediate_size=c.mlp_width
        )

    text = tower(c.text) | dict(vocab_size=c.text.vocab_size, max_position_embeddings=c.text.max_length)
    text |= dict(bos_token_id=0, eos_token_id=1, projection_size=c.vision.width)
    vision = tower(c.vision) | dict(patch_size=c.vision.patch_size)
    if naflex:
        vision |= dict(num_patches=(c.vision.image_size // c.vision.patch_size) ** 2)
        return transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
    vision |= dict(image_size=c.vision.image_size)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))


def randomised(model):
    """The published implementation with every parameter random, and its state."""
    return randomise(model, 0.2), state_of(model)


@pytest.fixture(scope="module")
def published():
    return randomised(build(CONFIG))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 24, 24, 3), np.uint8)
    ids = rng.integers(0, 100, (3, CONFIG.text.max_length), np.int32)
    valid = np.arange(CONFIG.text.max_length) < np.array([[17], [1], [9]])
    return images, ids, valid


def pixels(images):
    return torch.from_numpy((images / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2).copy())


def load(state, inputs, execution):
    model = SiglipModel(CONFIG, execution)
    like = jax.eval_shape(lambda key: model.init(key, *inputs, method=run_everything), jax.random.key(0))["params"]
    like = jax.tree.map(lambda leaf: leaf.unbox(), like, is_leaf=lambda leaf: hasattr(leaf, "unbox"))
    return model, like, jax.tree.map(jnp.asarray, key_table.load(keys.entries(CONFIG), state, like))


@pytest.mark.parametrize("scan", [True, False])
def test_towers_and_logits(published, inputs, scan, record_property):
    theirs, state = published
    images, ids, valid = inputs
    execution = config.Execution("float32", "float32", "dense", scan, "none")
    model, _, params = load(state, inputs, execution)
    features, image, text, logits = jax.jit(
        lambda params: model.apply({"params": params}, *inputs, method=run_everything)
    )(params)

    with torch.no_grad():
        vision = theirs.vision_model(pixels(images))
        pooled = [
            theirs.text_model(torch.from_numpy(row[:n][None]).long()).pooler_output for row, n in zip(ids, valid.sum(1))
        ]
        unit_image = torch.nn.functional.normalize(vision.pooler_output)
        unit_text = torch.nn.functional.normalize(torch.cat(pooled))
        their_logits = unit_text @ unit_image.T * theirs.logit_scale.exp() + theirs.logit_bias
    expected = [x.numpy() for x in (vision.last_hidden_state, unit_image, unit_text, their_logits)]
    found = max(float(np.abs(a - b).max()) for a, b in zip((features, image, text, logits), expected))
    record_property("max_difference", found)
    assert np.abs(expected[0]).mean() > 0.1
    assert found < TOLERANCE


def test_the_sigmoid_loss_begins_as_the_config_says(inputs):
    c = dataclasses.replace(CONFIG, initial_scale=4.0, initial_bias=-2.0)
    model = SiglipModel(c, config.Execution("float32", "float32", "dense", True, "none"))
    (image, text, logits), _ = model.init_with_output(jax.random.key(0), *inputs)
    np.testing.assert_allclose(logits, 4 * text @ image.T - 2, atol=1e-5)


def test_whole_published_model(published, inputs):
    """Texts of full length through their own forward pass: which logits are whose, and the place of scale and bias."""
    theirs, state = published
    images, ids, _ = inputs
    everything = np.ones(ids.shape, bool)
    model, _, params = load(
        state, (images, ids, everything), config.Execution("float32", "float32", "blockwise", True, "none")
    )
    *_, logits = jax.jit(model.apply)({"params": params}, images, ids, everything)
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids).long(), pixel_values=pixels(images)).logits_per_text.numpy()
    chex.assert_trees_all_close(np.asarray(logits), expected, atol=TOLERANCE, rtol=0)


def test_padding_does_not_matter(published, inputs):
    images, ids, valid = inputs
    model, _, params = load(published[1], inputs, config.Execution("float32", "float32", "dense", True, "none"))
    run = jax.jit(lambda ids: model.apply({"params": params}, images, ids, valid)[1])
    chex.assert_trees_all_equal(run(jnp.asarray(ids)), run(jnp.where(valid, ids, 7)))
    assert not np.array_equal(run(jnp.asarray(ids)), run(jnp.asarray(ids).at[0, 16].set(7)))


def test_tables(published, inputs):
    _, state = published
    _, like, params = load(state, inputs, config.Execution("float32", "float32", "dense", True, "none"))
    chex.assert_trees_all_equal(dict(key_table.export(keys.entries(CONFIG), params)), state)
    vision_only = keys.entries(dataclasses.replace(CONFIG, text=None))
    vision_state = {name: x for name, x in state.items() if name.startswith("vision_model")}
    chex.assert_trees_all_equal(
        key_table.load(vision_only, vision_state, {"vision": like["vision"]})["vision"], params["vision"]
    )


# --- SigLIP2 ----------------------------------------------------------------------------------------------------------

FLOAT32 = config.Execution("float32", "float32", "blockwise", True, "none")
ODD = config.Siglip(
    vision=config.SiglipVision(width=72, depth=2, heads=3, mlp_width=50, image_size=30, patch_size=4),
    text=config.SiglipText(width=40, depth=3, heads=5, mlp_width=33, vocab_size=100, max_length=11),
)
GRIDS = {"square": [(6, 6), (3, 9), (11, 2)], "wide": [(7, 7), (1, 40), (5, 4)]}  # coarser and finer than the table
PUBLISHED = {
    "so400m/14-384": (False, (1152, 27, 16, 4304, 384, 14), (1152, 27, 16, 4304, 32_000, 64)),
    "so400m/16-naflex": (True, (1152, 27, 16, 4304, 256, 16), (1152, 27, 16, 4304, 256_000, 64)),
    "giant-opt/16-256": (False, (1536, 40, 16, 6144, 256, 16), (1152, 27, 16, 4304, 256_000, 64)),
}


def reading(c, naflex):
    return dataclasses.replace(c, vision=dataclasses.replace(c.vision, naflex=naflex))


def abstract(c):
    images = jnp.zeros((1, c.vision.image_size, c.vision.image_size, 3), jnp.uint8)
    ids = jnp.zeros((1, c.text.max_length), jnp.int32)
    like = jax.eval_shape(SiglipModel(c, FLOAT32).init, jax.random.key(0), images, ids, ids >= 0)["params"]
    return jax.tree.map(lambda leaf: leaf.unbox(), like, is_leaf=lambda leaf: hasattr(leaf, "unbox"))


@functools.cache
def siglip2(c, naflex):
    """Their random model; ours with its parameters."""
    theirs, state = randomised(build(c, naflex))
    params = jax.tree.map(jnp.asarray, key_table.load(keys.entries(reading(c, naflex)), state, abstract(c)))
    return theirs, functools.partial(SiglipModel(c, FLOAT32).apply, {"params": params}), state, params


def padded_patches(c, grids):
    """Images of these grids as the processor would give them: patches and padding `[B, S, P]`, mask, grids."""
    rng, size = np.random.default_rng(0), c.vision.patch_size
    length = max(rows * cols for rows, cols in grids) + 3
    patches = np.full((len(grids), length, 3 * size**2), 9.0, np.float32)  # padding that would be noticed
    mask = np.zeros((len(grids), length), np.int64)
    for row, (height, width) in enumerate(grids):
        patches[row, : height * width] = patchify(rng.normal(size=(height * size, width * size, 3)), size)
        mask[row, : height * width] = 1
    return patches, mask, np.array(grids, np.int32)


def naflex_difference(c, grids):
    theirs, ours, *_ = siglip2(c, True)
    patches, mask, grids = padded_patches(c, grids)
    features, pooled = jax.jit(functools.partial(ours, method="naflex_features"))(patches, grids)
    with torch.no_grad():
        expected = theirs.vision_model(*(torch.from_numpy(x) for x in (patches, mask, grids.astype(np.int64))))
    expected_features = expected.last_hidden_state.numpy()
    assert np.abs(expected_features[mask > 0]).mean() > 0.1
    assert np.abs(expected.pooler_output.numpy()).mean() > 0.1
    return max(
        float(np.abs(np.asarray(features) - expected_features)[mask > 0].max()),
        float(np.abs(np.asarray(pooled) - expected.pooler_output.numpy()).max()),
    )


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("c", [CONFIG, ODD], ids=["even", "odd"])
def test_naflex(c, grids, record_property):
    found = naflex_difference(c, GRIDS[grids])
    record_property("max_difference", found)
    assert found < TOLERANCE


def without_antialiasing(position, count, side):
    scale = side / count.astype(jnp.float32)
    center = jnp.clip((position + 0.5) * scale - 0.5, 0, side - 1)[..., None]
    return jnp.maximum(0.0, 1.0 - jnp.abs(jnp.arange(side) - center))


def test_naflex_without_antialiasing_is_noticed(monkeypatch):
    monkeypatch.setattr(siglip, "_triangle", without_antialiasing)
    assert naflex_difference(CONFIG, GRIDS["square"]) > 100 * TOLERANCE


def test_naflex_padding_does_not_matter():
    """Not one bit of it reaches the image, which has the same result in a batch of its own, without padding."""
    _, ours, *_ = siglip2(CONFIG, True)
    run = jax.jit(functools.partial(ours, method="naflex_features"))
    patches, mask, grids = padded_patches(CONFIG, GRIDS["square"])
    features, pooled = run(patches, grids)
    other_features, other_pooled = run(np.where(mask[..., None] > 0, patches, -5.0).astype(np.float32), grids)
    chex.assert_trees_all_equal(pooled, other_pooled)
    chex.assert_trees_all_equal(features[mask > 0], other_features[mask > 0])
    alone, pooled_alone = run(patches[1:2, :27], grids[1:2])
    chex.assert_trees_all_close(alone[0], features[1, :27], atol=1e-5, rtol=0)
    chex.assert_trees_all_close(pooled_alone[0], pooled[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(6, 6), (3, 9), (16, 1), (13, 17)])
def test_resized_positions(grid):
    table = np.random.default_rng(0).normal(size=(36, 5)).astype(np.float32)
    found = jax.jit(siglip.resize_positions, static_argnums=2)(table, np.array([grid], np.int32), math.prod(grid))
    # Channels last in memory, as transformers has it: torch 2.13 resizes other layouts to one column wrongly.
    image = torch.from_numpy(table.reshape(1, 6, 6, 5)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, size=grid, mode="bilinear", align_corners=False, antialias=True)
    chex.assert_trees_all_close(np.asarray(found[0]), expected[0].numpy().reshape(5, -1).T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("c", [CONFIG, ODD], ids=["even", "odd"])
def test_fixed_resolution_and_padded_text(c, record_property):
    """What remains of an image beside whole patches is not read; padding of texts is, and the last position counts."""
    theirs, ours, *_ = siglip2(c, False)
    rng, side = np.random.default_rng(1), c.vision.image_size
    images = rng.integers(0, 256, (3, side, side, 3), np.uint8)
    ids = rng.integers(2, 100, (2, c.text.max_length), np.int32)
    ids[0, 3:], ids[1, 8:] = 1, 1

    def run(model, images, ids):
        return *model.features(images), model.text(ids, jnp.ones(ids.shape, bool)), model(images, ids, ids >= 0)[2]

    found = jax.jit(functools.partial(ours, method=run))(images, ids)
    with torch.no_grad():
        vision, text = theirs.vision_model(pixels(images)), theirs.text_model(torch.from_numpy(ids).long())
        logits = theirs(input_ids=torch.from_numpy(ids).long(), pixel_values=pixels(images)).logits_per_text
    expected = vision.last_hidden_state, vision.pooler_output, text.pooler_output, logits
    differences = [float(np.abs(a - b.numpy()).max()) for a, b in zip(found, expected)]
    record_property("max_difference", max(differences))
    assert all(x.abs().mean() > 0.1 for x in expected)
    assert max(differences) < TOLERANCE


def test_naflex_text_tower(record_property):
    theirs, ours, *_ = siglip2(ODD, True)
    ids = np.random.default_rng(2).integers(2, 100, (3, ODD.text.max_length), np.int32)
    ids[:, 5:] = 1
    found = ours(ids, np.ones(ids.shape, bool), method=lambda model, *given: model.text(*given))
    with torch.no_grad():
        expected = theirs.text_model(torch.from_numpy(ids).long()).pooler_output.numpy()
    record_property("max_difference", float(np.abs(found - expected).max()))
    assert np.abs(expected).mean() > 0.1
    chex.assert_trees_all_close(np.asarray(found), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("naflex", [False, True])
def test_siglip2_table(naflex):
    _, _, state, params = siglip2(ODD, naflex)
    chex.assert_trees_all_equal(dict(key_table.export(keys.entries(reading(ODD, naflex)), params)), state)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    naflex, vision, text = PUBLISHED[name]
    c = config.Siglip(config.SiglipVision(*vision), config.SiglipText(*text))
    with torch.device("meta"):
        parameters = dict(build(c, naflex).named_parameters())
    ours = abstract(c)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(ours))
    assert count == sum(parameter.numel() for parameter in parameters.values())
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), ours)
    exported = key_table.export(keys.entries(reading(c, naflex)), zeros)
    expected = {path: tuple(parameter.shape) for path, parameter in parameters.items()}
    assert {path: value.shape for path, value in exported} == expected
