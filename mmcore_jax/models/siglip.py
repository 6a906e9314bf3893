"""SigLIP (transformers `modeling_siglip.py`): vision tower with an attention pooling head, and text tower.

B rows, L text tokens, S patches, D width, P values in a patch.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmcore_jax.config import Execution, Siglip, SiglipText, SiglipVision, Tower
from mmcore_jax.nn import masks
from mmcore_jax.nn.attention import attention
from mmcore_jax.nn.layers import Dense, LayerNorm, merge_heads, split_heads
from mmcore_jax.nn.masks import TokenMeta
from mmcore_jax.nn.patches import patchify
from mmcore_jax.nn.stack import stack
from mmcore_jax.sharding import constrain, parameter


class SiglipModel(nn.Module):
    """Both towers, and the temperature and bias of the sigmoid loss."""

    config: Siglip
    execution: Execution

    def setup(self) -> None:
        c = self.config
        self.vision = SiglipVisionTower(c.vision, c.layer_norm_eps, self.execution)
        if c.text is not None:
            self.text = SiglipTextTower(c.text, c.layer_norm_eps, self.execution)
            self.logit_scale = self.param("logit_scale", parameter(nn.initializers.constant(jnp.log(10.0))), ())
            self.logit_bias = self.param("logit_bias", parameter(nn.initializers.constant(-10.0)), ())

    def patch_features(self, images: jax.Array) -> jax.Array:
        """uint8 images `[B, height, width, 3]` to the last hidden states of the patches `[B, S, D]`."""
        return self.vision(images)[0]

    def __call__(self, images: jax.Array, tokens: jax.Array, valid: jax.Array) -> tuple[jax.Array, ...]:
        """Returns unit embeddings of images and of texts, `[B, D]` each, and the logits of all pairs `[B, B]`.

        Args:
          images: uint8 `[B, height, width, 3]`.
          tokens: `[B, L]`, right-padded; `valid` is bool `[B, L]`.
        """
        image = _unit(self.vision(images)[1])
        text = _unit(self.text(tokens, valid))
        return image, text, text @ image.T * jnp.exp(self.logit_scale) + self.logit_bias


class SiglipVisionTower(nn.Module):
    """uint8 `[B, height, width, 3]` to patch features `[B, S, D]` and pooled features `[B, D]`."""

    config: SiglipVision
    eps: float
    execution: Execution

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        x = patchify(images.astype(jnp.float32) / 127.5 - 1.0, c.patch_size)
        x = Dense(c.width, (None, "embed"), True, dtype, name="patch_embed")(x)
        positions = nn.initializers.normal(c.width**-0.5)
        x = x + self.param("positions", parameter(positions, None, "embed"), x.shape[1:]).astype(dtype)
        meta = masks.plain_meta(jnp.ones(x.shape[:2], bool))
        x = stack(Block, c.depth, self.execution, "blocks", config=c, eps=self.eps)(x, None, meta)
        x = LayerNorm(self.eps, name="norm")(x)
        return x, PoolingHead(c, self.eps, self.execution, name="head")(x)


class SiglipTextTower(nn.Module):
    """Token ids `[B, L]` to pooled features `[B, D]`: the last valid token, through a linear head."""

    config: SiglipText
    eps: float
    execution: Execution

    @nn.compact
    def __call__(self, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        init = nn.initializers.normal(0.02)
        embedding = self.param("embedding", parameter(init, "vocab", "embed"), (c.vocab_size, c.width))
        positions = self.param("positions", parameter(init, None, "embed"), (c.max_length, c.width))
        x = (embedding[tokens] + positions[: tokens.shape[1]]).astype(dtype)
        meta = masks.plain_meta(valid)
        x = stack(Block, c.depth, self.execution, "blocks", config=c, eps=self.eps)(x, None, meta)
        x = LayerNorm(self.eps, name="norm")(x)
        last = jnp.sum(valid, axis=1) - 1
        return Dense(c.width, ("embed", None), True, dtype, name="head")(x[jnp.arange(x.shape[0]), last])


class Block(nn.Module):
    """Bidirectional attention and a tanh-GELU MLP, LayerNorm before each; biases throughout."""

    config: Tower
    eps: float
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array, layer: None, meta: TokenMeta) -> tuple[jax.Array, None]:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        y = LayerNorm(self.eps, name="attention_norm")(x)
        q, k, v = (
            split_heads(Dense(c.width, ("embed", "heads"), True, dtype, name=name)(y), c.heads) for name in "qkv"
        )
        y = attention(q, k, v, meta, meta, masks.same_document, self.execution.attention)
        x = x + Dense(c.width, ("heads", "embed"), True, dtype, name="out")(merge_heads(y))
        x = x + Mlp(c, self.execution, name="mlp")(LayerNorm(self.eps, name="mlp_norm")(x))
        return constrain(x, "batch", "length", None), None


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    config: Tower
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        x = jax.nn.gelu(Dense(c.mlp_width, ("embed", "mlp"), True, dtype, name="up")(x), approximate=True)
        return Dense(c.width, ("mlp", "embed"), True, dtype, name="down")(x)


class PoolingHead(nn.Module):
    """Attention pooling with one learned probe: `[B, S, D] -> [B, D]`."""

    config: Tower
    eps: float
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        probe = self.param("probe", parameter(nn.initializers.xavier_uniform(), None, "embed"), (1, c.width))
        probe = jnp.broadcast_to(probe.astype(dtype), (x.shape[0], 1, c.width))
        q = split_heads(Dense(c.width, ("embed", "heads"), True, dtype, name="q")(probe), c.heads)
        k, v = (split_heads(Dense(c.width, ("embed", "heads"), True, dtype, name=name)(x), c.heads) for name in "kv")
        q_meta, k_meta = (masks.plain_meta(jnp.ones(t.shape[:2], bool)) for t in (q, k))
        y = attention(q, k, v, q_meta, k_meta, masks.same_document, self.execution.attention)
        x = Dense(c.width, ("heads", "embed"), True, dtype, name="out")(merge_heads(y))
        x = x + Mlp(c, self.execution, name="mlp")(LayerNorm(self.eps, name="norm")(x))
        return x[:, 0]


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
