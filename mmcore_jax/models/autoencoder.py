"""Autoencoders between images and the latents that the diffusion transformer works on.

Every one has `encode(images) -> latents` and `decode(latents) -> images`. "pixel" is the identity: small drawings are
diffused as they are. "kl" is AutoencoderKL (diffusers `autoencoder_kl.py`; Rombach et al. 2022, arXiv:2112.10752), the
first stage of Stable Diffusion and FLUX.

B images, H rows and W columns, of pixels or of features, C channels; h and w are those of latents.
"""

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmcore_jax.config import AutoencoderKL, Execution, Pixels, UserError
from mmcore_jax.nn import masks
from mmcore_jax.nn.attention import attention
from mmcore_jax.nn.layers import Dense
from mmcore_jax.sharding import constrain, parameter

LOG_VARIANCE_RANGE = (-30.0, 20.0)
OVERLAP = 4  # neighbouring tiles share one part in this many of their side


def make_autoencoder(config: Pixels | AutoencoderKL, execution: Execution) -> nn.Module:
    """Returns the autoencoder that a config names."""
    if isinstance(config, Pixels):
        return PixelAutoencoder(config)
    return AutoencoderKLModel(config, execution)


class PixelAutoencoder(nn.Module):
    """Identity, but for the scale: uint8 images to latents in [-1, 1]."""

    config: Pixels

    def __call__(self, images: jax.Array) -> jax.Array:
        """Encodes and decodes."""
        return self.decode(self.encode(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """uint8 `[..., height, width, 3]` to float32 latents of the same shape."""
        return _to_signed(images)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents to float32 images in [0, 1], `[..., height, width, 3]`."""
        return _to_unit(latents)


class AutoencoderKLModel(nn.Module):
    """AutoencoderKL: images to the moments of Gaussian latents, and latents to images."""

    config: AutoencoderKL
    execution: Execution

    def setup(self) -> None:
        c, run = self.config, self.execution
        _check(c)
        self.encoder, self.decoder = Encoder(c, run), Decoder(c, run)
        if c.quant_convs:
            dtype = jnp.dtype(run.compute_dtype)
            self.quant_conv = Conv(2 * c.latent_channels, (None, None), dtype, size=1)
            self.post_quant_conv = Conv(c.latent_channels, (None, None), dtype, size=1)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Encodes and decodes, which makes all parameters under `init`."""
        return self.decode(self.encode(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """uint8 `[..., H, W, 3]` to float32 latents `[..., h, w, C]`: the mean, shifted and scaled.

        Of `[B, I, H, W, 3]` one image of each row after another: features of a megapixel are gigabytes.
        """
        if images.ndim == 5:
            in_turn = nn.scan(
                lambda model, carry, one: (carry, model.encode(one)),
                variable_broadcast="params",
                split_rngs={"params": False},
                in_axes=1,
                out_axes=1,
            )
            return in_turn(self, None, images)[1]
        return self._normalize(self.moments(_to_signed(images))[0])

    def sample(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """uint8 `[..., H, W, 3]` to float32 latents `[..., h, w, C]` drawn from the posterior, shifted and scaled."""
        mean, log_variance = self.moments(_to_signed(images))
        return self._normalize(mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents `[..., h, w, C]`, shifted and scaled, to float32 images in [0, 1], `[..., H, W, 3]`."""
        return _to_unit(self.reconstruct(latents / self.config.scaling_factor + self.config.shift_factor))

    def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and clipped log-variance, float32 `[..., h, w, C]`, of the latents of images in [-1, 1].

        Raises:
          UserError: if a side is not a multiple of `downsampling`.
        """
        height, width = images.shape[-3:-1]
        if height % self.config.downsampling or width % self.config.downsampling:
            raise UserError(
                f"images of {height} x {width} pixels need sides that are multiples of {self.config.downsampling}."
            )
        flat = images.reshape(-1, *images.shape[-3:])
        both = self._in_tiles(AutoencoderKLModel._encode, flat, self.config.downsampling, 1)
        mean, log_variance = jnp.split(both.reshape(*images.shape[:-3], *both.shape[1:]), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def reconstruct(self, latents: jax.Array) -> jax.Array:
        """Latents `[..., h, w, C]` as the encoder's moments have them, to float32 images about [-1, 1]."""
        flat = latents.reshape(-1, *latents.shape[-3:])
        images = self._in_tiles(AutoencoderKLModel._decode, flat, 1, self.config.downsampling)
        return images.reshape(*latents.shape[:-3], *images.shape[1:])

    def _encode(self, images: jax.Array) -> jax.Array:
        both = self.encoder(images)
        return (self.quant_conv(both) if self.config.quant_convs else both).astype(jnp.float32)

    def _decode(self, latents: jax.Array) -> jax.Array:
        x = self.post_quant_conv(latents) if self.config.quant_convs else latents
        return self.decoder(x).astype(jnp.float32)

    def _in_tiles(self, method: Callable, x: jax.Array, scale_in: int, scale_out: int) -> jax.Array:
        """Applies `method` to all of x `[B, H, W, C]`, or tile by tile where the config says so."""
        tile = self.config.tile
        if not tile or max(x.shape[1:3]) <= tile * scale_in:
            return method(self, x)

        def loop(tiles: jax.Array) -> jax.Array:
            scanned = nn.scan(
                lambda model, carry, one: (carry, method(model, one)),
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            return scanned(self, None, tiles)[1]

        return tiled(loop, x, tile, scale_in, scale_out)

    def _normalize(self, latents: jax.Array) -> jax.Array:
        return (latents - self.config.shift_factor) * self.config.scaling_factor


# --- Tiles ------------------------------------------------------------------------------------------------------------


def tiled(loop: Callable[[jax.Array], jax.Array], x: jax.Array, tile: int, scale_in: int, scale_out: int) -> jax.Array:
    """Maps overlapping tiles, and joins the results with linear blends (diffusers `tiled_encode`, `tiled_decode`).

    Args:
      loop: maps tiles of one shape, one after another: `[tiles, B, H, W, C] -> [tiles, B, H', W', C']`.
      x: `[B, H, W, C]`.
      tile: side of a tile, in latents.
      scale_in, scale_out: positions along a side of a latent, in x and in the result.

    Returns:
      `[B, H * scale_out / scale_in, W * scale_out / scale_in, C']`.
    """
    overlap = tile // OVERLAP
    stride, shared, kept = (tile - overlap) * scale_in, overlap * scale_out, (tile - overlap) * scale_out
    rows, columns = (range(0, size, stride) for size in x.shape[1:3])
    side = tile * scale_in
    tiles = _map_by_shape(loop, {(r, c): x[:, r : r + side, c : c + side] for r, c in itertools.product(rows, columns)})
    for r, c in tiles:  # in reading order: each tile blends with neighbours that are blended themselves
        if r:
            tiles[r, c] = _blend(tiles[r - stride, c], tiles[r, c], shared, axis=1)
        if c:
            tiles[r, c] = _blend(tiles[r, c - stride], tiles[r, c], shared, axis=2)
    joined = [jnp.concatenate([tiles[r, c][:, :kept, :kept] for c in columns], axis=2) for r in rows]
    return jnp.concatenate(joined, axis=1)


def _map_by_shape(loop: Callable[[jax.Array], jax.Array], tiles: dict[Any, jax.Array]) -> dict[Any, jax.Array]:
    """Maps tiles, those of one shape in one loop; those at the far edges are smaller. Keys keep their order."""
    keys_of: dict[tuple, list] = {}
    for key, tile in tiles.items():
        keys_of.setdefault(tile.shape, []).append(key)
    mapped = {}
    for keys in keys_of.values():
        mapped |= dict(zip(keys, loop(jnp.stack([tiles[key] for key in keys]))))
    return {key: mapped[key] for key in tiles}


def _blend(before: jax.Array, after: jax.Array, extent: int, axis: int) -> jax.Array:
    """Goes linearly from the end of `before` to `after` over the first `extent` positions of `after`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    ramp = jnp.arange(extent) / extent
    ramp = ramp.reshape(-1, *(1,) * (after.ndim - 1 - axis))
    last = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    first, rest = jnp.split(after, [extent], axis=axis)
    return jnp.concatenate([last * (1 - ramp) + first * ramp, rest], axis=axis)


# --- Encoder and decoder ----------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """`[B, H, W, 3]` to both moments `[B, h, w, 2 C]`."""

    config: AutoencoderKL
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        x = Conv(c.block_channels[0], (None, "embed"), dtype, name="conv_in")(x)
        for level, channels in enumerate(c.block_channels):
            last = level == len(c.block_channels) - 1
            x = DownBlock(c, self.execution, channels, not last, name=f"down_{level}")(x)
        x = MidBlock(c, self.execution, name="mid")(x)
        x = jax.nn.silu(GroupNorm(c.norm_groups, name="norm_out")(x))
        return Conv(2 * c.latent_channels, ("embed", None), dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents `[B, h, w, C]` to images `[B, H, W, 3]`; its blocks have one residual block more than the encoder's."""

    config: AutoencoderKL
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        x = Conv(c.block_channels[-1], (None, "embed"), dtype, name="conv_in")(x)
        x = MidBlock(c, self.execution, name="mid")(x)
        for level, channels in enumerate(reversed(c.block_channels)):
            last = level == len(c.block_channels) - 1
            x = UpBlock(c, self.execution, channels, not last, name=f"up_{level}")(x)
        x = jax.nn.silu(GroupNorm(c.norm_groups, name="norm_out")(x))
        return Conv(3, ("embed", None), dtype, name="conv_out")(x)


class DownBlock(nn.Module):
    """Residual blocks, then half the side where `downsample`."""

    config: AutoencoderKL
    execution: Execution
    channels: int
    downsample: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        for i in range(c.layers_per_block):
            x = ResnetBlock(self.channels, c.norm_groups, dtype, name=f"resnet_{i}")(x)
        if self.downsample:
            x = Conv(self.channels, ("embed", "mlp"), dtype, stride=2, padding=(0, 1), name="downsample")(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks, then twice the side where `upsample`: nearest neighbours, and a convolution."""

    config: AutoencoderKL
    execution: Execution
    channels: int
    upsample: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        for i in range(c.layers_per_block + 1):
            x = ResnetBlock(self.channels, c.norm_groups, dtype, name=f"resnet_{i}")(x)
        if self.upsample:
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = Conv(self.channels, ("embed", "mlp"), dtype, name="upsample")(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention over all positions, residual block."""

    config: AutoencoderKL
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.execution.compute_dtype)
        x = ResnetBlock(c.block_channels[-1], c.norm_groups, dtype, name="resnet_0")(x)
        if c.mid_attention:
            x = AttentionBlock(c.norm_groups, self.execution, name="attention")(x)
        return ResnetBlock(c.block_channels[-1], c.norm_groups, dtype, name="resnet_1")(x)


class AttentionBlock(nn.Module):
    """One head of full width over all positions, added to its input."""

    norm_groups: int
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        images, height, width, channels = x.shape
        dtype = jnp.dtype(self.execution.compute_dtype)
        y = GroupNorm(self.norm_groups, name="norm")(x).reshape(images, height * width, channels)
        q, k, v = (Dense(channels, ("embed", "heads"), True, dtype, name=name)(y)[:, :, None] for name in "qkv")
        meta = masks.plain_meta(jnp.ones(y.shape[:2], bool))
        y = attention(q, k, v, meta, meta, masks.same_document, self.execution.attention)[:, :, 0]
        y = Dense(channels, ("heads", "embed"), True, dtype, name="out")(y)
        return x + y.reshape(x.shape)


class ResnetBlock(nn.Module):
    """Norm, SiLU and convolution, twice, added to the input; a 1x1 convolution brings that to other channels."""

    channels: int
    norm_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.silu(GroupNorm(self.norm_groups, name="norm_1")(x))
        y = Conv(self.channels, ("embed", "mlp"), self.dtype, name="conv_1")(y)
        y = jax.nn.silu(GroupNorm(self.norm_groups, name="norm_2")(y))
        y = Conv(self.channels, ("mlp", "embed"), self.dtype, name="conv_2")(y)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, ("embed", "mlp"), self.dtype, size=1, name="shortcut")(x)
        return constrain(x + y, "batch", None, None, None)


class Conv(nn.Module):
    """A convolution `[B, H, W, in] -> [B, H', W', out]`; `names` are the logical axes of its channels.

    `padding` zeros stand before and after each side; by default they keep the size at a stride of 1.
    """

    features: int
    names: tuple[str | None, str | None]
    dtype: jnp.dtype
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = parameter(nn.initializers.lecun_normal(), None, None, *self.names)
        kernel = self.param("kernel", init, (self.size, self.size, x.shape[-1], self.features))
        bias = self.param("bias", parameter(nn.initializers.zeros, self.names[1]), (self.features,))
        padding = self.padding or (self.size // 2, self.size // 2)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            (padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group norm over positions and the channels of a group, `[B, H, W, C]`, with a learned scale and bias."""

    groups: int
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", parameter(nn.initializers.ones, None), (x.shape[-1],))
        bias = self.param("bias", parameter(nn.initializers.zeros, None), (x.shape[-1],))
        y = x.astype(jnp.float32).reshape(*x.shape[:3], self.groups, -1)
        y = y - jnp.mean(y, axis=(1, 2, 4), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=(1, 2, 4), keepdims=True) + self.eps)
        return (y.reshape(x.shape) * scale + bias).astype(x.dtype)


def _check(c: AutoencoderKL) -> None:
    where = "config.model.autoencoder"
    odd = next((channels for channels in c.block_channels if channels % c.norm_groups), None)
    if odd:
        raise UserError(f"{where}.norm_groups {c.norm_groups} must divide all of block_channels, and does not {odd}.")
    if c.tile % OVERLAP:
        raise UserError(f"{where}.tile {c.tile} must be a multiple of {OVERLAP}: neighbouring tiles share a quarter.")


def _to_signed(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 127.5 - 1.0


def _to_unit(images: jax.Array) -> jax.Array:
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0)
