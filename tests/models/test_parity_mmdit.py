"""The SD3 family equals diffusers' SD3Transformer2DModel on small random weights, through the key table."""

import dataclasses
import functools
import math

import chex
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mmcore_jax import config
from mmcore_jax.config import UserError
from mmcore_jax.diffusion import guidance, solver
from mmcore_jax.models import mmdit
from mmcore_jax.models.mmdit import MMDiTModel, Slots
from mmcore_jax.nn import attention as attention_lib
from mmcore_jax.nn import masks
from mmcore_jax.nn.masks import NOISED, TEXT, TokenMeta
from mmcore_jax.nn.patches import patchify, unpatchify
from mmcore_jax.pretrained import mmdit as keys
from mmcore_jax.pretrained import table as key_table
from tests import rows
from tests.reference import randomise, state_of

TOLERANCE = 1e-4


def family(**fields):
    common = dict(patch_size=2, latent_channels=16, position="sincos", query_gain=1.0, prediction="velocity")
    return config.MMDiT(**common, **fields)


small = functools.partial(family, context_width=24, pooled_width=20)
published = functools.partial(family, context_width=4096, pooled_width=2048, position_base=64)
CONFIGS = {
    "SD3-medium": small(width=32, depth=4, heads=2, dual_layers=0, qk_norm=False, position_grid=24, position_base=8),
    "SD3.5-medium": small(width=32, depth=4, heads=2, dual_layers=2, qk_norm=True, position_grid=48, position_base=8),
    "SD3.5-large": small(width=64, depth=3, heads=4, dual_layers=0, qk_norm=True, position_grid=24, position_base=8),
    "odd": small(width=72, depth=3, heads=3, dual_layers=2, qk_norm=True, position_grid=20, position_base=7),
}
PUBLISHED = {
    "SD3-medium": published(width=1536, depth=24, heads=24, dual_layers=0, qk_norm=False, position_grid=192),
    "SD3.5-medium": published(width=1536, depth=24, heads=24, dual_layers=13, qk_norm=True, position_grid=384),
    "SD3.5-large": published(width=2432, depth=38, heads=38, dual_layers=0, qk_norm=True, position_grid=192),
}
SIZES = {"SD3-medium": (16, 16), "SD3.5-medium": (10, 22), "SD3.5-large": (24, 6), "odd": (18, 14)}


def execution(implementation="dense", scan=True, compute_dtype="float32"):
    return config.Execution(compute_dtype, "float32", implementation, scan, "none")


def build(c):
    return diffusers.SD3Transformer2DModel(
        sample_size=c.position_base * c.patch_size,
        patch_size=c.patch_size,
        in_channels=c.latent_channels,
        out_channels=c.latent_channels,
        num_layers=c.depth,
        attention_head_dim=c.width // c.heads,
        num_attention_heads=c.heads,
        joint_attention_dim=c.context_width,
        caption_projection_dim=c.width,
        pooled_projection_dim=c.pooled_width,
        pos_embed_max_size=c.position_grid,
        dual_attention_layers=tuple(range(c.dual_layers)),
        qk_norm="rms_norm" if c.qk_norm else None,
    )


@functools.cache
def theirs(name):
    """The published implementation with every parameter random."""
    return randomise(build(CONFIGS[name]))


def arguments(c, images, context, timesteps, pooled):
    """One frame a row: everything in a row sees everything, under the timestep of its only slot."""
    batch, height, width, _ = images.shape
    rows, cols = height // c.patch_size, width // c.patch_size
    patch, length = np.arange(rows * cols), context.shape[1]

    def meta(kind, row, col):
        fields = np.broadcast_arrays(0, 0, kind, row, col, np.arange(len(row)))
        return TokenMeta(*(np.broadcast_to(field, (batch, len(row))).astype(np.int32) for field in fields))

    latent_meta = meta(NOISED, patch // cols - (rows + 1) // 2, patch % cols - (cols + 1) // 2)
    context_meta = meta(TEXT, np.zeros(length, int), np.zeros(length, int))
    slots = Slots(np.zeros((batch, length), np.int32), np.zeros((batch, patch.size), np.int32))
    latents = patchify(images, c.patch_size)
    return latents, context, timesteps[:, None], slots, latent_meta, context_meta, masks.same_document, pooled[:, None]


def make_inputs(c, size, length=77):
    rng = np.random.default_rng(size[0])
    shapes = (2, *size, c.latent_channels), (2, length, c.context_width), (2, c.pooled_width)
    images, context, pooled = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return images, context, np.array([0.97826, 0.1], np.float32), pooled


def shapes_of(c):
    model, inputs = MMDiTModel(c, execution()), make_inputs(c, (8, 8), 6)
    like = jax.eval_shape(lambda key: model.init(key, *arguments(c, *inputs)), jax.random.key(0))["params"]
    return jax.tree.map(lambda leaf: leaf.unbox(), like, is_leaf=lambda leaf: hasattr(leaf, "unbox"))


@functools.cache
def load(name):
    c, state = CONFIGS[name], state_of(theirs(name))
    for buffer in keys.buffers(c):
        del state[buffer]
    return key_table.load(keys.entries(c), state, shapes_of(c))


def ours(c, params, run, images, context, timesteps, pooled):
    out = MMDiTModel(c, run).apply({"params": params}, *arguments(c, images, context, timesteps, pooled))
    return unpatchify(out, c.patch_size, *images.shape[1:3])


def run_theirs(model, images, context, timesteps, pooled):
    dtype = model.dtype
    return model(
        hidden_states=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype),
        encoder_hidden_states=torch.from_numpy(context).to(dtype),
        pooled_projections=torch.from_numpy(pooled).to(dtype),
        timestep=torch.from_numpy(1000 * timesteps),
    ).sample.permute(0, 2, 3, 1)


