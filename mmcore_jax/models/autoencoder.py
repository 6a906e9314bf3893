"""Autoencoders between images and the latents that the diffusion transformer works on.

Every one has `encode(images) -> latents` and `decode(latents) -> images`. "pixel" is the identity: small drawings are
diffused as they are.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmcore_jax.config import Autoencoder


class PixelAutoencoder(nn.Module):
    """Identity, but for the scale: uint8 images to latents in [-1, 1]."""

    config: Autoencoder
    channels = 3
    downsampling = 1

    def encode(self, images: jax.Array) -> jax.Array:
        """uint8 `[..., height, width, 3]` to float32 latents of the same shape."""
        return images.astype(jnp.float32) / 127.5 - 1.0

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents to float32 images in [0, 1], `[..., height, width, 3]`."""
        return jnp.clip(latents / 2 + 0.5, 0.0, 1.0)
