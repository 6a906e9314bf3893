"""Solvers of the flow's differential equation, from noise (t = 1) to data (t = 0).

Each is `(velocity, noise, t) -> x` over the timesteps `t` `[steps + 1]`, which fall, mostly from 1 to 0; a token whose
velocity is 0 stays as it is, to the bit. `SOLVERS` has them by name.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.diffusion.flow import shift_timesteps

SD3_TIMESTEPS = 1000  # of the discrete schedule that "linspace" spans

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def timesteps(steps: int, shift: float, spacing: str) -> np.ndarray:
    """`[steps + 1]` timesteps from 1 to 0, float32, shifted towards noise.

    Args:
      steps: from one timestep to the next.
      shift: of `shift_timesteps`.
      spacing: "trailing", equal intervals from 1 to 0; or "linspace", equal intervals from 1 to the last timestep of
        SD3's schedule, then 0 (diffusers `FlowMatchEulerDiscreteScheduler`, which shifts that last timestep twice).
    """
    last = {"trailing": 1.0 / steps, "linspace": shift_timesteps(1.0 / SD3_TIMESTEPS, shift)}[spacing]
    return np.append(shift_timesteps(np.linspace(1.0, last, steps), shift), 0.0).astype(np.float32)


def euler(velocity: Velocity, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Euler steps, of first order: one evaluation of `velocity(x, t)` each."""

    def step(x: jax.Array, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        now, later = interval
        return x + (later - now) * velocity(x, now), None

    return jax.lax.scan(step, noise, (t[:-1], t[1:]))[0]


def heun(velocity: Velocity, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Heun's method, of second order: two evaluations a step, but one in the last, which is Euler's.

    As diffusers `FlowMatchHeunDiscreteScheduler`. The scan is over evaluations, so that the network is compiled once.
    """
    now, later = (jnp.repeat(end, 2)[:-1] for end in (t[:-1], t[1:]))
    corrects = jnp.arange(now.shape[0]) % 2 == 1

    def evaluate(carry: tuple, evaluation: tuple[jax.Array, ...]) -> tuple[tuple, None]:
        x, start, first = carry  # `start` and `first`: where the step began, and the velocity there
        now, later, corrects = evaluation
        found = velocity(x, jnp.where(corrects, later, now))
        start = jnp.where(corrects, start, x)
        mean = jnp.where(corrects, (first + found) / 2, found)
        return (start + (later - now) * mean, start, found), None

    return jax.lax.scan(evaluate, (noise, noise, jnp.zeros_like(noise)), (now, later, corrects))[0][0]


def dpm_solver_2m(velocity: Velocity, noise: jax.Array, t: jax.Array) -> jax.Array:
    """DPM-Solver++(2M) (arXiv:2211.01095), of second order: one evaluation a step.

    It extrapolates the predicted x_0 along lambda = log((1 - t) / t) from the step before: an Euler step and a
    correction. As in diffusers `DPMSolverMultistepScheduler`, the first step and one that ends at 0 are Euler's, and so
    is the second after a start at 1, where lambda is infinite.
    """
    t = jnp.asarray(t)
    now, later = t[:-1], t[1:]
    width = jnp.diff(jnp.log((1 - t) / t))
    relative = jnp.append(0.0, width[1:] / width[:-1])  # to the width of the step before; the first has none before
    weights = jnp.where(later > 0, (1 - later / now) * relative / 2, 0.0)

    def step(carry: tuple[jax.Array, jax.Array], interval: tuple[jax.Array, ...]) -> tuple[tuple, None]:
        x, before = carry
        now, later, weight = interval
        found = velocity(x, now)
        data = x - now * found
        return (x + (later - now) * found + weight * (data - before), data), None

    return jax.lax.scan(step, (noise, noise), (now, later, weights))[0][0]


SOLVERS = {"euler": euler, "heun": heun, "dpm_solver_2m": dpm_solver_2m}