def difference(name, inputs, run):
    c = CONFIGS[name]
    found = jax.jit(lambda params: ours(c, params, run, *inputs))(load(name))
    with torch.no_grad():
        expected = run_theirs(theirs(name), *inputs).numpy()
    assert 0.5 < expected.std() < 5
    return float(np.abs(np.asarray(found) - expected).max())


# --- Forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("implementation", "scan"), [("dense", True), ("blockwise", False)])
def test_velocity(name, implementation, scan, monkeypatch, record_property):
    monkeypatch.setattr(attention_lib, "BLOCK", 32)
    found = difference(name, make_inputs(CONFIGS[name], SIZES[name]), execution(implementation, scan))
    record_property("max_difference", found)
    assert found < TOLERANCE


@pytest.mark.parametrize("size", [(2, 2), (40, 14), (26, 38)])
def test_sizes_up_to_the_whole_table(size):
    assert difference("odd", make_inputs(CONFIGS["odd"], size, 3), execution()) < TOLERANCE


def second_attention_after_the_first_modulation(monkeypatch):
    real = mmdit.JointBlock._dual_attention

    def broken(self, x_norm, modulation, *rest):
        return real(self, mmdit._modulate(x_norm, *modulation[:2]), modulation, *rest)

    monkeypatch.setattr(mmdit.JointBlock, "_dual_attention", broken)


