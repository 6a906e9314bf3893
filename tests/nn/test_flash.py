"""The kernels of flash attention, interpreted: what they skip is never read, and a mesh changes nothing.

That they see what the rules let them see, and differentiate it, is in `test_attention.py`.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmcore_jax.nn import attention as attention_lib
from mmcore_jax.nn import flash, masks
from mmcore_jax.nn.attention import attention
from mmcore_jax.nn.stack import POLICIES
from tests import tiny

BLOCK, HEADS, KV_HEADS, CHANNELS = 16, 4, 2, 8


@pytest.fixture
def small_blocks(monkeypatch):
    """Interpreted kernels, in blocks that do not divide the lengths."""
    monkeypatch.setattr(flash, "LANES", BLOCK)
    monkeypatch.setattr(flash, "BLOCK", BLOCK)
    monkeypatch.setattr(attention_lib, "BLOCK", BLOCK)
    monkeypatch.setattr(attention_lib, "flash", functools.partial(flash.flash, interpret=True))


def arrays(length: int, keys: int, dtype=jnp.float32, kv_heads=KV_HEADS) -> tuple[jax.Array, jax.Array, jax.Array]:
    shapes = [(2, length, HEADS, CHANNELS), (2, keys, kv_heads, CHANNELS), (2, keys, kv_heads, CHANNELS)]
    return tuple(jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes))


def documents(sizes: list[int]) -> masks.TokenMeta:
    """Two rows of documents of these lengths."""
    meta = masks.plain_meta(jnp.ones((2, sum(sizes)), bool))
    return meta._replace(document=jnp.tile(jnp.repeat(jnp.arange(len(sizes)), np.array(sizes)), (2, 1)))


def results(implementation: str, given: tuple, q_meta, k_meta, rule) -> tuple:
    """What is attended to, and gradients."""

    def loss(*given):
        out = attention(*given, q_meta, k_meta, rule, implementation)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*given)
    return out, gradients


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("length", "keys"), [(40, 72), (17, 16), (64, 5)])
def test_other_keys_than_queries(length, keys):
    """As where clean images are remembered."""
    q_meta, k_meta = documents([length // 2, length - length // 2]), documents([keys // 2, keys - keys // 2])
    given = arrays(length, keys), q_meta, k_meta, masks.same_document
    chex.assert_trees_all_close(results("flash", *given), results("dense", *given), atol=3e-6, rtol=1e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kv_heads", [KV_HEADS, HEADS])
def test_half_precision_is_as_near_to_float32_as_that_of_dense(kv_heads):
    meta = documents([33, 31])
    exact = results("dense", arrays(64, 64, kv_heads=kv_heads), meta, meta, masks.causal)
    given = arrays(64, 64, jnp.bfloat16, kv_heads), meta, meta, masks.causal
    half = [results(name, *given) for name in ("flash", "dense")]

    def error(found) -> float:
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        return max(float(jnp.abs(ours.astype(jnp.float32) - theirs).max()) for ours, theirs in pairs)

    assert 0 < error(half[0]) < 1.5 * error(half[1])


@pytest.mark.usefixtures("small_blocks")
def test_what_is_hidden_is_not_read():
    """Keys of another document are not numbers: whoever multiplies them by a weight of zero has none either."""
    meta = documents([32, 32])
    q, k, v = arrays(64, 64)
    poisoned = (x.at[:, 32:].set(jnp.nan) for x in (k, v))
    given = (q, *poisoned), meta, meta, masks.same_document
    out, (dq, dk, _) = results("flash", *given)
    chex.assert_tree_all_finite((out[:, :32], dq[:, :32], dk[:, :32]))
    assert jnp.isnan(results("dense", *given)[0][:, :32]).any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kv_heads", [KV_HEADS, HEADS])
def test_a_query_that_sees_nothing_is_finite_and_moves_nothing(kv_heads):
    given = arrays(40, 40, kv_heads=kv_heads)
    nothing, something = (masks.plain_meta(jnp.full((2, 40), valid)) for valid in (False, True))
    out, gradients = results("flash", given, something, nothing, masks.same_document)
    chex.assert_tree_all_finite(out)
    chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_without_a_tpu_it_is_blockwise():
    meta = documents([90, 70])
    given = arrays(160, 160), meta, meta, masks.causal
    chex.assert_trees_all_equal(results("flash", *given), results("blockwise", *given))


def test_blocks_are_those_of_the_rule(monkeypatch):
    monkeypatch.setattr(flash, "LANES", BLOCK)
    monkeypatch.setattr(flash, "BLOCK", BLOCK)
    meta = documents([32, 20])  # padded to 64 tokens
    found = flash.visible_blocks(meta, meta, masks.causal)
    expected = [[1, 0, 0, 0], [2, 1, 0, 0], [0, 0, 1, 0], [0, 0, 2, 1]]
    np.testing.assert_array_equal(found, [expected, expected])


def sharded() -> None:
    """Flash attention on a mesh against dense attention without. Runs where eight devices are."""
    from mmcore_jax import config, sharding

    flash.LANES = flash.BLOCK = attention_lib.BLOCK = BLOCK
    attention_lib.flash = functools.partial(flash.flash, interpret=True)
    meta = documents([30, 34])
    for sizes, kv_heads in (
        ((2, 1, 2, 2), KV_HEADS),
        ((1, 2, 4, 1), HEADS),
        ((2, 1, 2, 2), HEADS),
        ((8, 1, 1, 1), HEADS),
    ):
        given = arrays(64, 64, kv_heads=kv_heads), meta, meta, masks.causal
        expected = results("dense", *given)
        with jax.set_mesh(sharding.make_mesh(config.Mesh(*sizes))):
            found = results("flash", *given)
        chex.assert_trees_all_close(found, expected, atol=3e-6, rtol=1e-6)
        if sizes[0] < 8:  # two rows do not divide by eight
            assert not found[0].sharding.is_fully_replicated


def test_a_mesh_changes_nothing():
    tiny.call(sharded, devices=8)


@pytest.mark.parametrize(
    ("remat", "forward", "inputs"), [("full", 2, 2), ("attention", 1, 2), ("qkv", 1, 1), ("dots", 1, 2)]
)
def test_what_remat_keeps_is_not_computed_again(remat, forward, inputs):
    """In the program for TPUs, which needs none until it is compiled."""
    meta, (q, k, v) = documents([150, 106]), arrays(256, 256)

    @functools.partial(jax.checkpoint, policy=POLICIES[remat])
    def layer(q):
        return jnp.tanh(attention(jnp.cos(q), k, v, meta, meta, masks.causal, "flash"))

    chip = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=chip)):
        traced = jax.jit(jax.value_and_grad(lambda q: layer(q).sum())).trace(q)
        program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert [calls(program, f"flash_{kind}_x1_causal") for kind in ("forward", "queries", "keys")] == [forward, 1, 1]
    assert program.count("stablehlo.cosine") == inputs


def calls(program: str, kernel: str, function: str = "main") -> int:
    """How often a function of a program runs a kernel, itself or in those that it calls."""
    bodies = {re.match(r"[ \w]* @(\w+)", body)[1]: body for body in program.split("func.func")[1:]}
    called = re.findall(r"\bcall @(\w+)\(", bodies[function])
    return bodies[function].count(f'"{kernel}"') + sum(calls(program, kernel, name) for name in called)
