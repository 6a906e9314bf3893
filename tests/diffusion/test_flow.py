"""Flow matching and its solver against what can be worked out by hand."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmcore_jax import config
from mmcore_jax.diffusion import flow, solver

X0, NOISE = jax.random.normal(jax.random.key(0), (2, 5, 3))
RAMP = config.Ramp(0.0, 0.0, 1)


def test_path():
    t = jnp.array([0.0, 0.25, 0.5, 0.75, 1.0])[:, None]
    path = flow.interpolate(X0, NOISE, t)
    chex.assert_trees_all_close(path[0], X0[0])
    chex.assert_trees_all_close(path[-1], NOISE[-1])
    derivative = (flow.interpolate(X0, NOISE, t + 0.5) - path) / 0.5
    chex.assert_trees_all_close(derivative, flow.velocity_target(X0, NOISE), atol=1e-5)


@pytest.mark.parametrize("t", [flow.MINIMUM_TIMESTEP, 0.3, 1.0])
def test_a_prediction_of_x0_is_the_velocity(t):
    x_t = flow.interpolate(X0, NOISE, t)
    velocity = flow.to_velocity(X0, x_t, jnp.float32(t), "x0")
    chex.assert_trees_all_close(velocity, flow.velocity_target(X0, NOISE), atol=2e-5)
    chex.assert_trees_all_equal(flow.to_velocity(X0, x_t, jnp.float32(t), "velocity"), X0)


def test_x0_at_timestep_zero_is_finite():
    chex.assert_tree_all_finite(flow.to_velocity(X0, NOISE, jnp.float32(0.0), "x0"))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift(shift):
    t = jnp.linspace(0.0, 1.0, 11)
    shifted = flow.shift_timesteps(t, shift)
    assert shifted[0] == 0.0
    assert shifted[-1] == 1.0
    assert (jnp.diff(shifted) > 0).all()
    chex.assert_trees_all_close(shifted[5], jnp.float32(shift / (1 + shift)), rtol=1e-6)
    # Shifts compose: the odds t / (1 - t) are multiplied.
    chex.assert_trees_all_close(flow.shift_timesteps(shifted, 1 / shift), t, atol=1e-6)
    if shift == 1.0:
        chex.assert_trees_all_equal(shifted, t)


def test_logit_normal_timesteps():
    dropout = config.Dropout(RAMP, RAMP, 0.0)
    settings = config.FlowMatching(
        weight=1.0, timestep_floor=0.0, logit_mean=0.7, logit_std=0.5, shift=3.0, dropout=dropout
    )
    normal, tokens = jax.random.normal(jax.random.key(0), (20_000,)), jnp.full((20_000,), 16)
    t = flow.logit_normal_timesteps(normal, settings, tokens)
    logits = np.log(t / (1 - t))
    assert abs(logits.mean() - (0.7 + np.log(3.0))) < 0.02
    assert abs(logits.std() - 0.5) < 0.02
    assert t.dtype == jnp.float32
    # A quarter of the tokens have half of the shift.
    smaller = flow.logit_normal_timesteps(normal, dataclasses.replace(settings, shift_tokens=64), tokens)
    np.testing.assert_allclose(logits - np.log(smaller / (1 - smaller)), np.log(2.0), atol=1e-3)
    assert flow.shift_of(3.0, 4096, 4096) == flow.shift_of(3.0, 0, 77) == 3.0
    assert flow.shift_of(3.0, 4096, 1024) == 1.5


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_euler_is_exact_on_straight_paths(steps, shift, spacing):
    t = solver.timesteps(steps, shift, spacing)
    out = solver.euler(lambda x, t: flow.velocity_target(X0, NOISE), NOISE, t)
    chex.assert_trees_all_close(out, X0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 5])
def test_euler_with_a_network_that_knows_x0(steps):
    """x_0 as a prediction, read as a velocity at each step, arrives at x_0 as long as t stays above the minimum."""
    out = solver.euler(lambda x, t: flow.to_velocity(X0, x, t, "x0"), NOISE, solver.timesteps(steps, 1.0, "trailing"))
    chex.assert_trees_all_close(out, X0, atol=1e-5)


def test_euler_converges_at_first_order():
    """dx/dt = x from t = 1 to 0 divides by e; the error halves with twice the steps."""

    def error(steps):
        t = solver.timesteps(steps, 1.0, "trailing")
        return abs(float(solver.euler(lambda x, t: x, jnp.float32(1.0), t)) - np.exp(-1))

    errors = [error(steps) for steps in (50, 100)]
    assert errors[1] < 0.002
    assert 1.9 < errors[0] / errors[1] < 2.1


def test_timesteps_run_from_noise_to_data():
    t = solver.timesteps(4, 1.0, "trailing")
    chex.assert_trees_all_close(t, np.array([1.0, 0.75, 0.5, 0.25, 0.0], np.float32), atol=1e-7)
    assert (solver.timesteps(4, 3.0, "trailing")[1:-1] > t[1:-1]).all()