def positions_not_cropped(monkeypatch):
    real = mmdit.sincos_positions
    monkeypatch.setattr(
        mmdit,
        "sincos_positions",
        lambda c, meta: real(c, meta._replace(row=meta.row - meta.row.min() - c.position_grid // 2)),
    )


@pytest.mark.parametrize("broken", [second_attention_after_the_first_modulation, positions_not_cropped])
def test_a_mistake_is_noticed(broken, monkeypatch):
    broken(monkeypatch)
    assert difference("odd", make_inputs(CONFIGS["odd"], SIZES["odd"]), execution()) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["SD3-medium", "SD3.5-medium"])
def test_bfloat16_is_as_close_to_the_truth_as_theirs(name, record_property):
    c = CONFIGS[name]
    images, context, timesteps, pooled = make_inputs(c, SIZES[name])
    inputs = (*(np.array(jnp.bfloat16(x), np.float32) for x in (images, context)), timesteps, pooled)
    with torch.no_grad():
        truth = run_theirs(theirs(name), *inputs).numpy()
        their_error = run_theirs(_in_bfloat16(name), *inputs).float().numpy() - truth
    found = jax.jit(lambda params: ours(c, params, execution(compute_dtype="bfloat16"), *inputs))(load(name))
    our_error = np.asarray(found) - truth
    ratio = float(np.sqrt(np.mean(our_error**2) / np.mean(their_error**2)))
    record_property("error_ratio", ratio)
    assert ratio < 1.5
    assert np.abs(their_error).mean() > 1e-3


def _in_bfloat16(name):
    model = build(CONFIGS[name]).eval()
    model.load_state_dict(theirs(name).state_dict())
    return model.to(torch.bfloat16)


def test_a_timestep_a_token():
    """Slots: two timesteps in one row give each token what a row of its own timestep would."""
    c = CONFIGS["SD3.5-medium"]
    model, params = MMDiTModel(c, execution()), {"params": load("SD3.5-medium")}
    inputs = arguments(c, *make_inputs(c, (8, 8), 6))
    latents, context, timesteps, slots, latent_meta, context_meta, rule, pooled = inputs
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


# --- Backward ---------------------------------------------------------------------------------------------------------


def test_gradient_of_every_parameter(record_property):
    name = "SD3.5-medium"
    c, inputs = CONFIGS[name], make_inputs(CONFIGS[name], SIZES[name], 20)
    weight = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)
    gradients = jax.jit(jax.grad(lambda params: jnp.mean(weight * ours(c, params, execution(), *inputs))))(load(name))
    found = dict(key_table.export(keys.entries(c), jax.tree.map(np.asarray, gradients)))
    model = theirs(name)
    model.zero_grad()
    (torch.from_numpy(weight) * run_theirs(model, *inputs)).mean().backward()
    expected = {path: parameter.grad.numpy() for path, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    # Queries of the last block's context are read by nothing.
    unread = {path for path, gradient in expected.items() if not gradient.any()}
    last = f"transformer_blocks.{c.depth - 1}.attn"
    assert unread == {f"{last}.{path}" for path in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")}
    assert not any(found[path].any() for path in unread)
    relative = {
        path: float(np.abs(found[path] - expected[path]).max() / np.abs(expected[path]).max())
        for path in expected.keys() - unread
    }
    record_property("max_relative_difference", max(relative.values()))
    assert max(relative.values()) < 1e-3


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_export_reloads_bit_by_bit(name):
    c = CONFIGS[name]
    exported = dict(key_table.export(keys.entries(c), load(name))) | keys.buffers(c)
    chex.assert_trees_all_equal(exported, state_of(theirs(name)))
    model = build(c)
    model.load_state_dict({path: torch.from_numpy(value.copy()) for path, value in exported.items()}, strict=True)
    chex.assert_trees_all_equal(state_of(model), state_of(theirs(name)))


@pytest.mark.parametrize("shape", [(8, 6), (5, 11), (9, 16), (24, 1)])
def test_positions_of_a_bucket(shape):
    """What the layout says of the patches of an image that is no square is their crop of the table."""
    c, model = CONFIGS["SD3.5-medium"], theirs("SD3.5-medium")
    sizes = dataclasses.replace(rows.SIZES, buckets=(shape,), latent_patch=1, latent_capacity=math.prod(shape))
    budgets = config.Budgets(107, 0, 20, math.prod(shape), 1)
    meta = rows.pack(rows.DRAWING, budgets=budgets, sizes=sizes).diffusion.latent_meta
    expected = model.pos_embed.cropped_pos_embed(*(c.patch_size * side for side in shape)).numpy()
    np.testing.assert_array_equal(mmdit.sincos_positions(c, meta), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_positions_of_the_published_table(name):
    """One column of their table; that both axes are this one, tables as small as those above show."""
    c = PUBLISHED[name]
    column = diffusers.models.embeddings.get_2d_sincos_pos_embed(c.width, (c.position_grid, 1), base_size=64)
    chex.assert_trees_all_equal(mmdit.sincos_axis(c), column[:, c.width // 2 :].float().numpy())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    """Every tensor of the published files has its place and shape, and no parameter of ours is without one."""
    c = PUBLISHED[name]
    with torch.device("meta"):
        model = build(c)
    ours = shapes_of(c)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(ours)]
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters())
    expected = {path: tuple(parameter.shape) for path, parameter in model.named_parameters()}
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), ours)
    exported = dict(key_table.export(keys.entries(c), zeros))
    assert {path: value.shape for path, value in exported.items()} == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dual_layers": 4}, "config.model.dit.dual_layers 4 must"),
        ({"position_grid": 23}, "config.model.dit.position_grid 23 must"),
        ({"heads": 5}, "config.model.dit.width 32 must"),
    ],
)
def test_sizes_that_do_not_fit_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        shapes_of(dataclasses.replace(CONFIGS["SD3-medium"], **fields))


# --- Sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 28])
def test_timesteps_are_those_of_the_scheduler(steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    found = solver.timesteps(steps, 3.0, "linspace")
    np.testing.assert_allclose(found, scheduler.sigmas.numpy(), rtol=0, atol=1e-7)
    if steps > 1:
        assert np.abs(found - solver.timesteps(steps, 3.0, "trailing")).max() > 0.01


def test_guided_euler_sample(record_property):
    name, steps, scale = "SD3.5-medium", 10, 5.0
    c, (noise, context, _, pooled) = CONFIGS[name], make_inputs(CONFIGS[name], SIZES[name], 20)
    noise = noise[:1]  # one image; the context of the two rows is that of the two branches, unconditional first
    run = execution()

    def velocity(x, t):
        both = jnp.broadcast_to(x, (2, *x.shape[1:]))
        velocities = ours(c, load(name), run, both, context, jnp.full(2, t), pooled)
        return guidance.combine(velocities, guidance.branches("text", scale, 1.0).weight)[None]

    found = jax.jit(lambda noise: solver.euler(velocity, noise, solver.timesteps(steps, 3.0, "linspace")))(noise)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    latents = torch.from_numpy(noise)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            both = latents.expand(2, -1, -1, -1).numpy()
            timesteps = timestep.expand(2).numpy() / np.float32(1000)
            none, text = run_theirs(theirs(name), both, context, timesteps, pooled)
            guided = none + scale * (text - none)
            latents = scheduler.step(guided[None], timestep, latents).prev_sample
    difference = float(np.abs(np.asarray(found) - latents.numpy()).max())
    record_property("max_difference", difference)
    assert np.abs(latents.numpy() - noise).max() > 1.0
    assert difference < TOLERANCE
