"""From the VLM's hidden states at the query tokens to visual embeddings (MMCORE: one linear map)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmcore_jax.config import Execution
from mmcore_jax.nn.layers import Dense


class LinearConnector(nn.Module):
    """`[B, G, N, D] -> [B, G, N, width]`: queries of G generated images to the width of the vision target."""

    width: int
    execution: Execution

    @nn.compact
    def __call__(self, hidden_states: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.execution.compute_dtype)
        return Dense(self.width, ("embed", None), True, dtype, name="dense")(hidden_states)
