"""Layers that several networks share. Norm statistics are float32, matrix products run in the compute dtype.

What is the same for all tokens is added to them in float32, so that its gradient, their sum, is one of float32, too.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmcore_jax.config import Lora
from mmcore_jax.sharding import parameter

_LORA_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as PEFT has it


class Dense(nn.Module):
    """A linear layer on the last axis, `[..., in] -> [..., out]`, whose kernel carries logical axis names.

    With `lora`, a low-rank product comes on top, which starts at zero.
    """

    features: int
    names: tuple[str | None, str | None]
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, x = (x.shape[-1], self.features), x.astype(self.dtype)
        y = _matmul(x, self.param("kernel", parameter(self.kernel_init, *self.names), shape))
        if self.use_bias:
            bias = self.param("bias", parameter(nn.initializers.zeros, self.names[1]), (self.features,))
            y = (y + bias.astype(jnp.float32)).astype(self.dtype)
        if self.lora:
            a = self.param("lora_a", parameter(_LORA_INIT, "lora", None), (shape[0], self.lora.rank))
            b = self.param("lora_b", parameter(nn.initializers.zeros, None, "lora"), (self.lora.rank, shape[1]))
            y = y + _matmul(_matmul(x, a), b) * (self.lora.alpha / self.lora.rank)
        return y


def is_lora(path: str) -> bool:
    """Whether a parameter is one of the two matrices of LoRA."""
    return path.endswith(("/lora_a", "/lora_b"))


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[..., in]` times `[in, out]`, in the dtype of x.

    Two-dimensional wherever the length is not sharded: XLA on CPU differentiates it twice as fast.
    """
    kernel, mesh = kernel.astype(x.dtype), jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["context"] == 1:
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])
    return x @ kernel


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale, initially `gain`."""

    eps: float = 1e-6
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", parameter(nn.initializers.constant(self.gain), None), (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis; `affine` adds a learned scale and bias."""

    eps: float = 1e-6
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.affine:
            scale = self.param("scale", parameter(nn.initializers.ones, None), (x.shape[-1],))
            bias = self.param("bias", parameter(nn.initializers.zeros, None), (x.shape[-1],))
            y = y * scale + bias
        return y.astype(x.dtype)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """`[B, L, H * C] -> [B, L, H, C]`."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """`[B, L, H, C] -> [B, L, H * C]`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def gather_tokens(x: jax.Array, index: jax.Array) -> jax.Array:
    """Picks tokens within each row: x `[B, S, ...]`, index `[B, ...]` -> `[B, ..., ...]`; -1 picks token 0."""
    rows = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (index.ndim - 1))
    return x[rows, jnp.maximum(index, 0)]
