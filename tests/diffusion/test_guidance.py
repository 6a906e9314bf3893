"""Guidance against its formulas, whatever branches are left out."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmcore_jax.diffusion import guidance, solver

# --- Branches ---------------------------------------------------------------------------------------------------------

SCALES = [(1.0, 1.0), (2.0, 2.0), (3.0, 1.5), (1.0, 4.0), (5.0, 1.0), (0.0, 0.0), (0.0, 1.0)]
KEPT = {
    # What a branch drops: text, visual embeddings, condition images.
    (True, True, True): "none",
    (True, True, False): "images",
    (True, False, False): "visual",
    (False, True, False): "text",
    (False, False, False): "both",
}
VELOCITY = {
    "none": [1.0, 2.0],
    "images": [-3.0, 0.5],
    "text": [7.0, 4.0],
    "visual": [3.0, -1.0],
    "both": [-2.0, 5.0],
}


def names(branches):
    return [KEPT[tuple(map(bool, drops))] for drops in zip(*branches[:3])]


@pytest.mark.parametrize("image_scale", [1.0, 1.5, 3.0, 0.0])
@pytest.mark.parametrize(("text_scale", "visual_scale"), SCALES)
@pytest.mark.parametrize("pathways", ["both", "text", "visual"])
def test_guidance(pathways, text_scale, visual_scale, image_scale):
    branches = guidance.branches(pathways, text_scale, visual_scale, image_scale)
    kept = names(branches)
    assert len(set(kept)) == len(kept)
    assert branches.weight.all()
    assert branches.weight.dtype == np.float32
    assert abs(branches.weight.sum() - 1) < 1e-6
    combined = guidance.combine(jnp.array([VELOCITY[name] for name in kept]), branches.weight)
    none, images, text, visual, both = (np.array(VELOCITY[name]) for name in VELOCITY)
    start = none + image_scale * (images - none)
    expected = {
        "both": start + visual_scale * (visual - images) + text_scale * (both - visual),
        "text": start + text_scale * (text - images),
        "visual": start + visual_scale * (visual - images),
    }
    chex.assert_trees_all_close(combined, expected[pathways].astype(np.float32), atol=1e-5)


@pytest.mark.parametrize(
    ("pathways", "scales", "expected"),
    [
        ("both", (1, 1), ["both"]),
        ("both", (1, 1, 1), ["both"]),
        ("text", (1, 9), ["text"]),
        ("visual", (9, 1, 1), ["visual"]),
        ("both", (2, 2), ["images", "both"]),
        ("both", (4, 1), ["visual", "both"]),
        ("both", (3, 1.5), ["images", "visual", "both"]),
        ("visual", (9, 2), ["images", "visual"]),
        ("both", (2, 2, 2), ["none", "both"]),
        ("both", (3, 1.5, 1.5), ["none", "visual", "both"]),
        ("both", (3, 2, 1.5), ["none", "images", "visual", "both"]),
        ("text", (3, 9, 1.5), ["none", "images", "text"]),
        ("both", (0, 0, 0), ["none"]),
    ],
)
def test_branches_run_no_more_than_they_need(pathways, scales, expected):
    assert names(guidance.branches(pathways, *scales)) == expected


@pytest.mark.parametrize("pathways", ["both", "text", "visual"])
def test_the_conditional_branch_is_last_where_it_is_kept(pathways):
    for scales in itertools.product([0.0, 1.0, 2.0], repeat=3):
        kept = guidance.branches(pathways, *scales, keep_conditional=True)
        assert names(kept)[-1] == pathways
        plain = guidance.branches(pathways, *scales)
        counted = kept.weight != 0
        chex.assert_trees_all_equal(guidance.Branches(*(field[counted] for field in kept)), plain)


# --- Renormalisation --------------------------------------------------------------------------------------------------

GUIDED, CONDITIONAL = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)) * jnp.array([3.0, 1.0]).reshape(2, 1, 1, 1)


def norms(x):
    return np.linalg.norm(np.asarray(x).reshape(len(x), -1), axis=1)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_renormalise(strength):
    found = guidance.renormalise(GUIDED, CONDITIONAL, strength)
    expected = (1 - strength) * norms(GUIDED) + strength * norms(CONDITIONAL)
    np.testing.assert_allclose(norms(found), expected, rtol=1e-5)
    np.testing.assert_allclose(found / norms(found)[:, None, None], GUIDED / norms(GUIDED)[:, None, None], atol=1e-6)
    if strength == 0:
        chex.assert_trees_all_equal(found, GUIDED)


def test_renormalise_is_per_sample():
    other = GUIDED.at[1].multiply(100.0), CONDITIONAL.at[1].add(7.0)
    before, after = guidance.renormalise(GUIDED, CONDITIONAL, 0.8), guidance.renormalise(*other, 0.8)
    chex.assert_trees_all_equal(before[0], after[0])
    chex.assert_trees_all_equal(before[2], after[2])
    assert (before[1] != after[1]).all()


def test_renormalise_without_guidance_or_velocity():
    """What is guided by nothing keeps its velocity, up to rounding, and what does not move stays at 0."""
    chex.assert_trees_all_close(guidance.renormalise(CONDITIONAL, CONDITIONAL, 1.0), CONDITIONAL, rtol=1e-6)
    still = guidance.renormalise(GUIDED.at[0].set(0.0), CONDITIONAL.at[0].set(0.0), 1.0)
    assert (still[0] == 0).all()
    chex.assert_tree_all_finite(still)
    masked = jnp.arange(4)[:, None] < 2
    chex.assert_trees_all_close(
        guidance.renormalise(GUIDED * masked, CONDITIONAL * masked, 1.0)[:, :2],
        guidance.renormalise(GUIDED[:, :2], CONDITIONAL[:, :2], 1.0),
        rtol=1e-5,
    )


# --- Interval ---------------------------------------------------------------------------------------------------------


def constant(value):
    return lambda x, t: jnp.full_like(x, value)


@pytest.mark.parametrize(
    ("t", "guides"), [(0.0, False), (0.3, True), (0.299999, False), (0.5, True), (0.7, True), (0.700001, False)]
)
def test_interval_holds_its_edges(t, guides):
    velocity = jax.jit(guidance.within((0.3, 0.7), constant(2.0), constant(1.0)))
    assert velocity(jnp.zeros(3), jnp.float32(t)).tolist() == [2.0 if guides else 1.0] * 3


@pytest.mark.parametrize("t", [0.0, 1e-6, 0.5, 1.0])
def test_the_whole_interval_guides_everywhere(t):
    assert guidance.within((0.0, 1.0), constant(2.0), constant(1.0))(jnp.zeros(1), jnp.float32(t)) == 2.0


def test_only_the_velocity_that_is_needed_runs():
    seen = []

    def spied(name):
        def velocity(x, t):
            jax.debug.callback(lambda t: seen.append((name, float(t))), t)
            return 0.0 * x

        return velocity

    t = solver.timesteps(5, 1.0, "trailing")
    velocity = guidance.within((0.4, 0.8), spied("guided"), spied("plain"))
    jax.block_until_ready(jax.jit(lambda x: solver.euler(velocity, x, t))(jnp.ones(2)))
    jax.effects_barrier()
    names = ["plain", "guided", "guided", "guided", "plain"]
    assert sorted(seen, key=lambda call: -call[1]) == [(name, float(at)) for name, at in zip(names, t)]
