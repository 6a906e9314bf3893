"""Flow matching on straight paths: x_t = (1 - t) x_0 + t eps, velocity eps - x_0; t = 0 is data. All in float32."""

import jax
import jax.numpy as jnp

from mmcore_jax.config import FlowMatching

# A prediction of x_0 becomes a velocity by dividing by t, which is kept away from 0.
MINIMUM_TIMESTEP = 0.05


def interpolate(x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """The point on the path at t, which broadcasts against x0."""
    return (1.0 - t) * x0 + t * noise


def velocity_target(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """The velocity of the path."""
    return noise - x0


def to_velocity(prediction: jax.Array, x_t: jax.Array, t: jax.Array, kind: str) -> jax.Array:
    """What a network predicts ("velocity" or "x0") as a velocity."""
    if kind == "velocity":
        return prediction
    return (x_t - prediction) / jnp.maximum(t, MINIMUM_TIMESTEP)


def shift_of(shift: float, reference: int, tokens: jax.Array | int) -> jax.Array | float:
    """The shift of images of so many latent tokens, where it is `shift` for `reference` tokens; 0 of them: for all."""
    return shift * (tokens / reference) ** 0.5 if reference else shift


def shift_timesteps(t: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Moves timesteps towards noise: shift t / (1 + (shift - 1) t), SD3 section 5.3.2."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def logit_normal_timesteps(normal: jax.Array, config: FlowMatching, tokens: jax.Array) -> jax.Array:
    """Turns standard normal draws into timesteps, SD3 section 3.1, shifted; `tokens`: latent ones of each image."""
    t = jax.nn.sigmoid(config.logit_mean + config.logit_std * normal)
    return shift_timesteps(t, shift_of(config.shift, config.shift_tokens, tokens))
