"""SigLIP's pairwise sigmoid loss (arXiv 2303.15343, Algorithm 1)."""

import jax
import jax.numpy as jnp

from mmcore_jax import config as config_lib
from mmcore_jax.data.layout import Pairs
from mmcore_jax.mmcore import Forward


def count(batch: Pairs) -> jax.Array:
    """Number of pairs."""
    return jnp.maximum(jnp.sum(_present(batch)), 1).astype(jnp.float32)


def loss(
    forward: Forward, settings: config_lib.SigmoidContrastive, keys: jax.Array, step: jax.Array, count: jax.Array
) -> tuple[jax.Array, dict]:
    """Every image is told apart from every other text of the (accumulation) batch; equal texts count as positive."""
    _, _, logits = forward.model.contrast(forward.batch)
    ids, present = forward.batch.ids, _present(forward.batch)
    positive = (ids[:, None] == ids[None]).all(-1)
    both = present[:, None] & present[None]
    value = -jnp.sum(both * jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))) / count
    right = jnp.argmax(jnp.where(both, logits, -jnp.inf), axis=0) == jnp.arange(logits.shape[0])
    return value, {"retrieval": jnp.sum(right & present) / count}


def _present(batch: Pairs) -> jax.Array:
    """Which rows hold a pair, `[B]`."""
    return batch.valid.any(axis=1)
