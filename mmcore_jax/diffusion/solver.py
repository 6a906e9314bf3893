"""Solvers of the flow's differential equation, from noise (t = 1) to data (t = 0)."""

from collections.abc import Callable

import jax
import numpy as np

from mmcore_jax.diffusion.flow import shift_timesteps

SD3_TIMESTEPS = 1000  # of the discrete schedule that "linspace" spans


def timesteps(steps: int, shift: float, spacing: str) -> np.ndarray:
    """`[steps + 1]` timesteps from 1 to 0, float32, shifted towards noise.

    Args:
      steps: how often the network is evaluated.
      shift: of `shift_timesteps`.
      spacing: "trailing", equal intervals from 1 to 0; or "linspace", equal intervals from 1 to the last timestep of
        SD3's schedule, then 0 (diffusers `FlowMatchEulerDiscreteScheduler`, which shifts that last timestep twice).
    """
    last = {"trailing": 1.0 / steps, "linspace": shift_timesteps(1.0 / SD3_TIMESTEPS, shift)}[spacing]
    return np.append(shift_timesteps(np.linspace(1.0, last, steps), shift), 0.0).astype(np.float32)


def euler(velocity: Callable[[jax.Array, jax.Array], jax.Array], noise: jax.Array, t: jax.Array) -> jax.Array:
    """Integrates `velocity(x, t)` from `noise` in Euler steps between the timesteps `t`, from 1 to 0."""

    def step(x: jax.Array, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        now, later = interval
        return x + (later - now) * velocity(x, now), None

    return jax.lax.scan(step, noise, (t[:-1], t[1:]))[0]
