"""SigLIP equals transformers on small random weights, through the key table."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmcore_jax import config
from mmcore_jax.models.siglip import SiglipModel
from mmcore_jax.pretrained import siglip as keys
from mmcore_jax.pretrained import table as key_table

TOLERANCE = 1e-4
CONFIG = config.Siglip(
    vision=config.SiglipVision(width=32, depth=3, heads=4, mlp_width=48, image_size=24, patch_size=4),
    text=config.SiglipText(width=32, depth=2, heads=2, mlp_width=40, vocab_size=100, max_length=17),
)


def run_everything(model, images, ids, valid):
    return model.patch_features(images), *model(images, ids, valid)


@pytest.fixture(scope="module")
def published():
    """The published implementation with every parameter random, and its state."""
    torch.manual_seed(0)

    def tower(c):
        return dict(
            hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads, intermediate_size=c.mlp_width
        )

    text, vision = CONFIG.text, CONFIG.vision
    model = transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config=tower(text)
            | dict(vocab_size=text.vocab_size, max_position_embeddings=text.max_length, bos_token_id=0, eos_token_id=1),
            vision_config=tower(vision) | dict(image_size=vision.image_size, patch_size=vision.patch_size),
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name and name.endswith("weight")))
    return model, {name: value.numpy() for name, value in model.state_dict().items()}


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
