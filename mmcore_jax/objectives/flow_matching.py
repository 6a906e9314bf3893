"""Flow matching of the generated images of interleaved documents, with teacher forcing (MMCORE section 3.2)."""

import jax
import jax.numpy as jnp

from mmcore_jax import config as config_lib
from mmcore_jax.bridge.conditioning import Drop, draw_dropout
from mmcore_jax.data.layout import Interleaved
from mmcore_jax.diffusion import flow
from mmcore_jax.mmcore import Forward
from mmcore_jax.nn import masks
from mmcore_jax.nn.layers import gather_tokens


def count(batch: Interleaved) -> jax.Array:
    """Number of noised tokens."""
    return jnp.maximum(jnp.sum(batch.diffusion.latent_meta.kind == masks.NOISED), 1).astype(jnp.float32)


def tokens(batch: Interleaved) -> jax.Array:
    """Number of noised tokens of each frame, `[B, I]`, at least 1."""
    meta, frames = batch.diffusion.latent_meta, jnp.arange(batch.images.generated.shape[1])[:, None]
    own = (meta.frame[:, None] == frames) & (meta.kind == masks.NOISED)[:, None]
    return jnp.maximum(jnp.sum(own, axis=-1), 1)


def loss(
    forward: Forward, settings: config_lib.FlowMatching, keys: jax.Array, step: jax.Array, count: jax.Array
) -> tuple[jax.Array, dict]:
    """Mean squared error of the velocity over noised tokens, one timestep for each generated frame."""
    shape = forward.batch.images.generated.shape[1:]
    timestep_keys, noise_keys, dropout_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
    normal = jax.vmap(lambda key: jax.random.normal(key, shape))(timestep_keys)
    t = flow.logit_normal_timesteps(normal, settings, tokens(forward.batch))
    drop = draw_dropout(settings.dropout, dropout_keys, *shape, step)
    errors = squared_errors(forward, t, noise_keys, drop)
    if settings.timestep_floor:
        t_tokens = gather_tokens(t, forward.batch.diffusion.latent_meta.frame)
        errors = errors * jnp.square(jnp.minimum(t_tokens / settings.timestep_floor, 1.0))
    return jnp.sum(errors) / count, {}


def squared_errors(forward: Forward, t: jax.Array, noise_keys: jax.Array, drop: Drop) -> jax.Array:
    """Squared error of the velocity, `[B, T]`: mean over the values of a token, 0 where it is not a noised one.

    Args:
      t: `[B, I]`, timestep of each frame.
      noise_keys: `[B]`, one key a row.
      drop: what each frame loses.
    """
    batch, model = forward.batch, forward.model
    clean = forward.latents
    noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:]))(noise_keys)
    noised = flow.interpolate(clean, noise, t[..., None, None])
    target = model.latent_tokens(clean, flow.velocity_target(clean, noise), batch)

    given = forward.text_embeddings, forward.visual_embeddings, batch, drop, forward.image_embeddings
    condition = model.condition(*given)
    velocity = model.velocity(model.latent_tokens(clean, noised, batch), condition, t, batch)
    is_noised = batch.diffusion.latent_meta.kind == masks.NOISED
    return is_noised * jnp.mean(jnp.square(velocity - target), axis=-1)
