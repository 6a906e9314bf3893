"""Solvers of the flow's differential equation, from noise (t = 1) to data (t = 0)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmcore_jax.diffusion.flow import shift_timesteps


def timesteps(steps: int, shift: float) -> jax.Array:
    """`[steps + 1]` timesteps from 1 to 0."""
    return shift_timesteps(jnp.linspace(1.0, 0.0, steps + 1, dtype=jnp.float32), shift)


def euler(
    velocity: Callable[[jax.Array, jax.Array], jax.Array], noise: jax.Array, steps: int, shift: float
) -> jax.Array:
    """Integrates `velocity(x, t)` from `noise` in Euler steps; t is a scalar."""
    t = timesteps(steps, shift)

    def step(x: jax.Array, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        now, later = interval
        return x + (later - now) * velocity(x, now), None

    return jax.lax.scan(step, noise, (t[:-1], t[1:]))[0]
