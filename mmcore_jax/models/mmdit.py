"""MMDiT of the SD3 family (diffusers `transformer_sd3.py`), on packed rows of several frames.

Two streams, context (text and visual embeddings) and latents, with their own weights and one joint attention;
adaLN-zero modulation from the timestep of the frame that a token belongs to.

B rows, L context tokens, S latent tokens, T timestep slots, D width, H heads, C channels per head, P values in a patch.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.config import Execution, MMDiT
from mmcore_jax.nn import masks, rotary
from mmcore_jax.nn.attention import attention
from mmcore_jax.nn.layers import Dense, LayerNorm, RMSNorm, merge_heads, split_heads
from mmcore_jax.nn.masks import Rule, TokenMeta
from mmcore_jax.nn.stack import stack
from mmcore_jax.sharding import constrain

SINUSOIDS = 256
_ZEROS = nn.initializers.zeros


class Slots(NamedTuple):
    """Which timestep slot modulates each token: context `[B, L]`, latents `[B, S]`."""

    context: jax.Array
    latents: jax.Array


class MMDiTModel(nn.Module):
    """Predicts the velocity or x_0 (`config.prediction`) of every latent token."""

    config: MMDiT
    execution: Execution

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        context: jax.Array,
        timesteps: jax.Array,
        slots: Slots,
        latent_meta: TokenMeta,
        context_meta: TokenMeta,
        rule: Rule,
        pooled: jax.Array | None = None,
    ) -> jax.Array:
        """Returns float32 `[B, S, P]`.

        Args:
          latents: `[B, S, P]` patches.
          context: `[B, L, context_width]`.
          timesteps: float32 `[B, T]` in [0, 1], 1 being noise.
          slots: timestep slot of each token.
          latent_meta, context_meta: metadata; rows and columns are relative to the image centre.
          rule: who may attend to whom.
          pooled: `[B, T or 1, pooled_width]` of each timestep slot, if the network has pooled conditioning.
        """
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        x = Dense(c.width, (None, "embed"), True, dtype, name="patch_embed")(latents)
        if "sincos" in c.position:
            x = x + sincos_table(c.position_grid, c.width, latent_meta).astype(dtype)
        y = Dense(c.width, (None, "embed"), True, dtype, name="context_embed")(context)
        condition = self._condition(timesteps, pooled, dtype)

        meta = masks.concatenate(context_meta, latent_meta)
        code = rotary.grid(meta.row, meta.col, c.width // c.heads) if "rotary" in c.position else None
        x, y = constrain(x, "batch", "length", None), constrain(y, "batch", None, None)
        shared = (condition, slots, meta, code)
        fields = {"config": c, "rule": rule}
        x, y = stack(JointBlock, c.depth - 1, self.execution, "blocks", **fields)((x, y), None, *shared)
        (x, _), _ = JointBlock(**fields, execution=self.execution, context_pre_only=True, name="last_block")(
            (x, y), None, *shared
        )

        shift, scale = Modulation(c.width, 2, dtype, name="norm_out")(condition, slots.latents)
        x = _modulate(LayerNorm(affine=False)(x), shift, scale)
        values = c.patch_size**2 * c.latent_channels
        return Dense(values, ("embed", None), True, dtype, _ZEROS, name="out")(x).astype(jnp.float32)

    def _condition(self, timesteps: jax.Array, pooled: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        width = self.config.width
        condition = Embedder(width, dtype, name="timestep_embed")(timestep_sinusoids(timesteps))
        if self.config.pooled_width:
            condition = condition + Embedder(width, dtype, name="pooled_embed")(pooled)
        return condition


class JointBlock(nn.Module):
    """One joint block. The carry is (latents, context); a `context_pre_only` block leaves the context as it is."""

    config: MMDiT
    execution: Execution
    rule: Rule
    context_pre_only: bool = False

    @nn.compact
    def __call__(
        self, carry: tuple, layer: None, condition: jax.Array, slots: Slots, meta: TokenMeta, code: tuple | None
    ) -> tuple[tuple, None]:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        x, y = carry
        shift, scale, *x_gates = Modulation(c.width, 6, dtype, name="x_modulation")(condition, slots.latents)
        x_in = _modulate(LayerNorm(affine=False)(x), shift, scale)
        parts = 2 if self.context_pre_only else 6
        shift, scale, *y_gates = Modulation(c.width, parts, dtype, name="y_modulation")(condition, slots.context)
        y_in = _modulate(LayerNorm(affine=False)(y), shift, scale)

        # Context first, as in the original SD3; with metadata the order has no meaning.
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(self._qkv(y_in, "y"), self._qkv(x_in, "x")))
        if code is not None:
            q, k = rotary.rotate(q, *code), rotary.rotate(k, *code)
        out = merge_heads(attention(q, k, v, meta, meta, self.rule, self.execution.attention))
        y_out, x_out = out[:, : y.shape[1]], out[:, y.shape[1] :]

        x = self._finish(x, x_out, x_gates, "x")
        if not self.context_pre_only:
            y = self._finish(y, y_out, y_gates, "y")
        return (constrain(x, "batch", "length", None), constrain(y, "batch", None, None)), None

    def _qkv(self, x: jax.Array, stream: str) -> tuple[jax.Array, jax.Array, jax.Array]:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        q, k, v = (
            split_heads(Dense(c.width, ("embed", "heads"), True, dtype, name=f"{stream}_{name}")(x), c.heads)
            for name in "qkv"
        )
        q = RMSNorm(gain=c.query_gain, name=f"{stream}_q_norm")(q)
        return q, RMSNorm(name=f"{stream}_k_norm")(k), v

    def _finish(self, x: jax.Array, attended: jax.Array, gates: list[jax.Array], stream: str) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        attention_gate, shift, scale, mlp_gate = gates
        x = x + attention_gate * Dense(c.width, ("heads", "embed"), True, dtype, name=f"{stream}_out")(attended)
        y = _modulate(LayerNorm(affine=False)(x), shift, scale)
        y = Dense(4 * c.width, ("embed", "mlp"), True, dtype, name=f"{stream}_up")(y)
        y = constrain(jax.nn.gelu(y, approximate=True), "batch", None, "activation_mlp")
        return x + mlp_gate * Dense(c.width, ("mlp", "embed"), True, dtype, name=f"{stream}_down")(y)


class Modulation(nn.Module):
    """adaLN-zero: `parts` vectors `[B, 1 or L, D]` for every token, from the condition `[B, T, D]` of its slot."""

    width: int
    parts: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, condition: jax.Array, slots: jax.Array) -> list[jax.Array]:
        table = Dense(self.parts * self.width, ("embed", "mlp"), True, self.dtype, _ZEROS, name="dense")(
            jax.nn.silu(condition)
        )
        if table.shape[1] > 1:  # a masked sum, not a gather, whose gradient would be a slow scatter
            table = sum((slots == t)[..., None] * table[:, t : t + 1] for t in range(table.shape[1]))
        return jnp.split(table, self.parts, axis=-1)


class Embedder(nn.Module):
    """Linear, SiLU, linear."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.silu(Dense(self.width, (None, "mlp"), True, self.dtype, name="up")(x))
        return Dense(self.width, ("mlp", "embed"), True, self.dtype, name="down")(x)


def timestep_sinusoids(timesteps: jax.Array) -> jax.Array:
    """`[...]` in [0, 1] to `[..., 256]`, cosines first, of 1000 times the timestep; float32 throughout."""
    frequencies = np.exp(-np.log(10_000.0) * np.arange(SINUSOIDS // 2, dtype=np.float32) / (SINUSOIDS // 2))
    angles = 1000.0 * timesteps.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_table(size: int, width: int, meta: TokenMeta) -> jax.Array:
    """SD3's additive code, `[B, S, D]`: half of the channels follow the column, half the row."""

    def axis(position: jax.Array) -> jax.Array:
        frequencies = 10_000.0 ** (-np.arange(width // 4, dtype=np.float32) / (width // 4))
        angles = (position + size // 2).astype(jnp.float32)[..., None] * frequencies
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    return jnp.concatenate([axis(meta.col), axis(meta.row)], axis=-1)


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1 + scale) + shift
