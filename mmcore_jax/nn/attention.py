"""Attention under a rule. B rows, L queries, S keys, H heads, K key/value heads, C channels per head.

`dense` is the oracle that tests compare with. `blockwise` evaluates the rule one block of queries at a time and
recomputes scores in the backward pass, so that memory is linear in the length. `flash` is a kernel on TPUs, which skips
what the rule hides (`nn/flash.py`), and `blockwise` elsewhere.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmcore_jax import sharding
from mmcore_jax.nn.flash import flash
from mmcore_jax.nn.masks import Rule, TokenMeta

BLOCK = 128
_MASKED = -1e30  # finite, so that a row which may see nothing is uniform and not NaN


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, q_meta: TokenMeta, k_meta: TokenMeta, rule: Rule, implementation: str
) -> jax.Array:
    """Returns `[B, L, H, C]` for q `[B, L, H, C]` and k, v `[B, S, K, C]`, scaled by 1 / sqrt(C), softmax in float32.

    Each group of H / K query heads shares one key/value head. A query that the rule lets see nothing returns a mean of
    values that carries no meaning; callers ignore such positions.
    """
    return _IMPLEMENTATIONS[implementation](q * q.shape[-1] ** -0.5, k, v, q_meta, k_meta, rule)


def _heads_first(function: Callable) -> Callable:
    """Of a function of `[B, H, L, C]` one of `[B, L, H, C]`."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> jax.Array:
        return jnp.swapaxes(function(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), *rest), 1, 2)

    return run


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, q_meta: TokenMeta, k_meta: TokenMeta, rule: Rule) -> jax.Array:
    (rows, heads, length, channels), (kv_heads, keys) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    visible = rule(
        TokenMeta(*(field[:, :, None] for field in q_meta)), TokenMeta(*(field[:, None, :] for field in k_meta))
    )
    # Heads that share a key are one longer sequence in both products, and what divides the weights divides their sum
    # of values instead: XLA on CPU is twice as fast then.
    longer = q.reshape(rows, kv_heads, group * length, channels)
    scores = jnp.einsum("bklc,bksc->bkls", longer, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, kv_heads, group, length, keys) + jnp.where(visible, 0, _MASKED)[:, None, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True, initial=_MASKED)))
    total = weights.sum(axis=-1).reshape(rows, heads, length, 1)
    weights = weights.astype(v.dtype).reshape(rows, kv_heads, group * length, keys)
    values = jnp.einsum("bkls,bksc->bklc", weights, v, preferred_element_type=jnp.float32)
    return (values.reshape(q.shape) / total).astype(q.dtype)


def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, q_meta: TokenMeta, k_meta: TokenMeta, rule: Rule) -> jax.Array:
    length = q.shape[2]
    if length <= BLOCK:
        return _dense(q, k, v, q_meta, k_meta, rule)
    blocks = -(-length // BLOCK)
    padding = blocks * BLOCK - length

    def split(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, padding if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, BLOCK, *x.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint
    def one_block(block):
        q_block, meta_block = block
        return _dense(q_block, k, v, meta_block, k_meta, rule)

    out = jax.lax.map(one_block, (split(q, 2), TokenMeta(*(split(field, 1) for field in q_meta))))
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*out.shape[:2], blocks * BLOCK, out.shape[-1])[:, :, :length]


def _flash(q: jax.Array, k: jax.Array, v: jax.Array, q_meta: TokenMeta, k_meta: TokenMeta, rule: Rule) -> jax.Array:
    """The compiler splits no kernel over a mesh, so that is done here: rows, heads and queries are independent."""
    if q.shape[1] <= BLOCK:
        return _heads_first(_dense)(q, k, v, q_meta, k_meta, rule)

    def local(*given):
        return flash(*given, rule, _heads_first(_blockwise))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q, k, v, q_meta, k_meta)
    rows, heads, queries = (
        axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
        for axes, size in (
            (sharding.RULES["batch"], q.shape[0]),
            (sharding.RULES["activation_heads"], k.shape[2]),
            (sharding.RULES["length"], q.shape[1]),
        )
    )
    of_queries, of_keys = PartitionSpec(rows, queries, heads), PartitionSpec(rows, None, heads)
    split = of_queries, of_keys, of_keys, PartitionSpec(rows, queries), PartitionSpec(rows)
    return jax.shard_map(local, in_specs=split, out_specs=of_queries, check_vma=False)(q, k, v, q_meta, k_meta)


_IMPLEMENTATIONS = {"dense": _heads_first(_dense), "blockwise": _heads_first(_blockwise), "flash": _flash}
