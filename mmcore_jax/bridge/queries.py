"""Learnable query tokens: a K x K grid that stands after the context of each generated image (MMCORE section 3.1.1)."""

import flax.linen as nn
import jax

from mmcore_jax.config import Queries
from mmcore_jax.sharding import parameter


class LearnableQueries(nn.Module):
    """Returns the query embeddings `[N, D]`, N = grid * grid."""

    config: Queries
    width: int

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.config.grid**2, self.width)
        return self.param("embedding", parameter(nn.initializers.normal(0.02), None, "embed"), shape)
