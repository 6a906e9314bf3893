"""Which image of its document a latent token is of: a learned embedding, which starts at zero.

The published networks know of one image, and give the same row and column of every image the same position. Of several,
what tells the first from the second is an embedding and not one more axis of the rotary code: SD3 has no such code, and
rotating its queries and keys by it would change, before the first step, what images make of each other, and could not
be learned. A zero embedding changes no bit of anything. The first image has none for good: one image alone is always
drawn by the network that published checkpoints hold, and `pretrained.export` writes all of it.

Images count from the beginning of the document, as prompts do ("the first image"), and not back from the one to come:
a CLEAN token is the same for all that look back at it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmcore_jax.config import Execution, Frames
from mmcore_jax.sharding import parameter


class FrameEmbedding(nn.Module):
    """`config.count` embeddings, of the second image of a document and those that follow it."""

    config: Frames
    width: int
    execution: Execution

    @nn.compact
    def __call__(self, number: jax.Array) -> jax.Array:
        """Numbers of images, from 0, `[B, T]` to embeddings `[B, T, D]`."""
        shape, dtype = (self.config.count, self.width), jnp.dtype(self.execution.compute_dtype)
        table = self.param("embedding", parameter(nn.initializers.zeros, None, "embed"), shape)
        # A product, not a gather, whose gradient would be a slow scatter.
        return jax.nn.one_hot(number - 1, self.config.count, dtype=dtype) @ table.astype(dtype)
