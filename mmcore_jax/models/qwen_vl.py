"""Qwen2.5-VL (transformers `modeling_qwen2_5_vl.py`): vision tower, merger and decoder, on packed rows.

`forward` takes the arrays of the published processor and gives the published logits. The network itself takes packed
rows: patches in merge order (the merge^2 patches of one merged token are neighbours), and windows and images as
metadata, so that no token is permuted.

B rows, L VLM tokens, S vision patches, M = S / merge^2 merged patches, D width, H heads, K key/value heads, C channels
per head, V vocabulary, P values in a patch.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.config import Execution, QwenVision, QwenVL, UserError
from mmcore_jax.nn import masks, rotary
from mmcore_jax.nn.attention import attention
from mmcore_jax.nn.layers import Dense, RMSNorm, gather_tokens, merge_heads, split_heads
from mmcore_jax.nn.masks import IMAGE, PAD, TEXT, TokenMeta
from mmcore_jax.nn.stack import stack
from mmcore_jax.nn.tokens import IMAGE_MEAN, IMAGE_STD, TEMPORAL_PATCH, merge_order, mrope_positions
from mmcore_jax.sharding import constrain, parameter

IMAGE_TOKEN = 151655  # <|image_pad|> of the published tokenizer
_INIT = nn.initializers.lecun_normal()
# Unit embeddings keep what a token is in the residual stream, up to the hidden states that condition the diffusion.
_EMBEDDING_INIT = nn.initializers.normal(1.0)
_TIED_INIT = nn.initializers.variance_scaling(1.0, "fan_out", "normal")


# --- Inputs -----------------------------------------------------------------------------------------------------------


class Prompts(NamedTuple):
    """A batch of text and images as the network takes it; `source` is the merged patch of an IMAGE token."""

    tokens: np.ndarray  # [B, L]
    meta: TokenMeta  # [B, L]
    positions: np.ndarray  # [B, L, 3]: time, row, column
    source: np.ndarray  # [B, L]
    patches: jax.Array  # [B, S, P]
    patch_meta: TokenMeta  # [B, S]


def prepare(
    config: QwenVL,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    pixel_values: jax.Array | None = None,
    image_grid_thw: np.ndarray | None = None,
    image_token: int = IMAGE_TOKEN,
) -> Prompts:
    """Turns the arrays of the published processor into rows; only `pixel_values` may be traced.

    Args:
      input_ids: `[B, L]`, each image a run of `image_token`, one for each merged patch.
      attention_mask: `[B, L]`, 0 where a row is padded, on either side.
      pixel_values: float `[S, P]`, normalised patches of all images of the batch in merge order, their values ordered
        (channel, time, row, column).
      image_grid_thw: `[n, 3]`, patches of each image along time, row and column, in the order of the images.

    Raises:
      UserError: if images and image tokens do not fit each other, for a video, or for ids outside the vocabulary.
    """
    ids, valid = np.asarray(input_ids, np.int32), np.asarray(attention_mask).astype(bool)
    if valid.any() and not 0 <= ids[valid].min() <= ids[valid].max() < config.vocab_size:
        raise UserError(
            f"input_ids reach {ids[valid].max()}, outside the vocabulary of {config.vocab_size}: "
            "use the tokenizer that belongs to the model."
        )
    is_image = valid & (ids == image_token)
    grids = _image_grids(config.vision, is_image.sum(axis=1), image_grid_thw)
    merged = [grid // config.vision.merge_size for grid in grids]
    positions = np.zeros((*ids.shape, 3), np.int32)
    for row, sizes in enumerate(merged):
        positions[row, valid[row]] = mrope_positions(is_image[row, valid[row]], sizes.tolist())
    zeros = np.zeros_like(ids)
    kind = np.where(is_image, IMAGE, np.where(valid, TEXT, PAD)).astype(np.int32)
    return Prompts(
        tokens=ids,
        meta=TokenMeta(zeros, zeros, kind, zeros, zeros, zeros + np.arange(ids.shape[1], dtype=np.int32)),
        positions=positions,
        source=np.where(is_image, np.cumsum(is_image, axis=1, dtype=np.int32) - 1, 0),
        patches=_patch_rows(config.vision, grids, pixel_values),
        patch_meta=_patch_meta(grids, config.vision.merge_size),
    )


def _image_grids(vision: QwenVision, tokens: np.ndarray, image_grid_thw: np.ndarray | None) -> list[np.ndarray]:
    """The images of each row, `[n, 2]` patches along row and column, from its count of image tokens."""
    grids = np.zeros((0, 3), np.int64) if image_grid_thw is None else np.asarray(image_grid_thw)
    if (grids[:, 0] != 1).any():
        raise UserError(f"image_grid_thw has {grids[:, 0].max()} time steps, a video: give images, with one time step.")
    if (grids[:, 1:] % vision.merge_size).any():
        raise UserError(f"image_grid_thw must count a multiple of {vision.merge_size} patches along rows and columns.")
    sizes = grids[:, 1:].prod(axis=1) // vision.merge_size**2
    rows = np.split(grids[:, 1:], np.searchsorted(np.cumsum(sizes), np.cumsum(tokens)[:-1], side="right"))
    fitting = [row.prod(axis=1).sum() // vision.merge_size**2 for row in rows]
    if fitting != tokens.tolist():
        raise UserError(
            f"input_ids hold {tokens.tolist()} image tokens a row, and image_grid_thw images of {sizes.tolist()}: "
            "give every image as many image tokens as it has merged patches, in the order of the rows."
        )
    return rows


def _patch_rows(vision: QwenVision, grids: list[np.ndarray], pixel_values: jax.Array | None) -> jax.Array:
    """`[B, S, P]` from the patches of all images, their values reordered to (time, row, column, channel)."""
    counts = [int(row.prod(axis=1).sum()) for row in grids]
    expected = (sum(counts), 3 * TEMPORAL_PATCH * vision.patch_size**2)
    if pixel_values is None:
        pixel_values = np.zeros((0, expected[1]), np.float32)
    if pixel_values.shape != expected:
        raise UserError(f"pixel_values has shape {pixel_values.shape}, but image_grid_thw describes {expected}.")
    patches = pixel_values.reshape(-1, 3, TEMPORAL_PATCH, vision.patch_size, vision.patch_size)
    patches = patches.transpose(0, 2, 3, 4, 1).reshape(expected)
    index = np.minimum(np.arange(max(counts)), np.array(counts)[:, None] - 1)
    first = np.cumsum(counts) - counts
    return patches[np.maximum(first[:, None] + index, 0)]


def _patch_meta(grids: list[np.ndarray], merge: int) -> TokenMeta:
    length = max(int(row.prod(axis=1).sum()) for row in grids)
    fields = np.zeros((4, len(grids), length), np.int32)  # frame, kind, row, column
    for row, images in enumerate(grids):
        start = 0
        for frame, (rows, cols) in enumerate(images):
            span = slice(start, start + rows * cols)
            fields[:2, row, span] = [[frame], [IMAGE]]
            fields[2:, row, span] = merge_order(rows, cols, merge)
            start = span.stop
    zeros = np.zeros_like(fields[0])
    return TokenMeta(zeros, *fields, zeros + np.arange(length, dtype=np.int32))


def normalize(patches: jax.Array) -> jax.Array:
    """Patches as the vision tower takes them: uint8 `[..., P / 2]`, (row, column, channel), to float32 `[..., P]`."""
    pixels = patches.astype(jnp.float32).reshape(*patches.shape[:-1], patches.shape[-1] // 3, 3) / 255.0
    pixels = ((pixels - IMAGE_MEAN) / IMAGE_STD).reshape(patches.shape)
    return jnp.concatenate([pixels] * TEMPORAL_PATCH, -1)


def forward(
    model: "QwenVLModel",
    params: Any,
    *,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    pixel_values: jax.Array | None = None,
    image_grid_thw: np.ndarray | None = None,
    image_token: int = IMAGE_TOKEN,
) -> jax.Array:
    """Returns float32 logits `[B, L, V]`, as the published network does; `prepare` describes the arguments.

    Logits at padding carry no meaning.
    """
    arrays = (input_ids, attention_mask, pixel_values, image_grid_thw)
    return _forward(model, params, prepare(model.config, *arrays, image_token))


@functools.partial(jax.jit, static_argnames="model")
def _forward(model: "QwenVLModel", params: Any, prompts: Prompts) -> jax.Array:
    return model.apply({"params": params}, prompts)


# --- Cache ------------------------------------------------------------------------------------------------------------


class Cache(NamedTuple):
    """What the decoder remembers, in S slots of which `filled` are taken; `meta` says what each holds or will hold."""

    keys: jax.Array  # [layers, B, S, K, C]
    values: jax.Array  # [layers, B, S, K, C]
    meta: TokenMeta  # [B, S]
    filled: jax.Array  # scalar

    def coming(self, count: int) -> TokenMeta:
        """Metadata `[B, count]` of the next slots to fill."""
        return jax.tree.map(lambda field: jax.lax.dynamic_slice_in_dim(field, self.filled, count, axis=1), self.meta)

    def store(self, layer: jax.Array, keys: jax.Array, values: jax.Array) -> "Cache":
        """Writes `[B, L, K, C]` of one layer into the next L slots."""

        def write(slots: jax.Array, new: jax.Array) -> jax.Array:
            slots = jax.lax.dynamic_update_slice(slots, new[None].astype(slots.dtype), (layer, 0, self.filled, 0, 0))
            return constrain(slots, "layers", "batch", None, "activation_heads", None)

        return self._replace(keys=write(self.keys, keys), values=write(self.values, values))


def empty_cache(config: QwenVL, execution: Execution, meta: TokenMeta, new_tokens: int) -> Cache:
    """Room for prompts of metadata `meta` `[B, L]` and `new_tokens` more, in the compute dtype."""
    rows, length = meta.kind.shape
    shape = (config.depth, rows, length + new_tokens, config.kv_heads, config.width // config.heads)
    zeros = jnp.zeros(shape, execution.compute_dtype)
    zeros = constrain(zeros, "layers", "batch", None, "activation_heads", None)
    text = masks.plain_meta(jnp.ones((rows, new_tokens), bool))
    return Cache(zeros, zeros, masks.concatenate(meta, text), jnp.zeros((), jnp.int32))


# --- Network ----------------------------------------------------------------------------------------------------------


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

    def __call__(self, prompts: Prompts) -> jax.Array:
        """Returns float32 logits `[B, L, V]`."""
        return self.logits(self.decode(self.embed_prompts(prompts), prompts.meta, prompts.positions))

    def embed_prompts(self, prompts: Prompts) -> jax.Array:
        """Returns input embeddings `[B, L, D]`."""
        return self.embed(prompts.tokens, prompts.meta, prompts.source, prompts.patches, prompts.patch_meta)

    def embed_text(self, tokens: jax.Array) -> jax.Array:
        """Returns input embeddings `[B, L, D]` of token ids `[B, L]`.

        Each device looks up its channels for all rows of its group: the table and its gradient are never whole.
        """
        x = self.embedding[constrain(tokens, "group_batch", None)].astype(self.execution.compute_dtype)
        return constrain(constrain(x, "group_batch", None, "embed"), "batch", "length", None)

    def embed(
        self,
        tokens: jax.Array,
        meta: TokenMeta,
        source: jax.Array,
        patches: jax.Array,
        patch_meta: TokenMeta,
        queries: jax.Array | None = None,
    ) -> jax.Array:
        """Returns input embeddings `[B, L, D]`.

        Args:
          tokens: `[B, L]` ids, read where `meta.kind` is TEXT.
          source: `[B, L]`, the merged patch of an IMAGE position, the query of a QUERY position.
          patches: float32 `[B, S, P]`, normalised, the values of a patch ordered (time, row, column, channel).
          patch_meta: document, frame and position of each patch.
          queries: `[N, D]`, where there are QUERY tokens.
        """
        x = self.embed_text(tokens)
        if patches.shape[1]:
            images = gather_tokens(self.vision(patches, patch_meta), source)
            x = jnp.where((meta.kind == masks.IMAGE)[..., None], images, x)
        if queries is None:
            return x
        asked = queries[jnp.maximum(source, 0) % queries.shape[0]].astype(x.dtype)  # gradients add up in float32
        return jnp.where((meta.kind == masks.QUERY)[..., None], asked, x)

    def decode(self, x: jax.Array, meta: TokenMeta, positions: jax.Array) -> jax.Array:
        """Returns the final, normed hidden states `[B, L, D]`; positions `[B, L, 3]` are (time, row, column)."""
        return self.decoder(x, meta, positions, None)[0]

    def extend(self, x: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`decode` for the tokens of the next L slots, after those in the cache; x `[B, L, D]`."""
        hidden, cache = self.decoder(x, cache.coming(x.shape[1]), positions, cache)
        return hidden, cache._replace(filled=cache.filled + x.shape[1])

    def logits(self, hidden_states: jax.Array) -> jax.Array:
        """Returns float32 logits `[..., V]`."""
        kernel = self.embedding.T if self.config.tie_embeddings else self.head
        return jnp.matmul(hidden_states, kernel.astype(hidden_states.dtype), preferred_element_type=jnp.float32)


