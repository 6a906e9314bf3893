"""Flash attention under a rule, as kernels for TPUs (Dao, arXiv:2205.14135 and 2307.08691, in Pallas).

Memory is linear in the length, and of the blocks of queries and keys only those are computed in which the rule lets
something be seen; where it lets everything be seen, it is not evaluated. That follows from the metadata of the tokens,
so it needs no mask of the length squared, and batches may pack their rows as they like. On other platforms the same
function runs in plain JAX.

Heads of 64 channels go through the kernels in pairs, which fill the 128 lanes of a register: alone, each would take
twice its memory. A head is multiplied with zeros in place of its neighbour, which costs no more, since a product takes
128 channels at once.

B rows, L queries, S keys, H heads, K key/value heads, G = H / K, C channels per head, N heads side by side, F fields of
the metadata.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmcore_jax.nn.masks import PAD, Rule, TokenMeta

BLOCK = 1024  # tokens at most; 512 is a third slower on v5e
LANES = 128
NAME = "flash"
# What a remat policy may keep, so that the backward pass does not attend again, nor compute queries, keys and values.
SAVED, TAKEN = "flash_attention", "flash_inputs"
_FIELDS = 8  # those of the metadata, in a whole tile
_NOTHING, _SOME, _ALL = range(3)  # of a block of queries and keys that the rule lets be seen
_MASKED = -1e30
_VMEM = 64 << 20

Reference = Callable[..., jax.Array]


class Blocks(NamedTuple):
    """For each block of one side, in order, what of each block of the other side is seen, and which block to load.

    Both are int32, flat: `[B * blocks * other blocks]`. A block that is not needed is not loaded: the last one stays.
    """

    seen: jax.Array
    load: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_meta: TokenMeta,
    k_meta: TokenMeta,
    rule: Rule,
    reference: Reference,
    interpret: bool = False,
) -> jax.Array:
    """Returns `[B, L, H, C]` for q `[B, L, H, C]`, which is scaled already, and k, v `[B, S, K, C]`.

    Args:
      q, k, v: queries, keys and values.
      q_meta, k_meta: metadata of queries `[B, L]` and keys `[B, S]`.
      rule: who may see whom.
      reference: of the same arguments but `reference` and `interpret`, what runs where there is no TPU.
      interpret: runs the kernels there too, slowly, to test them.
    """
    return _forward(q, k, v, q_meta, k_meta, rule, reference, interpret)[0]


def _forward(q, k, v, q_meta, k_meta, rule, reference, interpret) -> tuple[jax.Array, tuple]:
    def kernels(*given: Any) -> tuple[jax.Array, jax.Array]:
        return _attend(*given, rule=rule, interpret=interpret)

    def plain(*given: Any) -> tuple[jax.Array, jax.Array]:
        return reference(*given, rule), jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)

    given = *(_named(x, TAKEN) for x in (q, k, v)), q_meta, k_meta
    found = kernels(*given) if interpret else jax.lax.platform_dependent(*given, tpu=kernels, default=plain)
    out, log_sum = _named(found[0], SAVED), checkpoint_name(found[1], SAVED)
    return out, (*given, out, log_sum)


def _backward(rule, reference, interpret, residuals, gradient) -> tuple:
    *given, out, log_sum = residuals

    def kernels(gradient, out, log_sum, *given):
        return _differentiate(gradient, out, log_sum, *given, rule=rule, interpret=interpret)

    def plain(gradient, out, log_sum, q, k, v, q_meta, k_meta):
        return jax.vjp(lambda *qkv: reference(*qkv, q_meta, k_meta, rule), q, k, v)[1](gradient)

    given = gradient, out, log_sum, *given
    if interpret:
        return *kernels(*given), None, None
    return *jax.lax.platform_dependent(*given, tpu=kernels, default=plain), None, None


flash.defvjp(_forward, _backward)


def _named(x: jax.Array, name: str) -> jax.Array:
    """`[B, L, H, C]`, kept as `[B, L, H * C]`: split, 64 channels would take the memory of 128."""
    return checkpoint_name(x.reshape(*x.shape[:2], -1), name).reshape(x.shape)


# --- What is passed to the kernels ------------------------------------------------------------------------------------


def block_size(length: int) -> int:
    """How many tokens a block has, of sequences of this length."""
    return min(BLOCK, -(-length // LANES) * LANES)


def abreast(heads: int, kv_heads: int, channels: int) -> int:
    """N, how many heads lie side by side."""
    fitting = LANES // channels
    return fitting if LANES % channels == 0 and heads == kv_heads and heads % fitting == 0 else 1


def _packed(x: jax.Array, side_by_side: int) -> jax.Array:
    """`[B, L, H, C]` to `[B, H / N, L, N * C]`, L padded to whole blocks."""
    rows, length, heads, channels = x.shape
    packed = x.reshape(rows, length, heads // side_by_side, side_by_side * channels)
    return _padded(jnp.swapaxes(packed, 1, 2), 2)


def _unpacked(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse, to the shape of `like`."""
    return jnp.swapaxes(x, 1, 2)[:, : like.shape[1]].reshape(like.shape)


