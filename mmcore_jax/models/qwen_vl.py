"""Qwen2.5-VL (transformers `modeling_qwen2_5_vl.py`): vision tower, merger and decoder, on packed rows.

B rows, L VLM tokens, S vision patches, M = S / merge^2 merged patches, D width, H heads, K key/value heads, P values in
a patch. Patches arrive in merge order (the merge^2 patches of one merged token are neighbours); windows are metadata,
so no token is permuted.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.config import Execution, QwenVision, QwenVL
from mmcore_jax.nn import masks, rotary
from mmcore_jax.nn.attention import attention
from mmcore_jax.nn.layers import Dense, RMSNorm, gather_tokens, merge_heads, split_heads
from mmcore_jax.nn.masks import TokenMeta
from mmcore_jax.nn.stack import stack
from mmcore_jax.sharding import constrain, parameter

TEMPORAL_PATCH = 2  # an image is two equal frames
IMAGE_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
IMAGE_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_INIT = nn.initializers.lecun_normal()
# Unit embeddings keep what a token is in the residual stream, up to the hidden states that condition the diffusion.
_EMBEDDING_INIT = nn.initializers.normal(1.0)
_TIED_INIT = nn.initializers.variance_scaling(1.0, "fan_out", "normal")


class QwenVLModel(nn.Module):
    """The whole network: `embed` tokens and patches, then `decode`; `logits` reads out the vocabulary."""

    config: QwenVL
    execution: Execution

    def setup(self) -> None:
        c = self.config
        init = _TIED_INIT if c.tie_embeddings else _EMBEDDING_INIT
        self.embedding = self.param("embedding", parameter(init, "vocab", "embed"), (c.vocab_size, c.width))
        self.vision = VisionTower(c.vision, c.width, self.execution)
        self.decoder = Decoder(c, self.execution)
        if not c.tie_embeddings:
            self.head = self.param("head", parameter(_INIT, "embed", "vocab"), (c.width, c.vocab_size))

    def embed(
        self,
        tokens: jax.Array,
        meta: TokenMeta,
        source: jax.Array,
        patches: jax.Array,
        patch_meta: TokenMeta,
        queries: jax.Array,
    ) -> jax.Array:
        """Returns input embeddings `[B, L, D]`.

        Args:
          tokens: `[B, L]` ids, read where `meta.kind` is TEXT.
          source: `[B, L]`, the merged patch of an IMAGE position, the query of a QUERY position.
          patches: uint8 `[B, S, P]`, RGB values of a patch ordered (row, column, channel).
          patch_meta: frame, position and window (`document`) of each patch.
          queries: `[N, D]`.
        """
        x = self.embedding[tokens].astype(self.execution.compute_dtype)
        if patches.shape[1]:
            images = gather_tokens(self.vision(patches, patch_meta), source)
            x = jnp.where((meta.kind == masks.IMAGE)[..., None], images, x)
        asked = queries.astype(x.dtype)[jnp.maximum(source, 0) % queries.shape[0]]
        return jnp.where((meta.kind == masks.QUERY)[..., None], asked, x)

    def decode(self, x: jax.Array, meta: TokenMeta, positions: jax.Array) -> jax.Array:
        """Returns the final, normed hidden states `[B, L, D]`; positions `[B, L, 3]` are (time, row, column)."""
        return self.decoder(x, meta, positions)

    def logits(self, hidden_states: jax.Array) -> jax.Array:
        """Returns float32 logits `[..., V]`."""
        kernel = self.embedding.T if self.config.tie_embeddings else self.head
        return jnp.matmul(hidden_states, kernel.astype(hidden_states.dtype), preferred_element_type=jnp.float32)


class Decoder(nn.Module):
    """The causal decoder."""

    config: QwenVL
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array, meta: TokenMeta, positions: jax.Array) -> jax.Array:
        c = self.config
        code = rotary.mrope(positions, c.mrope_section, c.rope_theta)
        x = constrain(x, "batch", "length", None)
        x = stack(DecoderBlock, c.depth, self.execution, "blocks", config=c)(x, None, meta, code)
        return RMSNorm(c.rms_norm_eps, name="norm")(x)


class DecoderBlock(nn.Module):
    """Grouped-query attention with biases on q, k, v, then SwiGLU; RMSNorm before each."""

    config: QwenVL
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array, layer: None, meta: TokenMeta, code: tuple) -> tuple[jax.Array, None]:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        head_width = c.width // c.heads

        def dense(features: int, names: tuple, bias: bool, name: str) -> Dense:
            return Dense(features, names, bias, dtype, _INIT, name=name)

        y = RMSNorm(c.rms_norm_eps, name="attention_norm")(x)
        q = split_heads(dense(c.width, ("embed", "heads"), True, "q")(y), c.heads)
        k = split_heads(dense(c.kv_heads * head_width, ("embed", "kv_heads"), True, "k")(y), c.kv_heads)
        v = split_heads(dense(c.kv_heads * head_width, ("embed", "kv_heads"), True, "v")(y), c.kv_heads)
        q, k = rotary.rotate(q, *code), rotary.rotate(k, *code)
        y = attention(q, k, v, meta, meta, masks.causal, self.execution.attention)
        x = x + dense(c.width, ("heads", "embed"), False, "out")(merge_heads(y))

        y = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        y = jax.nn.silu(dense(c.mlp_width, ("embed", "mlp"), False, "gate")(y)) * dense(
            c.mlp_width, ("embed", "mlp"), False, "up"
        )(y)
        y = constrain(y, "batch", "length", "activation_mlp")
        x = x + dense(c.width, ("mlp", "embed"), False, "down")(y)
        return constrain(x, "batch", "length", None), None


class VisionTower(nn.Module):
    """Patches to merged tokens of the decoder's width: `[B, S, P] -> [B, M, D]`."""

    config: QwenVision
    out_width: int
    execution: Execution

    @nn.compact
    def __call__(self, patches: jax.Array, meta: TokenMeta) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        pixels = patches.astype(jnp.float32).reshape(*patches.shape[:2], -1, 3) / 255.0
        pixels = ((pixels - IMAGE_MEAN) / IMAGE_STD).reshape(patches.shape)
        x = Dense(c.width, (None, "embed"), False, dtype, name="patch_embed")(
            jnp.concatenate([pixels] * TEMPORAL_PATCH, -1)
        )
        code = rotary.grid(meta.row, meta.col, c.width // c.heads)
        full = jnp.array([i in c.full_attention_blocks for i in range(c.depth)])
        x = stack(VisionBlock, c.depth, self.execution, "blocks", config=c)(x, full, meta, code)
        return Merger(c, self.out_width, self.execution, name="merger")(x)


class VisionBlock(nn.Module):
    """Attention within an image, or within a window of it unless `full`, then SwiGLU; biases throughout."""

    config: QwenVision
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array, full: jax.Array, meta: TokenMeta, code: tuple) -> tuple[jax.Array, None]:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)

        def dense(features: int, names: tuple, name: str) -> Dense:
            return Dense(features, names, True, dtype, _INIT, name=name)

        def rule(q: TokenMeta, k: TokenMeta) -> jax.Array:
            same_window = masks.same_window(c.window_size // c.patch_size)
            return masks.same_frame(q, k) & (full | same_window(q, k))

        y = RMSNorm(name="attention_norm")(x)
        q, k, v = (split_heads(dense(c.width, ("embed", "heads"), name)(y), c.heads) for name in "qkv")
        q, k = rotary.rotate(q, *code), rotary.rotate(k, *code)
        y = attention(q, k, v, meta, meta, rule, self.execution.attention)
        x = x + dense(c.width, ("heads", "embed"), "out")(merge_heads(y))

        y = RMSNorm(name="mlp_norm")(x)
        y = jax.nn.silu(dense(c.mlp_width, ("embed", "mlp"), "gate")(y)) * dense(c.mlp_width, ("embed", "mlp"), "up")(y)
        return x + dense(c.width, ("mlp", "embed"), "down")(y), None


class Merger(nn.Module):
    """Joins merge^2 neighbouring patches into one token of the decoder's width."""

    config: QwenVision
    out_width: int
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        group, dtype = self.config.merge_size**2, jnp.dtype(self.execution.compute_dtype)
        x = RMSNorm(name="norm")(x)
        x = x.reshape(x.shape[0], x.shape[1] // group, group * x.shape[2])
        x = jax.nn.gelu(Dense(x.shape[-1], ("embed", "mlp"), True, dtype, _INIT, name="up")(x), approximate=False)
        return Dense(self.out_width, ("mlp", "embed"), True, dtype, _INIT, name="down")(x)