class Decoder(nn.Module):
    """The causal decoder."""

    config: QwenVL
    execution: Execution

    @nn.compact
    def __call__(
        self, x: jax.Array, meta: TokenMeta, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        code = rotary.mrope(positions, c.mrope_section, c.rope_theta)
        x = constrain(x, "batch", "length", None)
        blocks = stack(DecoderBlock, c.depth, self.execution, "blocks", config=c)
        (x, cache), _ = blocks((x, cache), jnp.arange(c.depth), meta, code)
        return RMSNorm(c.rms_norm_eps, name="norm")(x), cache


class DecoderBlock(nn.Module):
    """Grouped-query attention with biases on q, k, v, then SwiGLU; RMSNorm before each.

    The carry is (hidden states, cache); with a cache the tokens see what it holds and are added to it.
    """

    config: QwenVL
    execution: Execution

    @nn.compact
    def __call__(self, carry: tuple, layer: jax.Array, meta: TokenMeta, code: tuple) -> tuple[tuple, None]:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        x, cache = carry
        head_width = c.width // c.heads

        def dense(features: int, names: tuple, bias: bool, name: str) -> Dense:
            lora = c.lora if c.lora and name in c.lora.targets else None
            return Dense(features, names, bias, dtype, _INIT, lora, name=name)

        y = RMSNorm(c.rms_norm_eps, name="attention_norm")(x)
        q = split_heads(dense(c.width, ("embed", "heads"), True, "q")(y), c.heads)
        k = split_heads(dense(c.kv_heads * head_width, ("embed", "kv_heads"), True, "k")(y), c.kv_heads)
        v = split_heads(dense(c.kv_heads * head_width, ("embed", "kv_heads"), True, "v")(y), c.kv_heads)
        q, k = rotary.rotate(q, *code), rotary.rotate(k, *code)
        k_meta = meta
        if cache is not None:
            cache = cache.store(layer, k, v)
            k, v, k_meta = cache.keys[layer], cache.values[layer], cache.meta
        y = attention(q, k, v, meta, k_meta, masks.causal, self.execution.attention)
        x = x + dense(c.width, ("heads", "embed"), False, "out")(merge_heads(y))

        y = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        y = jax.nn.silu(dense(c.mlp_width, ("embed", "mlp"), False, "gate")(y)) * dense(
            c.mlp_width, ("embed", "mlp"), False, "up"
        )(y)
        y = constrain(y, "batch", "length", "activation_mlp")
        x = x + dense(c.width, ("mlp", "embed"), False, "down")(y)
        return (constrain(x, "batch", "length", None), cache), None


class VisionTower(nn.Module):
    """Normalised patches to merged tokens of the decoder's width: `[B, S, P] -> [B, M, D]`."""

    config: QwenVision
    out_width: int
    execution: Execution

    @nn.compact
    def __call__(self, patches: jax.Array, meta: TokenMeta) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        x = Dense(c.width, (None, "embed"), False, dtype, name="patch_embed")(patches)
        code = rotary.grid(meta.row, meta.col, c.width // c.heads)
        x = constrain(x, "batch", None, None)
        full = jnp.array([i in c.full_attention_blocks for i in range(c.depth)])
        x, _ = stack(VisionBlock, c.depth, self.execution, "blocks", config=c)(x, full, meta, code)
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

        seen = masks.windows(meta, c.window_size // c.patch_size, full)
        y = RMSNorm(name="attention_norm")(x)
        q, k, v = (split_heads(dense(c.width, ("embed", "heads"), name)(y), c.heads) for name in "qkv")
        q, k = rotary.rotate(q, *code), rotary.rotate(k, *code)
        y = attention(q, k, v, seen, seen, masks.same_place, self.execution.attention)
        x = x + dense(c.width, ("heads", "embed"), "out")(merge_heads(y))

        y = RMSNorm(name="mlp_norm")(x)
        y = jax.nn.silu(dense(c.mlp_width, ("embed", "mlp"), "gate")(y)) * dense(c.mlp_width, ("embed", "mlp"), "up")(y)
        y = constrain(y, "batch", None, "activation_mlp")
        x = x + dense(c.width, ("mlp", "embed"), "down")(y)
        return constrain(x, "batch", None, None), None


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
        x = Dense(self.out_width, ("mlp", "embed"), True, dtype, _INIT, name="down")(x)
        return constrain(x, "batch", None, None)
