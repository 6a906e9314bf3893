"""Who may attend to whom, from per-token metadata alone.

A rule is a pure function `(query_meta, key_meta) -> bool` over broadcastable metadata; every attention implementation
evaluates the same rule. MMCORE section 3.2 and Figure 6 give the diffusion rule.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmcore_jax.nn.tokens import CLEAN, IMAGE, NOISED, PAD, QUERY, TEXT, VISUAL, TokenMeta

__all__ = ["CLEAN", "IMAGE", "NOISED", "PAD", "QUERY", "TEXT", "VISUAL", "TokenMeta"]
__all__ += ["DIFFUSION_RULES", "Rule", "alone", "block_causal", "causal", "concatenate", "history_visual"]
__all__ += ["plain_meta", "same_document", "same_frame", "same_place", "windows"]

Rule = Callable[[TokenMeta, TokenMeta], jax.Array]


def plain_meta(valid: jax.Array) -> TokenMeta:
    """Metadata of ordinary sequences, one document a row: `valid` is bool `[B, L]`, False where padded."""
    zeros = jnp.zeros(valid.shape, jnp.int32)
    index = jnp.broadcast_to(jnp.arange(valid.shape[1], dtype=jnp.int32), valid.shape)
    return TokenMeta(zeros, zeros, jnp.where(valid, TEXT, PAD), zeros, zeros, index)


def concatenate(first: TokenMeta, second: TokenMeta) -> TokenMeta:
    """Joins two token sequences along their length."""
    joined = TokenMeta(*(jnp.concatenate(pair, axis=1) for pair in zip(first, second)))
    length = joined.index.shape[1]
    return joined._replace(index=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), joined.index.shape))


def alone(meta: TokenMeta, frames: jax.Array) -> TokenMeta:
    """Metadata in which NOISED, TEXT and VISUAL of the `frames` that are marked, bool `[B, I]`, see no other frame.

    They become a document by themselves, of a negative number; CLEAN of these frames stays where it is, for those that
    look back at it. Nor do others see VISUAL of these, by any rule.
    """
    marked = jnp.take_along_axis(frames, meta.frame, axis=1) & (meta.kind != CLEAN)
    return meta._replace(document=jnp.where(marked, -1 - meta.frame, meta.document))


def same_document(q: TokenMeta, k: TokenMeta) -> jax.Array:
    """Everything in one's own document, nothing that is padding."""
    return (q.document == k.document) & (k.kind != PAD)


def causal(q: TokenMeta, k: TokenMeta) -> jax.Array:
    """The VLM's rule: the same document, and nothing that comes later."""
    return same_document(q, k) & (k.index <= q.index)


def same_frame(q: TokenMeta, k: TokenMeta) -> jax.Array:
    """One image, within the same document."""
    return same_document(q, k) & (q.frame == k.frame)


def same_place(q: TokenMeta, k: TokenMeta) -> jax.Array:
    """One row and column of one image: of `windows`, what lies in the same one."""
    return same_frame(q, k) & (q.row == k.row) & (q.col == k.col)


def windows(meta: TokenMeta, size: int, whole: jax.Array) -> TokenMeta:
    """Metadata in which rows and columns count windows of `size` by `size` patches, or images if `whole`, bool `[]`."""
    row, col = (jnp.where(whole, 0, place // size) for place in (meta.row, meta.col))
    return meta._replace(row=row, col=col)


def block_causal(q: TokenMeta, k: TokenMeta) -> jax.Array:
    """The diffusion rule for teacher forcing over interleaved images.

    NOISED, TEXT and VISUAL of frame i see each other and CLEAN of frames before i; CLEAN of frame j sees CLEAN of
    frames up to j. Nothing sees TEXT or VISUAL of another frame.
    """
    generating = (q.kind != CLEAN) & (
        ((k.kind != CLEAN) & (k.frame == q.frame)) | ((k.kind == CLEAN) & (k.frame < q.frame))
    )
    remembering = (q.kind == CLEAN) & (k.kind == CLEAN) & (k.frame <= q.frame)
    return same_document(q, k) & (generating | remembering)


def history_visual(q: TokenMeta, k: TokenMeta) -> jax.Array:
    """The same, but a frame also sees VISUAL of the frames before it, which the paper found harmful.

    What those saw of their own frame reaches it so, indirectly; a noised copy of it there is in training only.
    """
    history = (q.kind != CLEAN) & (k.kind == VISUAL) & (k.frame < q.frame)
    return block_causal(q, k) | (same_document(q, k) & history)


# By `config.model.dit.visibility`. "full" hides nothing: clean images see what is drawn from them, so that a document
# can generate one image only.
DIFFUSION_RULES: dict[str, Rule] = {
    "block_causal": block_causal,
    "history_visual": history_visual,
    "full": same_document,
}
