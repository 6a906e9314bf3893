"""MMDiT of the SD3 family (diffusers `transformer_sd3.py`), on packed rows of several frames.

Two streams, context (text and visual embeddings) and latents, with their own weights and one joint attention;
adaLN-zero modulation from the timestep of the frame that a token belongs to. Published members: SD3-medium (no QK
norm), SD3.5-medium (`dual_layers` 13: its first blocks also attend among the latents alone) and SD3.5-large.
Latents that see neither the context nor the other latents can run once, alone, and be remembered: what others need of
them is keys and values.

B rows, L context tokens, S latent tokens, M remembered ones, T timestep slots, D width, H heads, C channels per head,
P values in a patch, G patches a side of the table of positions.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.config import Execution, MMDiT, UserError
from mmcore_jax.nn import masks, rotary
from mmcore_jax.nn.attention import attention
from mmcore_jax.nn.layers import Dense, LayerNorm, RMSNorm, merge_heads, split_heads
from mmcore_jax.nn.masks import Rule, TokenMeta
from mmcore_jax.nn.stack import stack
from mmcore_jax.sharding import constrain

SINUSOIDS = 256
MOST_SUMMED = 4  # slots whose rows a masked sum picks: those of rows of three images
CENTRED = 16  # positions over the patches that a published table was trained on first
_ZEROS = nn.initializers.zeros


class Slots(NamedTuple):
    """Which timestep slot modulates each token: context `[B, L]`, latents `[B, S]`."""

    context: jax.Array
    latents: jax.Array


class Remembered(NamedTuple):
    """Keys and values `[B, M, H, C]` of both attentions of a block; those of a stack have a leading layer axis."""

    joint: tuple[jax.Array, jax.Array]
    dual: tuple[jax.Array, jax.Array] | None


class Memory(NamedTuple):
    """Latent tokens that need not run again: their metadata `[B, M]`, and what each stack of blocks remembers."""

    meta: TokenMeta
    blocks: dict[str, Remembered]


class MMDiTModel(nn.Module):
    """Predicts the velocity or x_0 (`config.prediction`) of every latent token."""

    config: MMDiT
    execution: Execution

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
        memory: Memory | None = None,
        added: jax.Array | None = None,
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
          memory: more latent tokens to attend to, from `remember`.
          added: `[B, S, D]`, to the embedded patches.

        Raises:
          UserError: if the sizes of the config do not fit each other.
        """
        given = latents, context, timesteps, slots, latent_meta, context_meta, rule, pooled
        return self._run(*given, memory, added)[0]

    def remember(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        latent_meta: TokenMeta,
        rule: Rule,
        pooled: jax.Array | None = None,
        added: jax.Array | None = None,
    ) -> Memory:
        """Runs latents that see no context and no other latents; arguments as above, but with one timestep slot."""
        context = jnp.zeros((latents.shape[0], 0, self.config.context_width))
        context_meta = jax.tree.map(lambda field: field[:, :0], latent_meta)
        slots = Slots(context_meta.frame, jnp.zeros_like(latent_meta.frame))
        given = latents, context, timesteps, slots, latent_meta, context_meta, rule, pooled
        blocks = self._run(*given, None, added, remembers=True)[1]
        return Memory(latent_meta, blocks)

    @nn.compact
    def _run(
        self,
        latents: jax.Array,
        context: jax.Array,
        timesteps: jax.Array,
        slots: Slots,
        latent_meta: TokenMeta,
        context_meta: TokenMeta,
        rule: Rule,
        pooled: jax.Array | None,
        memory: Memory | None,
        added: jax.Array | None,
        remembers: bool = False,
    ) -> tuple[jax.Array, dict[str, Remembered | None]]:
        """The prediction, and what each stack of blocks `remembers`."""
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        _check(c)
        x = Dense(c.width, (None, "embed"), True, dtype, name="patch_embed")(latents)
        if "sincos" in c.position:
            x = x + sincos_positions(c, latent_meta).astype(dtype)
        if added is not None:
            x = x + added
        y = Dense(c.width, (None, "embed"), True, dtype, name="context_embed")(context)
        condition = self._condition(timesteps, pooled, dtype)

        meta = masks.concatenate(context_meta, latent_meta)
        code = rotary.grid(meta.row, meta.col, c.width // c.heads) if "rotary" in c.position else None
        x, y = constrain(x, "batch", "length", None), constrain(y, "batch", None, None)
        given, kept, k_meta = {}, {}, meta
        if memory:
            given, k_meta = memory.blocks, masks.concatenate(meta, memory.meta)
        shared = (condition, slots, meta, k_meta, code)
        fields = {"config": c, "rule": rule, "remembers": remembers}
        for name, depth, dual in (("dual_blocks", c.dual_layers, True), ("blocks", c.depth - 1 - c.dual_layers, False)):
            if depth:
                blocks = stack(JointBlock, depth, self.execution, name, dual=dual, **fields)
                (x, y), kept[name] = blocks((x, y), given.get(name), *shared)
        last_block = JointBlock(**fields, execution=self.execution, context_pre_only=True, name="last_block")
        (x, _), kept["last_block"] = last_block((x, y), given.get("last_block"), *shared)

        shift, scale = Modulation(c.width, 2, dtype, name="norm_out")(condition, slots.latents)
        x = _modulate(LayerNorm(affine=False)(x), shift, scale)
        values = c.patch_size**2 * c.latent_channels
        return Dense(values, ("embed", None), True, dtype, _ZEROS, name="out")(x).astype(jnp.float32), kept

    def _condition(self, timesteps: jax.Array, pooled: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        width = self.config.width
        condition = Embedder(width, dtype, name="timestep_embed")(timestep_sinusoids(timesteps))
        if self.config.pooled_width:
            condition = condition + Embedder(width, dtype, name="pooled_embed")(pooled)
        return condition


class JointBlock(nn.Module):
    """One joint block. The carry is (latents, context); a `context_pre_only` block leaves the context as it is.

    A `dual` block has a second attention, among the latents alone, on its own modulation of the same layer norm.
    A block that `remembers` returns its keys and values. One that is given them, as `memory`, attends to them too.
    """

    config: MMDiT
    execution: Execution
    rule: Rule
    context_pre_only: bool = False
    dual: bool = False
    remembers: bool = False

    @nn.compact
    def __call__(
        self,
        carry: tuple,
        memory: Remembered | None,
        condition: jax.Array,
        slots: Slots,
        meta: TokenMeta,
        k_meta: TokenMeta,
        code: tuple | None,
    ) -> tuple[tuple, Remembered | None]:
        (x, y), dual = carry, None
        x_norm, x_modulation = self._normalise(x, 9 if self.dual else 6, condition, slots.latents, "x")
        y_norm, y_modulation = self._normalise(y, 2 if self.context_pre_only else 6, condition, slots.context, "y")
        # Context first, as in the original SD3; with metadata the order has no meaning.
        streams = (
            self._qkv(_modulate(y_norm, *y_modulation[:2]), "y"),
            self._qkv(_modulate(x_norm, *x_modulation[:2]), "x"),
        )
        qkv = (jnp.concatenate(pair, axis=1) for pair in zip(*streams))
        out, joint = self._attend(*qkv, meta, k_meta, code, memory and memory.joint)
        y_out, x_out = out[:, : y.shape[1]], out[:, y.shape[1] :]

        x = x + x_modulation[2] * self._project(x_out, "x")
        if self.dual:
            own = jax.tree.map(lambda field: field[:, y.shape[1] :], (meta, k_meta, code))
            update, dual = self._dual_attention(x_norm, x_modulation[6:], *own, memory and memory.dual)
            x = x + update
        x = self._feed_forward(x, x_modulation[3:6], "x")
        if not self.context_pre_only:
            y = y + y_modulation[2] * self._project(y_out, "y")
            y = self._feed_forward(y, y_modulation[3:6], "y")
        carry = constrain(x, "batch", "length", None), constrain(y, "batch", None, None)
        return carry, Remembered(joint, dual) if self.remembers else None

    def _normalise(
        self, x: jax.Array, parts: int, condition: jax.Array, slots: jax.Array, stream: str
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The layer norm of a stream; and shift, scale and gate of its attention, MLP and second attention."""
        modulation = Modulation(self.config.width, parts, self._dtype, name=f"{stream}_modulation")(condition, slots)
        return LayerNorm(affine=False)(x), modulation

    def _qkv(self, x: jax.Array, stream: str) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = self.config
        q, k, v = (
            split_heads(Dense(c.width, ("embed", "heads"), True, self._dtype, name=f"{stream}_{name}")(x), c.heads)
            for name in "qkv"
        )
        if not c.qk_norm:
            return q, k, v
        q = RMSNorm(gain=c.query_gain, name=f"{stream}_q_norm")(q)
        return q, RMSNorm(name=f"{stream}_k_norm")(k), v

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        meta: TokenMeta,
        k_meta: TokenMeta,
        code: tuple | None,
        memory: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """What is attended to, and what to remember; `k_meta` is of the tokens, then of the memory."""
        if code is not None:
            q, k = rotary.rotate(q, *code), rotary.rotate(k, *code)
        own = k, v
        if memory is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(own, memory))
        return merge_heads(attention(q, k, v, meta, k_meta, self.rule, self.execution.attention)), own

    def _project(self, attended: jax.Array, stream: str) -> jax.Array:
        return Dense(self.config.width, ("heads", "embed"), True, self._dtype, name=f"{stream}_out")(attended)

    def _dual_attention(
        self, x_norm: jax.Array, modulation: list[jax.Array], *rest: Any
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """What is added to the latents, and what to remember; `rest` is for `_attend`."""
        shift, scale, gate = modulation
        out, own = self._attend(*self._qkv(_modulate(x_norm, shift, scale), "dual"), *rest)
        return gate * self._project(out, "dual"), own

    def _feed_forward(self, x: jax.Array, modulation: list[jax.Array], stream: str) -> jax.Array:
        width, (shift, scale, gate) = self.config.width, modulation
        y = _modulate(LayerNorm(affine=False)(x), shift, scale)
        y = Dense(4 * width, ("embed", "mlp"), True, self._dtype, name=f"{stream}_up")(y)
        y = constrain(jax.nn.gelu(y, approximate=True), "batch", None, "activation_mlp")
        return x + gate * Dense(width, ("mlp", "embed"), True, self._dtype, name=f"{stream}_down")(y)

    @property
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(self.execution.compute_dtype)


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
        return [_pick(part, slots) for part in jnp.split(table, self.parts, axis=-1)]


def _pick(table: jax.Array, slots: jax.Array) -> jax.Array:
    """The row of `table` `[B, T, D]` for the slot of each token, `[B, L, D]`.

    Not a gather, whose gradient would be a slow scatter. XLA on CPU keeps all terms of the gradient of a masked sum at
    once: of many slots, memory would be quadratic in the images of a document.
    """
    if table.shape[1] == 1:
        return table
    if table.shape[1] > MOST_SUMMED:
        return jnp.matmul(jax.nn.one_hot(slots, table.shape[1], dtype=table.dtype), table, precision="highest")
    whole = table.astype(jnp.float32)  # as is the sum that its gradient is
    return sum((slots == t)[..., None] * whole[:, t : t + 1] for t in range(table.shape[1])).astype(table.dtype)


class Embedder(nn.Module):
    """Linear, SiLU, linear."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.silu(Dense(self.width, ("embed", "mlp"), True, self.dtype, name="up")(x))
        return Dense(self.width, ("mlp", "embed"), True, self.dtype, name="down")(x)


def timestep_sinusoids(timesteps: jax.Array) -> jax.Array:
    """`[...]` in [0, 1] to `[..., 256]`, cosines first, of 1000 times the timestep; float32 throughout."""
    frequencies = np.exp(-np.log(10_000.0) * np.arange(SINUSOIDS // 2, dtype=np.float32) / (SINUSOIDS // 2))
    angles = 1000.0 * timesteps.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_axis(config: MMDiT) -> np.ndarray:
    """The additive code along one axis of the table, float32 `[G, D / 2]`, sines first.

    Like diffusers `get_2d_sincos_pos_embed`, positions are float32 and all else is float64 before the last rounding, so
    that the table of a file can be computed instead, bit by bit. Centred positions are those of SD3 (arXiv:2403.03206,
    section 5.3.2), which published files store: config.json, and diffusers where it begins at random, know the others.
    """
    positions = np.arange(config.position_grid, dtype=np.float32)
    if config.position_origin == "centre":
        positions = (positions - (config.position_grid - config.position_base) / 2) * (CENTRED / config.position_base)
    else:
        positions /= np.float32(config.position_grid / config.position_base)
    frequencies = 1.0 / 10_000.0 ** (np.arange(config.width // 4) / (config.width / 4))
    angles = positions[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def sincos_table(config: MMDiT) -> np.ndarray:
    """The whole table as published files store it, `[1, G * G, D]`: half of the channels follow the column."""
    axis, (row, col) = sincos_axis(config), np.indices((config.position_grid,) * 2).reshape(2, -1)
    return np.concatenate([axis[col], axis[row]], axis=-1)[None]


def sincos_positions(config: MMDiT, meta: TokenMeta) -> jax.Array:
    """What SD3's centre crop of the table gives each token, `[B, S, D]`; not a number outside of the table."""
    axis = jnp.asarray(sincos_axis(config))

    def look_up(position: jax.Array) -> jax.Array:
        index = position + config.position_grid // 2
        return axis.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    return jnp.concatenate([look_up(meta.col), look_up(meta.row)], axis=-1)


def _check(c: MMDiT) -> None:
    if c.width % c.heads or c.width % 4:
        raise UserError(f"config.model.dit.width {c.width} must be a multiple of 4 and of its {c.heads} heads.")
    if not 0 <= c.dual_layers < c.depth:
        raise UserError(f"config.model.dit.dual_layers {c.dual_layers} must be between 0 and depth - 1, {c.depth - 1}.")
    if c.position_grid % 2:
        # Where the crop of an odd table starts depends on the image, not only on the distance from its centre.
        raise UserError(f"config.model.dit.position_grid {c.position_grid} must be even, as the published tables are.")


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1 + scale) + shift
