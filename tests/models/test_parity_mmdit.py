"""MMDiT equals diffusers' SD3Transformer2DModel on small random weights, through the key table."""

import chex
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mmcore_jax import config
from mmcore_jax.models.mmdit import MMDiTModel, Slots
from mmcore_jax.nn import attention as attention_lib
from mmcore_jax.nn import masks
from mmcore_jax.nn.masks import NOISED, TEXT, TokenMeta
from mmcore_jax.nn.patches import patchify, unpatchify
from tests.models import reference

TOLERANCE = 1e-4
POSITIONS = 12  # side of the table of additive positions
CONFIG = config.MMDiT(
    width=32,
    depth=4,
    heads=2,
    patch_size=2,
    latent_channels=4,
    context_width=24,
    pooled_width=20,
    position="sincos",
    position_grid=POSITIONS,
    query_gain=1.0,
    prediction="velocity",
)


@pytest.fixture(scope="module")
def published():
    """The published implementation with every parameter random, and its state."""
    torch.manual_seed(0)
    c = CONFIG
    model = diffusers.SD3Transformer2DModel(
        sample_size=POSITIONS * c.patch_size,
        patch_size=c.patch_size,
        in_channels=c.latent_channels,
        out_channels=c.latent_channels,
        num_layers=c.depth,
        attention_head_dim=c.width // c.heads,
        num_attention_heads=c.heads,
        joint_attention_dim=c.context_width,
        caption_projection_dim=c.width,
        pooled_projection_dim=c.pooled_width,
        pos_embed_max_size=POSITIONS,
        qk_norm="rms_norm",
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (".norm_" in name and "linear" not in name))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    for name in reference.MMDIT_COMPUTED:
        del state[name]
    return model, state


def arguments(images, context, timesteps, pooled):
    """One frame a row: everything in a row sees everything, under the timestep of its only slot."""
    batch, height, width, _ = images.shape
    rows, cols = height // CONFIG.patch_size, width // CONFIG.patch_size
    patch, length = np.arange(rows * cols), context.shape[1]

    def meta(kind, row, col):
        fields = np.broadcast_arrays(0, 0, kind, row, col, np.arange(len(row)))
        return TokenMeta(*(np.broadcast_to(field, (batch, len(row))).astype(np.int32) for field in fields))

    latent_meta = meta(NOISED, patch // cols - (rows + 1) // 2, patch % cols - (cols + 1) // 2)
    context_meta = meta(TEXT, np.zeros(length, int), np.zeros(length, int))
    slots = Slots(np.zeros((batch, length), np.int32), np.zeros((batch, patch.size), np.int32))
    latents = patchify(images, CONFIG.patch_size)
    return latents, context, timesteps[:, None], slots, latent_meta, context_meta, masks.same_document, pooled[:, None]


def make_inputs(rows, cols, length):
    rng = np.random.default_rng(rows)
    images = rng.normal(size=(2, rows * CONFIG.patch_size, cols * CONFIG.patch_size, CONFIG.latent_channels))
    context, pooled = rng.normal(size=(2, length, CONFIG.context_width)), rng.normal(size=(2, CONFIG.pooled_width))
    return (
        images.astype(np.float32),
        context.astype(np.float32),
        np.array([0.97826, 0.1], np.float32),
        pooled.astype(np.float32),
    )


def load(model, state, inputs):
    like = jax.eval_shape(lambda key: model.init(key, *arguments(*inputs)), jax.random.key(0))["params"]
    like = jax.tree.map(lambda leaf: leaf.unbox(), like, is_leaf=lambda leaf: hasattr(leaf, "unbox"))
    return reference.load(reference.mmdit(CONFIG), state, like)


@pytest.mark.parametrize(
    ("rows", "cols", "length", "scan", "implementation"),
    [
        (8, 8, 77, True, "dense"),
        (5, 7, 9, False, "blockwise"),
        (12, 3, 30, True, "blockwise"),
        (11, 6, 1, True, "dense"),
    ],
)
def test_velocity(published, rows, cols, length, scan, implementation, monkeypatch, record_property):
    monkeypatch.setattr(attention_lib, "BLOCK", 32)
    theirs, state = published
    inputs = make_inputs(rows, cols, length)
    model = MMDiTModel(CONFIG, config.Execution("float32", "float32", implementation, scan, "none"))
    params = load(model, state, inputs)
    ours = jax.jit(lambda params: model.apply({"params": params}, *arguments(*inputs)))(params)
    images, context, timesteps, pooled = inputs
    ours = unpatchify(ours, CONFIG.patch_size, *images.shape[1:3])
    with torch.no_grad():
        expected = theirs(
            hidden_states=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
            encoder_hidden_states=torch.from_numpy(context),
            pooled_projections=torch.from_numpy(pooled),
            timestep=torch.from_numpy(1000 * timesteps),
        ).sample
    expected = expected.numpy().transpose(0, 2, 3, 1)
    found = float(np.abs(np.asarray(ours) - expected).max())
    record_property("max_difference", found)
    assert np.abs(expected).mean() > 0.1
    assert found < TOLERANCE


def test_a_timestep_a_token(published):
    """Slots: two timesteps in one row give each token what a row of its own timestep would."""
    _, state = published
    inputs = make_inputs(4, 4, 6)
    model = MMDiTModel(CONFIG, config.Execution("float32", "float32", "dense", True, "none"))
    params = {"params": load(model, state, inputs)}
    latents, context, timesteps, slots, latent_meta, context_meta, rule, pooled = arguments(*inputs)
    pooled = np.broadcast_to(pooled[:1], pooled.shape)
    apply = jax.jit(model.apply, static_argnums=7)
    apart = apply(params, latents, context, timesteps, slots, latent_meta, context_meta, rule, pooled)

    def side_by_side(x):
        return np.concatenate([x[:1], x[1:]], axis=1)

    def documents(meta):
        joined = TokenMeta(*map(side_by_side, meta))
        half = meta.kind.shape[1]
        return joined._replace(document=np.repeat([[0, 1]], half, axis=1).astype(np.int32))

    second = Slots(*(np.repeat([[0, 1]], x.shape[1], axis=1).astype(np.int32) for x in slots))
    packed = apply(
        params,
        side_by_side(latents),
        side_by_side(context),
        timesteps.reshape(1, 2),
        second,
        documents(latent_meta),
        documents(context_meta),
        rule,
        pooled[:1],
    )
    chex.assert_trees_all_close(packed[0], jnp.concatenate(list(apart)), atol=1e-4, rtol=0)
    assert np.abs(apart[0] - apart[1]).max() > 0.1


def test_round_trip_of_the_table(published):
    _, state = published
    model = MMDiTModel(CONFIG, config.Execution("float32", "float32", "dense", True, "none"))
    params = load(model, state, make_inputs(4, 4, 6))
    chex.assert_trees_all_equal(reference.export(reference.mmdit(CONFIG), params), state)
