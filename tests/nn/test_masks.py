"""The attention rules say what the contract says, on rows that the layout packs."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmcore_jax.nn import masks
from mmcore_jax.nn.masks import CLEAN, NOISED, PAD, TEXT, VISUAL, TokenMeta
from tests import rows
from tests.leaks import DIFFUSION, may_see_diffusion, may_see_vlm, visibility

ROW = rows.pack(rows.INTERLEAVED, rows.DRAWING)


def evaluate(rule, meta):
    q, k = (TokenMeta(*(np.expand_dims(field[0], axis) for field in meta)) for axis in (1, 0))
    return np.asarray(rule(q, k))


def diffusion_meta():
    return masks.concatenate(ROW.diffusion.context_meta, ROW.diffusion.latent_meta)


def test_causal():
    meta = ROW.tokens.meta
    assert set(np.unique(meta.kind)) == {PAD, TEXT, masks.IMAGE, masks.QUERY}
    np.testing.assert_array_equal(evaluate(masks.causal, meta), visibility(may_see_vlm, meta, meta))


@pytest.mark.parametrize("name", masks.DIFFUSION_RULES)
def test_diffusion(name):
    meta = diffusion_meta()
    assert set(np.unique(meta.kind)) == {PAD, TEXT, VISUAL, CLEAN, NOISED}
    seen = visibility(DIFFUSION[name], meta, meta)
    np.testing.assert_array_equal(evaluate(masks.DIFFUSION_RULES[name], meta), seen)
    assert (seen == visibility(may_see_diffusion, meta, meta)).all() == (name == "block_causal")


@pytest.mark.parametrize(
    ("query", "key", "visible"),
    [
        ((0, 1, NOISED), (0, 1, NOISED), True),
        ((0, 1, NOISED), (0, 1, TEXT), True),
        ((0, 1, NOISED), (0, 1, VISUAL), True),
        ((0, 1, NOISED), (0, 0, CLEAN), True),
        ((0, 1, NOISED), (0, 1, CLEAN), False),  # the answer
        ((0, 1, NOISED), (0, 2, CLEAN), False),
        ((0, 1, NOISED), (0, 0, NOISED), False),
        ((0, 1, NOISED), (0, 0, VISUAL), False),
        ((0, 1, NOISED), (0, 0, TEXT), False),
        ((0, 1, TEXT), (0, 0, CLEAN), True),
        ((0, 1, VISUAL), (0, 1, NOISED), True),
        ((0, 1, CLEAN), (0, 1, CLEAN), True),
        ((0, 1, CLEAN), (0, 0, CLEAN), True),
        ((0, 1, CLEAN), (0, 2, CLEAN), False),
        ((0, 1, CLEAN), (0, 1, NOISED), False),
        ((0, 1, CLEAN), (0, 1, TEXT), False),
        ((0, 1, NOISED), (1, 1, NOISED), False),
        ((0, 1, NOISED), (1, 0, CLEAN), False),
        ((0, 1, NOISED), (0, 1, PAD), False),
    ],
)
def test_block_causal_by_hand(query, key, visible):
    q, k = (TokenMeta(document, frame, kind, 0, 0, 0) for document, frame, kind in (query, key))
    assert bool(masks.block_causal(TokenMeta(*map(jnp.asarray, q)), TokenMeta(*map(jnp.asarray, k)))) is visible


def test_every_token_sees_itself():
    for rule, meta in ((masks.causal, ROW.tokens.meta), (masks.block_causal, diffusion_meta())):
        real = meta.kind[0] != PAD
        assert np.diag(evaluate(rule, meta))[real].all()
        assert not evaluate(rule, meta)[:, ~np.asarray(real)].any()


def test_concatenate_counts_positions_anew():
    meta = diffusion_meta()
    np.testing.assert_array_equal(meta.index[0], np.arange(meta.kind.shape[1]))


def test_plain_meta_hides_padding():
    meta = masks.plain_meta(jnp.array([[True, True, False]]))
    expected = np.array([[True, True, False]] * 3)
    np.testing.assert_array_equal(evaluate(masks.same_document, meta), expected)