def _padded(x: jax.Array, axis: int, value: int = 0) -> jax.Array:
    size, block = x.shape[axis], block_size(x.shape[axis])
    widths = [(0, -size % block if number == axis else 0) for number in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def _padded_meta(meta: TokenMeta) -> TokenMeta:
    return TokenMeta(*(_padded(field, 1, PAD if name == "kind" else 0) for name, field in meta._asdict().items()))


def _rows(meta: TokenMeta) -> jax.Array:
    """`[B, F, L]`: tokens along lanes."""
    fields = jnp.stack(meta, axis=1)
    return jnp.pad(fields, ((0, 0), (0, _FIELDS - fields.shape[1]), (0, 0)))


def visible_blocks(q_meta: TokenMeta, k_meta: TokenMeta, rule: Rule) -> jax.Array:
    """What of each block of queries and keys is seen, int32 `[B, query blocks, key blocks]`.

    Queries that are padding do not count.
    """
    q_meta, k_meta = _padded_meta(q_meta), _padded_meta(k_meta)
    (rows, length), keys = q_meta.kind.shape, k_meta.kind.shape[1]
    visible = rule(
        TokenMeta(*(field[:, :, None] for field in q_meta)), TokenMeta(*(field[:, None, :] for field in k_meta))
    )
    q_block, k_block = block_size(length), block_size(keys)
    blocks = visible.reshape(rows, length // q_block, q_block, keys // k_block, k_block)
    padding = (q_meta.kind == PAD).reshape(rows, length // q_block, q_block, 1, 1)
    some, every = (blocks & ~padding).any(axis=(2, 4)), (blocks | padding).all(axis=(2, 4))
    return jnp.where(some, jnp.where(every, _ALL, _SOME), _NOTHING)


def _blocks(seen: jax.Array) -> Blocks:
    """`seen` `[B, blocks, other blocks]`."""
    last = jax.lax.cummax(jnp.where(seen > _NOTHING, jnp.arange(seen.shape[2]), -1), axis=2)
    first = jnp.argmax(seen > _NOTHING, axis=2, keepdims=True)
    return Blocks(seen.ravel(), jnp.where(last < 0, first, last).astype(jnp.int32).ravel())


def _call(kernel: Callable, name: str, grid: tuple, blocks: Blocks, inputs: list, outputs: list, scratch: list, run):
    """Runs a kernel over a grid whose last axis is a loop.

    Args:
      kernel: the function of references.
      name: what it is called in a compiled program.
      grid: (rows, heads side by side, blocks, other blocks).
      blocks: of that other side.
      inputs: (array, shape of a block, index of a block) each.
      outputs: (shape and type, shape of a block, index of a block) each.
      scratch: shapes of float32 arrays that stay from step to step.
      run: FLOPs if every block were computed, and whether to interpret.
    """
    flops, interpret = run
    arrays, shapes = [array for array, *_ in inputs], [shape for shape, *_ in outputs]
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[pl.BlockSpec(block, index) for _, block, index in inputs],
            out_specs=[pl.BlockSpec(block, index) for _, block, index in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        name=f"{NAME}_{name}",
        interpret=interpret,
    )(*blocks, *arrays)


def _indices(grid: tuple[int, int, int, int], group: int) -> tuple[Callable, ...]:
    """Of a grid (rows, heads, blocks of queries, blocks of keys), the blocks of everything that a kernel reads."""

    def loaded(b, i, j, load):
        return load[(b * grid[2] + i) * grid[3] + j]

    return (
        lambda b, h, i, j, *_: (b, h, i, 0),  # queries
        lambda b, h, i, j, *_: (b, h, 0, i),  # what there is one number of a query
        lambda b, h, i, j, *_: (b, i, 0),  # their metadata
        lambda b, h, i, j, _, load: (b, h // group, loaded(b, i, j, load), 0),  # keys and values
        lambda b, h, i, j, _, load: (b, 0, loaded(b, i, j, load)),  # their metadata
    )


def _block_shapes(q: jax.Array, k: jax.Array, side: int) -> tuple[tuple, tuple, tuple]:
    """Of queries, of keys, and of what there is one number of a query and head."""
    q_block, k_block = block_size(q.shape[2]), block_size(k.shape[2])
    return (None, None, q_block, q.shape[3]), (None, None, k_block, k.shape[3]), (None, side, 1, q_block)


def _name(kind: str, side: int, rule: Rule) -> str:
    """What a kernel is called; `planning` reads it."""
    return f"{kind}_x{side}_{rule.__name__}"


# --- Forward ----------------------------------------------------------------------------------------------------------


def _attend(q, k, v, q_meta, k_meta, *, rule: Rule, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Returns what is attended to, and the logarithm of the sum of each query's weights `[B, H, L]`."""
    given, side = q, abreast(q.shape[2], k.shape[2], q.shape[3])
    blocks = _blocks(visible_blocks(q_meta, k_meta, rule))
    q, k, v = (_packed(x, side) for x in (q, k, v))
    q_meta, k_meta = map(_padded_meta, (q_meta, k_meta))
    (rows, heads, padded, channels), (kv_heads, keys) = q.shape, k.shape[1:3]
    q_block, k_block, group = block_size(padded), block_size(keys), heads // kv_heads
    loops = keys // k_block
    grid = rows, heads, padded // q_block, loops

    of_queries, of_sums, of_query_meta, of_keys, of_key_meta = _indices(grid, group)
    per_query, per_key, per_sum = _block_shapes(q, k, side)
    out, log_sum = _call(
        functools.partial(_attend_kernel, grid[2], loops, side, rule),
        _name("forward", side, rule),
        grid,
        blocks,
        [
            (q, per_query, of_queries),
            (k, per_key, of_keys),
            (v, per_key, of_keys),
            (jnp.swapaxes(_rows(q_meta), 1, 2), (None, q_block, _FIELDS), of_query_meta),
            (_rows(k_meta), (None, _FIELDS, k_block), of_key_meta),
        ],
        [
            (jax.ShapeDtypeStruct(q.shape, q.dtype), per_query, of_queries),
            (jax.ShapeDtypeStruct((rows, heads * side, 1, padded), jnp.float32), per_sum, of_sums),
        ],
        [(side, q_block, LANES), (side, q_block, LANES), (q_block, channels)],
        (4 * rows * heads * padded * keys * channels, interpret),
    )
    return _unpacked(out, given), log_sum[:, :, 0, : given.shape[1]]


def _attend_kernel(
    q_blocks, loops, side, rule, seen, _, q, k, v, q_meta, k_meta, out, log_sum, largest, total, values
) -> None:
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    state = seen[(b * q_blocks + i) * loops + j]

    @pl.when(j == 0)
    def _():
        largest[...] = jnp.full_like(largest, _MASKED)
        total[...] = jnp.zeros_like(total)
        values[...] = jnp.zeros_like(values)

    def add(masked: bool) -> None:
        hidden = _hidden(q_meta, k_meta, rule) if masked else None
        for head in range(side):
            scores = _scores(_only(q[...], head, side), k[...], hidden)
            before = largest[head]
            after = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            weights, kept = jnp.exp(scores - after[:, :1]), jnp.exp(before - after)
            largest[head] = after
            total[head] = kept * total[head] + weights.sum(axis=1, keepdims=True)
            found = kept[:, :1] * values[...] + _product(weights.astype(v.dtype), v[...], 1, 0)
            values[...] = _only(found, head, side, values[...])

    _where_seen(state, add)

    @pl.when(j == loops - 1)
    def _():
        for head in range(side):
            sums = jnp.where(total[head] == 0, 1.0, total[head])
            values[...] = _only(values[...] / sums[:, :1], head, side, values[...])
            # Where nothing is seen, the backward pass is to find weights of zero.
            found = jnp.where(largest[head] > _MASKED, largest[head] + jnp.log(sums), -_MASKED)
            log_sum[head] = found.T[:1]
        out[...] = values[...].astype(out.dtype)


# --- Backward ---------------------------------------------------------------------------------------------------------


def _differentiate(gradient, out, log_sum, q, k, v, q_meta, k_meta, *, rule: Rule, interpret: bool) -> tuple:
    """The gradients of q, k and v."""
    given, side = (q, k, v), abreast(q.shape[2], k.shape[2], q.shape[3])
    seen = visible_blocks(q_meta, k_meta, rule)
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    q, k, v, gradient = (_packed(x, side) for x in (q, k, v, gradient))
    log_sum, delta = (_padded(x, 2)[:, :, None] for x in (log_sum, jnp.swapaxes(delta, 1, 2)))
    q_rows, k_rows = (_rows(_padded_meta(meta)) for meta in (q_meta, k_meta))
    read = q, k, v, gradient, log_sum, delta
    dq = _query_gradient(read, q_rows, k_rows, _blocks(seen), rule, interpret)
    dk, dv = _key_gradients(read, q_rows, k_rows, _blocks(jnp.swapaxes(seen, 1, 2)), rule, interpret)
    return tuple(_unpacked(x, like) for x, like in zip((dq, dk, dv), given))


def _differentiated(given: tuple, of_queries: Callable, of_sums: Callable, of_keys: Callable) -> list:
    """What both kernels below read beside metadata, as `_call` takes it."""
    q, k, *_ = given
    per_query, per_key, per_sum = _block_shapes(q, k, _side(given))
    blocks = per_query, per_key, per_key, per_query, per_sum, per_sum
    return list(zip(given, blocks, (of_queries, of_keys, of_keys, of_queries, of_sums, of_sums), strict=True))


def _side(given: tuple) -> int:
    """N of what the kernels below read: of q there are packed heads, of sums there are all."""
    q, *_, sums = given
    return sums.shape[1] // q.shape[1]


def _query_gradient(given, q_rows, k_rows, blocks, rule, interpret) -> jax.Array:
    q, k, *_ = given
    (rows, heads, length, channels), (kv_heads, keys) = q.shape, k.shape[1:3]
    q_block, k_block, group, side = block_size(length), block_size(keys), heads // kv_heads, _side(given)
    loops = keys // k_block
    grid = rows, heads, length // q_block, loops

    of_queries, of_sums, of_query_meta, of_keys, of_key_meta = _indices(grid, group)
    (out,) = _call(
        functools.partial(_query_gradient_kernel, grid[2], loops, side, rule),
        _name("queries", side, rule),
        grid,
        blocks,
        [
            *_differentiated(given, of_queries, of_sums, of_keys),
            (jnp.swapaxes(q_rows, 1, 2), (None, q_block, _FIELDS), of_query_meta),
            (k_rows, (None, _FIELDS, k_block), of_key_meta),
        ],
        [(jax.ShapeDtypeStruct(q.shape, q.dtype), (None, None, q_block, channels), of_queries)],
        [(q_block, channels)],
        (6 * rows * heads * length * keys * channels, interpret),
    )
    return out


def _query_gradient_kernel(
    q_blocks, loops, side, rule, seen, _, q, k, v, gradient, log_sum, delta, q_meta, k_meta, out, total
) -> None:
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    state = seen[(b * q_blocks + i) * loops + j]

    @pl.when(j == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def add(masked: bool) -> None:
        hidden = _hidden(q_meta, k_meta, rule) if masked else None
        for head in range(side):
            scores = _scores(_only(q[...], head, side), k[...], hidden)
            weights = jnp.exp(scores - log_sum[head, 0][:, None])
            of_weights = _product(_only(gradient[...], head, side), v[...], 1, 1)
            of_scores = weights * (of_weights - delta[head, 0][:, None])
            total[...] += _only(_product(of_scores.astype(k.dtype), k[...], 1, 0), head, side)

    _where_seen(state, add)

    @pl.when(j == loops - 1)
    def _():
        out[...] = total[...].astype(out.dtype)


def _key_gradients(given, q_rows, k_rows, blocks, rule, interpret) -> tuple:
    """Of a key/value head, the blocks of queries of its G heads follow each other."""
    q, k, v, *_ = given
    (rows, heads, length, channels), (kv_heads, keys) = q.shape, k.shape[1:3]
    q_block, k_block, group, side = block_size(length), block_size(keys), heads // kv_heads, _side(given)
    each = length // q_block
    grid = rows, kv_heads, keys // k_block, group * each

    def query(b, j, t, load):
        return load[(b * grid[2] + j) * each + t % each]

    def of_queries(b, h, j, t, _, load):
        return b, h * group + t // each, query(b, j, t, load), 0

    def of_sums(b, h, j, t, _, load):
        return b, h * group + t // each, 0, query(b, j, t, load)

    def of_keys(b, h, j, t, *_):
        return b, h, j, 0

    return _call(
        functools.partial(_key_gradients_kernel, grid[2], each, group, side, rule),
        _name("keys", side, rule),
        grid,
        blocks,
        [
            *_differentiated(given, of_queries, of_sums, of_keys),
            (q_rows, (None, _FIELDS, q_block), lambda b, h, j, t, _, load: (b, 0, query(b, j, t, load))),
            (jnp.swapaxes(k_rows, 1, 2), (None, k_block, _FIELDS), lambda b, h, j, t, *_: (b, j, 0)),
        ],
        [(jax.ShapeDtypeStruct(x.shape, x.dtype), (None, None, k_block, channels), of_keys) for x in (k, v)],
        [(k_block, channels)] * 2,
        (8 * rows * heads * length * keys * channels, interpret),
    )


def _key_gradients_kernel(
    k_blocks, each, group, side, rule, seen, _, q, k, v, gradient, log_sum, delta, q_meta, k_meta, dk, dv, of_k, of_v
) -> None:
    """Scores are transposed here, `[keys, queries]`, so that what each query has lies along lanes."""
    b, j, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    state = seen[(b * k_blocks + j) * each + t % each]

    @pl.when(t == 0)
    def _():
        of_k[...] = jnp.zeros_like(of_k)
        of_v[...] = jnp.zeros_like(of_v)

    def add(masked: bool) -> None:
        hidden = ~rule(_lanes(q_meta), _columns(k_meta)) if masked else None
        for head in range(side):
            # Queries and gradients of one head, so that of its neighbour nothing is added to keys and values.
            queries, gradients = _only(q[...], head, side), _only(gradient[...], head, side)
            weights = jnp.exp(_scores(k[...], queries, hidden) - log_sum[head])
            of_v[...] += _product(weights.astype(gradient.dtype), gradients, 1, 0)
            of_scores = weights * (_product(v[...], gradients, 1, 1) - delta[head])
            of_k[...] += _product(of_scores.astype(q.dtype), queries, 1, 0)

    _where_seen(state, add)

    @pl.when(t == group * each - 1)
    def _():
        dk[...] = of_k[...].astype(dk.dtype)
        dv[...] = of_v[...].astype(dv.dtype)


# --- In the kernels ---------------------------------------------------------------------------------------------------


def _where_seen(state: jax.Array, add: Callable[[bool], None]) -> None:
    pl.when(state == _SOME)(lambda: add(True))
    pl.when(state == _ALL)(lambda: add(False))


def _only(x: jax.Array, head: int, side: int, others: jax.Array | float = 0) -> jax.Array:
    """`[tokens, N * C]` with the channels of one head, and `others` in place of its neighbours'."""
    if side == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane // (x.shape[1] // side) == head, x, others).astype(x.dtype)


def _hidden(q_meta: Any, k_meta: Any, rule: Rule) -> jax.Array:
    """bool `[queries, keys]`."""
    return ~rule(_columns(q_meta), _lanes(k_meta))


def _scores(a: jax.Array, b: jax.Array, hidden: jax.Array | None) -> jax.Array:
    """Products of all tokens with all others; without `hidden` everything is seen."""
    scores = _product(a, b, 1, 1)
    return scores if hidden is None else jnp.where(hidden, _MASKED, scores)


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _columns(meta: Any) -> TokenMeta:
    """From `[tokens, F]`, fields of `[tokens, 1]`."""
    return TokenMeta(*(meta[:, f : f + 1] for f in range(len(TokenMeta._fields))))


def _lanes(meta: Any) -> TokenMeta:
    """From `[F, tokens]`, fields of `[1, tokens]`."""
    return TokenMeta(*(meta[f : f + 1, :] for f in range(len(TokenMeta._fields))))
