"""Nothing leaks through whole networks, on rows that hold two documents and several frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmcore_jax import config, mmcore
from mmcore_jax.models import qwen_vl
from mmcore_jax.models.mmdit import MMDiTModel, Slots
from mmcore_jax.models.qwen_vl import QwenVLModel
from mmcore_jax.nn import attention as attention_lib
from mmcore_jax.nn import masks
from mmcore_jax.nn.masks import CLEAN, IMAGE, NOISED, PAD
from tests import rows
from tests.leaks import DIFFUSION, leaks, may_see_diffusion, may_see_vlm, visibility

ROW = jax.tree.map(jnp.asarray, rows.pack(rows.INTERLEAVED, rows.DRAWING))
VLM = config.QwenVL(
    width=16,
    depth=2,
    heads=2,
    mlp_width=24,
    vocab_size=128,
    kv_heads=1,
    mrope_section=(1, 1, 2),
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_embeddings=True,
    vision=config.QwenVision(
        width=8, depth=2, heads=1, mlp_width=12, patch_size=2, merge_size=2, window_size=4, full_attention_blocks=(1,)
    ),
)
DIT = config.MMDiT(
    width=16,
    depth=2,
    heads=2,
    dual_layers=0,
    qk_norm=True,
    patch_size=2,
    latent_channels=3,
    context_width=12,
    pooled_width=0,
    position="rotary",
    position_grid=8,
    position_base=8,
    query_gain=1.0,
    prediction="velocity",
)


@pytest.fixture(params=["dense", "blockwise"])
def execution(request, monkeypatch):
    monkeypatch.setattr(attention_lib, "BLOCK", 16)
    return config.Execution("float32", "float32", request.param, True, "none")


def random(tree, scale=0.3):
    """Random parameters throughout: zero-initialised ones would hide everything."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(np.float32), tree)


def run_vlm(model, ids, patches, part):
    tokens = ROW.tokens
    queries = jax.random.normal(jax.random.key(3), (4, VLM.width))
    x = model.embed(ids, tokens.meta, tokens.source, qwen_vl.normalize(patches), ROW.patches.meta, queries)
    return model.decode(x if part is None else part, tokens.meta, tokens.positions)[0]


@pytest.fixture
def vlm(execution):
    model, patches = QwenVLModel(VLM, execution), ROW.patches.values.astype(jnp.float32)
    arguments = (ROW.tokens.ids, patches, None)
    shapes = jax.eval_shape(lambda key: model.init(key, *arguments, method=run_vlm), jax.random.key(0))
    parameters = random(shapes)

    def apply(patches, part=None):
        return model.apply(parameters, ROW.tokens.ids, patches, part, method=run_vlm)

    return apply


def test_decoder(vlm):
    meta = ROW.tokens.meta
    x = jax.random.normal(jax.random.key(5), (meta.kind.shape[1], VLM.width))
    visible = visibility(may_see_vlm, meta, meta)
    assert leaks(lambda x: vlm(ROW.patches.values, x[None]), x, visible, np.asarray(meta.kind[0] != PAD)) == []


def test_images_reach_only_what_follows_them(vlm):
    """A patch reaches every token of its image and what stands after, never an earlier token or another document."""
    meta, patch_meta = ROW.tokens.meta, ROW.patches.meta

    def may_see(q, patch):
        if patch.kind == PAD or q.document != patch.document:
            return False
        own = np.asarray((meta.kind[0] == IMAGE) & (meta.frame[0] == patch.frame))
        return q.index >= np.flatnonzero(own)[0]

    visible = visibility(may_see, meta, patch_meta)
    assert visible.any(axis=0).sum() == 3 * 16  # the input image, and two generated ones that something follows
    patches = ROW.patches.values[0].astype(jnp.float32)
    assert (
        leaks(lambda patches: vlm(100 * patches[None]), patches / 100, visible, np.asarray(meta.kind[0] != PAD)) == []
    )


