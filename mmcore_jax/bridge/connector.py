"""From the VLM's hidden states at the query tokens to visual embeddings.

MMCORE has one linear map; in its ablation (Table 1) and MetaQueries (arXiv:2504.06256) a transformer encoder comes
before it.
B rows, G generated images of a row, N query tokens, D width of the VLM.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmcore_jax.config import Execution, LinearConnector, Tower, TransformerConnector
from mmcore_jax.nn import masks, rotary
from mmcore_jax.nn.attention import attention
from mmcore_jax.nn.layers import Dense, RMSNorm, merge_heads, split_heads
from mmcore_jax.nn.masks import TokenMeta
from mmcore_jax.nn.stack import stack
from mmcore_jax.sharding import constrain


def make_connector(config: LinearConnector | TransformerConnector, execution: Execution) -> nn.Module:
    """Returns the connector that a config names: `[B, G, N, D] -> [B, G, N, config.width]`."""
    if isinstance(config, LinearConnector):
        return LinearConnectorModel(config, execution)
    return TransformerConnectorModel(config, execution)


class LinearConnectorModel(nn.Module):
    """One linear map."""

    config: LinearConnector
    execution: Execution

    @nn.compact
    def __call__(self, hidden_states: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.execution.compute_dtype)
        return Dense(self.config.width, ("embed", None), True, dtype, name="dense")(hidden_states)


class TransformerConnectorModel(nn.Module):
    """Blocks in which the queries of an image see each other, then a norm and the linear map.

    Rotary positions are rows and columns of the grid of queries. Where the encoder is not as wide as the VLM, a linear
    map comes before it.
    """

    config: TransformerConnector
    execution: Execution

    @nn.compact
    def __call__(self, hidden_states: jax.Array) -> jax.Array:
        c, dtype = self.config.encoder, jnp.dtype(self.execution.compute_dtype)
        *images, queries, width = hidden_states.shape
        x = hidden_states.reshape(-1, queries, width).astype(dtype)
        if width != c.width:
            x = Dense(c.width, ("embed", None), True, dtype, name="in")(x)
        meta = _grid_meta(*x.shape[:2])
        code = rotary.grid(meta.row, meta.col, c.width // c.heads)
        x = constrain(x, "batch", None, None)
        x, _ = stack(Block, c.depth, self.execution, "blocks", config=c)(x, None, meta, code)
        x = Dense(self.config.width, ("embed", None), True, dtype, name="out")(RMSNorm(name="norm")(x))
        return x.reshape(*images, queries, self.config.width)


class Block(nn.Module):
    """Qwen2's block, but bidirectional: attention with biases on q, k, v, then SwiGLU; RMSNorm before each."""

    config: Tower
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array, layer: None, meta: TokenMeta, code: tuple) -> tuple[jax.Array, None]:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)

        def dense(features: int, names: tuple, bias: bool, name: str) -> Dense:
            return Dense(features, names, bias, dtype, name=name)

        y = RMSNorm(name="attention_norm")(x)
        q, k, v = (split_heads(dense(c.width, ("embed", "heads"), True, name)(y), c.heads) for name in "qkv")
        q, k = rotary.rotate(q, *code), rotary.rotate(k, *code)
        y = attention(q, k, v, meta, meta, masks.same_document, self.execution.attention)
        x = x + dense(c.width, ("heads", "embed"), False, "out")(merge_heads(y))

        y = RMSNorm(name="mlp_norm")(x)
        gate, up = (dense(c.mlp_width, ("embed", "mlp"), False, name)(y) for name in ("gate", "up"))
        y = constrain(jax.nn.silu(gate) * up, "batch", None, "activation_mlp")
        x = x + dense(c.width, ("mlp", "embed"), False, "down")(y)
        return constrain(x, "batch", None, None), None


def _grid_meta(images: int, queries: int) -> TokenMeta:
    """Metadata `[images, N]`: each image is a document of its own, a square of queries."""
    meta = masks.plain_meta(jnp.ones((images, queries), bool))
    side = math.isqrt(queries)
    return meta._replace(row=meta.index // side, col=meta.index % side)
