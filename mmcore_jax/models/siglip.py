"""SigLIP and SigLIP2 (transformers `modeling_siglip.py`, `modeling_siglip2.py`): vision tower with an attention pooling
head, and text tower.

SigLIP2 of fixed resolution is the same network. SigLIP2 NaFlex reads images of any grid of patches, padded to one
length, under positions resized to each grid. B rows, L text tokens, S patches, D width, P values in a patch, G patches
a side of the table of positions.
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
            self.text = SiglipTextTower(c.text, c.vision.width, c.layer_norm_eps, self.execution)
            scale, bias = (nn.initializers.constant(value) for value in (jnp.log(c.initial_scale), c.initial_bias))
            self.logit_scale = self.param("logit_scale", parameter(scale), ())
            self.logit_bias = self.param("logit_bias", parameter(bias), ())

    def patch_features(self, images: jax.Array) -> jax.Array:
        """uint8 images `[B, height, width, 3]` to the last hidden states of the patches `[B, S, D]`."""
        return self.features(images)[0]

    def features(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 images `[B, height, width, 3]` to hidden states of the patches `[B, S, D]` and pooled `[B, D]`."""
        return self.signed_features(images.astype(jnp.float32) / 127.5 - 1.0)

    def signed_features(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same of images in [-1, 1]; what is left of them beside whole patches is not read."""
        size = self.config.vision.patch_size
        height, width = (side // size * size for side in images.shape[1:3])
        return self.vision(patchify(images[:, :height, :width], size))

    def naflex_features(self, patches: jax.Array, grids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images of different grids to hidden states `[B, S, D]`, without meaning on padding, and pooled `[B, D]`.

        Args:
          patches: float `[B, S, P]` in [-1, 1], row by row in the order of `patchify`, then padding.
          grids: int32 `[B, 2]`, rows and columns of patches of each image, at most S together.
        """
        return self.vision(patches, grids)

    def __call__(self, images: jax.Array, tokens: jax.Array, valid: jax.Array) -> tuple[jax.Array, ...]:
        """Returns unit embeddings of images and of texts, `[B, D]` each, and the logits of all pairs `[B, B]`.

        Args:
          images: uint8 `[B, height, width, 3]`.
          tokens: `[B, L]`, right-padded; `valid` is bool `[B, L]`. Published checkpoints attend to padding and read
            the last position of `max_length`: for them all of it is valid.
        """
        image = _unit(self.features(images)[1])
        text = _unit(self.text(tokens, valid))
        return image, text, text @ image.T * jnp.exp(self.logit_scale) + self.logit_bias


class SiglipVisionTower(nn.Module):
    """Patches `[B, S, P]` to patch features `[B, S, D]` and pooled features `[B, D]`.

    `grids` `[B, 2]` are the rows and columns of each image; without, all images are of the size of the table.
    """

    config: SiglipVision
    eps: float
    execution: Execution

    @nn.compact
    def __call__(self, patches: jax.Array, grids: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        x = Dense(c.width, (None, "embed"), True, dtype, name="patch_embed")(patches)
        side = c.image_size // c.patch_size
        init = parameter(nn.initializers.normal(c.width**-0.5), None, "embed")
        positions, valid = self.param("positions", init, (side**2, c.width)), jnp.ones(x.shape[:2], bool)
        if grids is not None:
            positions = resize_positions(positions, grids, x.shape[1])
            valid = jnp.arange(x.shape[1]) < jnp.prod(grids, axis=1)[:, None]
        x = x + positions.astype(dtype)
        meta = masks.plain_meta(valid)
        x, _ = stack(Block, c.depth, self.execution, "blocks", config=c, eps=self.eps)(x, None, meta)
        x = LayerNorm(self.eps, name="norm")(x)
        return x, PoolingHead(c, self.eps, self.execution, name="head")(x, meta)


class SiglipTextTower(nn.Module):
    """Token ids `[B, L]` to pooled features `[B, D]`, D being the vision tower's: the last valid token, projected."""

    config: SiglipText
    projection: int
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
        x, _ = stack(Block, c.depth, self.execution, "blocks", config=c, eps=self.eps)(x, None, meta)
        x = LayerNorm(self.eps, name="norm")(x)
        last = jnp.sum(valid, axis=1) - 1
        return Dense(self.projection, ("embed", None), True, dtype, name="head")(x[jnp.arange(x.shape[0]), last])


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
    """Attention pooling with one learned probe: `[B, S, D] -> [B, D]`; `meta` marks the padding."""

    config: Tower
    eps: float
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array, meta: TokenMeta) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        probe = self.param("probe", parameter(nn.initializers.xavier_uniform(), None, "embed"), (1, c.width))
        probe = jnp.broadcast_to(probe.astype(dtype), (x.shape[0], 1, c.width))
        q = split_heads(Dense(c.width, ("embed", "heads"), True, dtype, name="q")(probe), c.heads)
        k, v = (split_heads(Dense(c.width, ("embed", "heads"), True, dtype, name=name)(x), c.heads) for name in "kv")
        y = attention(
            q, k, v, masks.plain_meta(jnp.ones(q.shape[:2], bool)), meta, masks.same_document, self.execution.attention
        )
        x = Dense(c.width, ("heads", "embed"), True, dtype, name="out")(merge_heads(y))
        x = x + Mlp(c, self.execution, name="mlp")(LayerNorm(self.eps, name="norm")(x))
        return x[:, 0]


def resize_positions(table: jax.Array, grids: jax.Array, length: int) -> jax.Array:
    """A table of positions resized to the grid of each image, float32 `[B, length, D]`; padding means nothing.

    Bilinear with antialiasing, like torch's `interpolate(antialias=True)`: a triangle as wide as the coarser of the two
    spacings. Grids may be traced: the weights of a token follow from its row and column.

    Args:
      table: `[G * G, D]`.
      grids: int32 `[B, 2]`, rows and columns.
      length: S, patches of the longest image and padding.
    """
    side, columns = round(table.shape[0] ** 0.5), grids[:, 1:]
    index = jnp.arange(length)
    rows, cols = (_triangle(p, n, side) for p, n in zip((index // columns, index % columns), (grids[:, :1], columns)))
    weights = rows[..., :, None] * cols[..., None, :]
    return jnp.matmul(weights.reshape(*weights.shape[:2], -1), table.astype(jnp.float32), precision="highest")


def _triangle(position: jax.Array, count: jax.Array, side: int) -> jax.Array:
    """Weights `[B, S, G]` over the cells of one axis, for positions `[B, S]` of `count` `[B, 1]`."""
    scale = side / count.astype(jnp.float32)
    distance = jnp.arange(side) + 0.5 - ((position + 0.5) * scale)[..., None]
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(distance) / jnp.maximum(scale, 1.0)[..., None])
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-6)  # none are within reach of padding


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
