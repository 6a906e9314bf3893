"""Finds leaks: tokens that a function lets see more, or less, than they may.

`may_see_vlm` and `may_see_diffusion` say once more, token by token and in plain Python, what the rules of `nn/masks.py`
say in arrays. `leaks` measures what really flows, in the forward pass and in the gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.nn.masks import CLEAN, PAD, VISUAL, TokenMeta

Token = TokenMeta
"""One token: a `TokenMeta` of ints."""


def may_see_vlm(q: Token, k: Token) -> bool:
    """A token sees itself and what stands before it in its document."""
    return k.kind != PAD and q.document == k.document and k.index <= q.index


def may_see_diffusion(q: Token, k: Token) -> bool:
    """The contract of DESIGN.md, section 3."""
    if k.kind == PAD or q.document != k.document:
        return False
    if q.kind == CLEAN:
        return k.kind == CLEAN and k.frame <= q.frame
    if k.kind == CLEAN:
        return k.frame < q.frame
    return k.frame == q.frame


def may_see_history(q: Token, k: Token) -> bool:
    """That, and the visual embeddings of earlier frames."""
    seen = q.kind != CLEAN and k.kind == VISUAL and q.document == k.document and k.frame < q.frame
    return seen or may_see_diffusion(q, k)


def may_see_document(q: Token, k: Token) -> bool:
    """Everything in one's own document."""
    return k.kind != PAD and q.document == k.document


DIFFUSION = {"block_causal": may_see_diffusion, "history_visual": may_see_history, "full": may_see_document}


def visibility(may_see: Callable[[Token, Token], bool], q_meta: TokenMeta, k_meta: TokenMeta) -> np.ndarray:
    """Bool `[L, S]` for the first row of the metadata."""
    queries, keys = (
        [Token(*map(int, token)) for token in zip(*(field[0] for field in meta))] for meta in (q_meta, k_meta)
    )
    return np.array([[may_see(q, k) for k in keys] for q in queries])


def leaks(function: Callable[[jax.Array], jax.Array], x: jax.Array, visible: np.ndarray, read: np.ndarray) -> list[str]:
    """Returns what is wrong: flows from a hidden token, and visible tokens that nothing flows from.

    Args:
      function: `[S, D] -> [L, E]`.
      x: where it is tested, `[S, D]`.
      visible: bool `[L, S]`, what each output may depend on.
      read: bool `[L]`, the outputs that have a meaning.
    """
    forward = jax.jit(function)
    weights = jax.random.normal(jax.random.key(1), jax.eval_shape(function, x).shape)
    gradient = jax.jit(jax.grad(lambda x, i: jnp.sum(function(x)[i] * weights[i])))
    x, noise = np.asarray(x), np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    before, only = np.asarray(forward(x)), np.eye(len(x), dtype=np.float32)[..., None]
    seen = np.stack([(np.asarray(forward(x + only[j] * noise)) != before).any(-1) for j in range(len(x))], axis=1)
    flows = np.stack([(np.asarray(gradient(x, i)) != 0).any(-1) if read[i] else visible[i] for i in range(len(before))])
    found = []
    for name, measured in (("forward", seen), ("gradient", flows)):
        for i, j in np.argwhere((measured != visible) & read[:, None]):
            found.append(f"{name}: {i} {'sees' if measured[i, j] else 'does not see'} {j}")
    return found