def found_in_mmdit(rule, execution, may_see=may_see_diffusion, mark=lambda meta: meta):
    """Leaks, where the network gets metadata that `mark` has changed; `may_see` is of what they were."""
    model, part = MMDiTModel(DIT, execution), ROW.diffusion
    context_length = part.context_meta.kind.shape[1]
    noised = part.latent_meta.kind == NOISED
    frames = rows.BUDGETS.images
    timesteps = jnp.linspace(0.9, 0.0, frames + 1)[None]
    slots = Slots(part.context_meta.frame, jnp.where(noised, part.latent_meta.frame, frames))

    def arguments(x):
        context, latents = x[None, :context_length], x[None, context_length:]
        return latents, context, timesteps, slots, mark(part.latent_meta), mark(part.context_meta), rule

    meta = masks.concatenate(part.context_meta, part.latent_meta)
    x = jax.random.normal(jax.random.key(7), (meta.kind.shape[1], 12))
    parameters = random(jax.eval_shape(lambda key: model.init(key, *arguments(x)), jax.random.key(0)))
    whole = visibility(may_see, meta, meta)
    visible = (whole @ whole)[context_length:]  # through two blocks
    read = np.asarray(part.latent_meta.kind[0] != PAD)
    return leaks(lambda x: model.apply(parameters, *arguments(x))[0], x, visible, read)


def test_mmdit(execution):
    assert {CLEAN, NOISED, PAD} == set(np.unique(ROW.diffusion.latent_meta.kind))
    assert found_in_mmdit(masks.block_causal, execution) == []


# A generated frame of the first document and the one of the second lose their condition images; frame 1 keeps its own.
ALONE = np.isin(np.arange(rows.BUDGETS.images), (2, 3))[None]


def may_see_when_alone(q, k):
    return may_see_diffusion(q, k) and not (ALONE[0, q.frame] and q.kind != CLEAN and k.kind == CLEAN)


def test_frames_without_their_condition_images(execution):
    assert found_in_mmdit(masks.block_causal, execution, may_see_when_alone, lambda m: masks.alone(m, ALONE)) == []


def hidden_history(meta):
    """As if what is dropped were the tokens themselves: other frames, and CLEAN ones, would lose them too."""
    return meta._replace(kind=jnp.where((meta.kind == CLEAN) & (meta.document == 0), PAD, meta.kind))


@pytest.mark.parametrize("mark", [lambda meta: meta, hidden_history])
def test_condition_images_that_are_not_dropped_right_are_caught(mark):
    execution = config.Execution("float32", "float32", "dense", True, "none")
    assert found_in_mmdit(masks.block_causal, execution, may_see_when_alone, mark)


@pytest.mark.parametrize("name", ["history_visual", "full"])
def test_mmdit_sees_more_only_where_it_is_told_to(name):
    execution = config.Execution("float32", "float32", "dense", True, "none")
    rule, others = masks.DIFFUSION_RULES[name], {*DIFFUSION} - {name}
    assert found_in_mmdit(rule, execution, DIFFUSION[name]) == []
    for other in others:
        assert found_in_mmdit(rule, execution, DIFFUSION[other]), f"{name} passes for {other}"


def test_what_an_image_looks_like_reaches_only_what_sees_its_clean_copy():
    model, part = MMDiTModel(DIT, config.Execution("float32", "float32", "dense", True, "none")), ROW.diffusion
    meta, latents = part.latent_meta, jax.random.normal(jax.random.key(8), (1, part.latent_meta.kind.shape[1], 12))
    context = jax.random.normal(jax.random.key(9), (1, part.context_meta.kind.shape[1], 12))
    slots = Slots(part.context_meta.frame, meta.frame)
    timesteps = jnp.linspace(0.9, 0.1, rows.BUDGETS.images)[None]
    given = latents, context, timesteps, slots, meta, part.context_meta, masks.block_causal
    parameters = random(jax.eval_shape(lambda key: model.init(key, *given), jax.random.key(0)))
    seen = visibility(may_see_diffusion, meta, meta)
    clean = [(meta.kind[0] == CLEAN) & (meta.frame[0] == frame) for frame in range(rows.BUDGETS.images)]
    visible = np.stack([seen[:, np.asarray(one)].any(axis=1) for one in clean], axis=1)
    assert visible.any(axis=0).sum() == 2
    found = leaks(
        lambda x: model.apply(parameters, *given, added=mmcore._of_clean_tokens(x[None], meta))[0],
        jax.random.normal(jax.random.key(10), (rows.BUDGETS.images, DIT.width)),
        visible,
        np.asarray(meta.kind[0] != PAD),
    )
    assert found == []
