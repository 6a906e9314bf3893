"""Attention under the two rules: nothing leaks, broken rules are caught, and all implementations equal dense."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmcore_jax.nn import attention as attention_lib
from mmcore_jax.nn import flash, masks
from mmcore_jax.nn.attention import attention
from mmcore_jax.nn.masks import CLEAN, PAD
from tests import rows
from tests.leaks import DIFFUSION as MAY_SEE
from tests.leaks import leaks, may_see_vlm, visibility

HEADS, KV_HEADS, CHANNELS = 4, 2, 4
ROW = rows.pack(rows.INTERLEAVED, rows.DRAWING)
VLM = ROW.tokens.meta
DIFFUSION = masks.concatenate(ROW.diffusion.context_meta, ROW.diffusion.latent_meta)
RULES = {"causal": (masks.causal, may_see_vlm, VLM)}
RULES |= {name: (rule, MAY_SEE[name], DIFFUSION) for name, rule in masks.DIFFUSION_RULES.items()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that do not divide the lengths; kernels are interpreted."""
    monkeypatch.setattr(attention_lib, "BLOCK", 16)
    monkeypatch.setattr(flash, "LANES", 16)
    monkeypatch.setattr(flash, "BLOCK", 16)
    monkeypatch.setattr(attention_lib, "flash", functools.partial(flash.flash, interpret=True))
    assert VLM.kind.shape[1] % 16
    assert DIFFUSION.kind.shape[1] % 16


def found_leaks(rule, may_see, meta, implementation, kv_heads=KV_HEADS):
    """Leaks through one attention layer whose queries, keys and values all come from the same tokens."""
    length = meta.kind.shape[1]
    widths = (HEADS * CHANNELS, kv_heads * CHANNELS, kv_heads * CHANNELS)
    kernels = [jax.random.normal(jax.random.key(i), (8, width)) * 0.3 for i, width in enumerate(widths)]

    def function(x):
        q, k, v = ((x @ kernel).reshape(1, length, -1, CHANNELS) for kernel in kernels)
        return attention(q, k, v, meta, meta, rule, implementation).reshape(length, -1)

    x = jax.random.normal(jax.random.key(9), (length, 8))
    return leaks(function, x, visibility(may_see, meta, meta), np.asarray(meta.kind[0] != PAD))


@pytest.mark.parametrize(
    ("implementation", "kv_heads"),
    [("dense", KV_HEADS), ("blockwise", KV_HEADS), ("flash", KV_HEADS), ("flash", HEADS)],
)
@pytest.mark.parametrize("name", RULES)
def test_nothing_leaks(name, implementation, kv_heads):
    assert found_leaks(*RULES[name], implementation, kv_heads) == []


def own_clean(q, k):
    """Broken: a frame sees its own clean copy, which is the answer."""
    return masks.block_causal(q, k) | (masks.same_document(q, k) & (k.kind == CLEAN) & (k.frame == q.frame))


def later_clean(q, k):
    """Broken: CLEAN sees later CLEAN."""
    return masks.block_causal(q, k) | (masks.same_document(q, k) & (q.kind == CLEAN) & (k.kind == CLEAN))


def other_documents(q, k):
    """Broken: documents are not told apart."""
    return masks.block_causal(q._replace(document=0 * q.document), k._replace(document=0 * k.document))


def no_history(q, k):
    """Broken: earlier frames are hidden."""
    return masks.block_causal(q, k) & (k.frame == q.frame)


def one_ahead(q, k):
    """Broken: the next token is visible."""
    return masks.same_document(q, k) & (k.index <= q.index + 1)


BROKEN = {
    "block_causal": (masks.history_visual, own_clean, later_clean, other_documents, no_history),
    "history_visual": (masks.block_causal, masks.same_document),
    "causal": (one_ahead, masks.same_document),
}


@pytest.mark.parametrize(("rule", "of"), [(rule, of) for of, rules in BROKEN.items() for rule in rules])
def test_a_broken_rule_is_caught(rule, of):
    _, may_see, meta = RULES[of]
    found = found_leaks(rule, may_see, meta, "dense")
    assert any(leak.startswith("forward") for leak in found)
    assert any(leak.startswith("gradient") for leak in found)


def test_the_checker_sees_a_gradient_that_is_cut():
    """A gradient that is stopped where values flow is as wrong as a leak."""
    x = jax.random.normal(jax.random.key(0), (3, 2))
    full = np.ones((3, 3), bool)
    cut = leaks(lambda x: x + jax.lax.stop_gradient(x.sum(0)), x, full, np.ones(3, bool))
    assert cut
    assert all(leak.startswith("gradient") for leak in cut)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("length", [7, 16, 50, 61])
@pytest.mark.parametrize(
    ("implementation", "kv_heads"), [("blockwise", KV_HEADS), ("flash", KV_HEADS), ("flash", HEADS)]
)
def test_equals_dense(name, length, implementation, kv_heads):
    """Where there are as many keys as queries, the kernels take four heads at once."""
    rule, _, meta = RULES[name]
    meta = masks.TokenMeta(*(jnp.asarray(field[:, :length]) for field in meta))
    length = meta.kind.shape[1]
    keys = jax.random.split(jax.random.key(length), 4)
    q = jax.random.normal(keys[0], (1, length, HEADS, CHANNELS))
    k, v = (jax.random.normal(key, (1, length, kv_heads, CHANNELS)) for key in keys[1:3])
    weights = jax.random.normal(keys[3], q.shape) * (meta.kind != PAD)[..., None, None]

    def run(implementation):
        def loss(q, k, v):
            out = attention(q, k, v, meta, meta, rule, implementation)
            return jnp.sum(out * weights), out * (meta.kind != PAD)[..., None, None]

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, gradients

    chex.assert_trees_all_close(run(implementation), run("dense"), atol=2e-6, rtol=0)


def test_grouped_heads_and_scale():
    """Against softmax written out for one query: head h reads key/value head h // (H / K)."""
    q = jax.random.normal(jax.random.key(0), (1, 1, HEADS, CHANNELS))
    k, v = (jax.random.normal(jax.random.key(i), (1, 5, KV_HEADS, CHANNELS)) for i in (1, 2))
    metas = [masks.plain_meta(jnp.ones((1, length), bool)) for length in (1, 5)]
    out = attention(q, k, v, *metas, masks.same_document, "dense")
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        scores = np.exp(np.asarray(k[0, :, group] @ q[0, 0, head]) / np.sqrt(CHANNELS))
        expected = (scores / scores.sum()) @ np.asarray(v[0, :, group])
        np.testing.assert_allclose(out[0, 0, head], expected, atol=1e-6)


def test_a_query_that_sees_nothing_is_finite():
    q = k = v = jnp.ones((1, 3, 1, 4))
    meta = masks.plain_meta(jnp.zeros((1, 3), bool))

    def loss(q):
        return attention(q, k, v, meta, meta, masks.same_document, "dense").sum()

    chex.assert_tree_all_finite(jax.value_and_grad(loss)(q))


@pytest.mark.parametrize("implementation", ["dense", "blockwise", "flash"])
def test_no_tokens(implementation):
    """As where nothing is remembered."""
    meta, x = masks.plain_meta(jnp.zeros((2, 0), bool)), jnp.zeros((2, 0, 4, 8))
    assert attention(x, x[:, :, :2], x[:, :, :2], meta, meta, masks.same_document, implementation).shape == x.shape
