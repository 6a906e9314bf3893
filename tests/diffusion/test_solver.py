"""Solvers against an equation with a known solution, and against diffusers on the same velocities."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from mmcore_jax.diffusion import solver
from mmcore_jax.diffusion.solver import SOLVERS

NOISE = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
ORDER = {"euler": 1, "heun": 2, "dpm_solver_2m": 2}
EVALUATIONS = {"euler": 12, "heun": 2 * 12 - 1, "dpm_solver_2m": 12}
MEAN, DEVIATION = 0.7, 0.4


def deviation(t):
    return (((1 - t) * DEVIATION) ** 2 + t**2) ** 0.5


def velocity(x, t):
    """The flow from noise to data that is normal: a point keeps its distance from the mean in standard deviations."""
    return (t - (1 - t) * DEVIATION**2) / deviation(t) ** 2 * (x - (1 - t) * MEAN) - MEAN


def curved(x, t):
    """A velocity without a closed solution, of numpy's, jax.numpy's and torch's arithmetic alike."""
    return x * (1 - t) - 0.3 * x**3 / (1 + x**2) + 2 * t**2 - 0.5


def measured_order(name, grid):
    """How often twice the steps halve the error on the timesteps `grid(steps)`, and the last error."""
    errors = []
    with jax.enable_x64(True):
        for steps in (100, 200, 400):
            t, z = grid(steps), NOISE.astype(np.float64)
            ends = [(1 - end) * MEAN + deviation(end) * z for end in (t[0], t[-1])]
            errors.append(np.abs(SOLVERS[name](velocity, ends[0], t) - ends[1]).max())
    return np.log2(np.divide(errors[:-1], errors[1:])), errors[-1]


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name):
    """Between 0.98 and 0.02, equally spaced in lambda, as the theory of 2M has it."""
    order, error = measured_order(name, lambda steps: 1 / (1 + np.exp(np.linspace(-4, 4, steps + 1))))
    np.testing.assert_allclose(order, ORDER[name], atol=0.1)
    assert error < {1: 0.02, 2: 1e-4}[ORDER[name]]


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence_all_the_way(name):
    """From 1 to 0, equally spaced: lambda never gets fine at its ends, which costs 2M a logarithm of the steps."""
    order, error = measured_order(name, lambda steps: np.linspace(1.0, 0.0, steps + 1))
    least = 1.65 if name == "dpm_solver_2m" else ORDER[name] - 0.1
    assert (order > least).all()
    assert (order < ORDER[name] + 0.1).all()
    assert error < {1: 0.01, 2: 2e-4}[ORDER[name]]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_finite_and_compile(name, steps):
    t = solver.timesteps(steps, 3.0, "trailing")
    found = jax.jit(lambda noise, t: SOLVERS[name](curved, noise, t))(NOISE, t)
    np.testing.assert_allclose(found, SOLVERS[name](curved, NOISE, t), atol=1e-6)
    assert np.isfinite(found).all()
    if steps == 1:
        np.testing.assert_allclose(found, NOISE - curved(NOISE, 1.0), atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_how_often_the_network_runs(name):
    seen = []

    def counted(x, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return curved(x, t)

    t = solver.timesteps(12, 1.0, "trailing")
    jax.block_until_ready(SOLVERS[name](counted, NOISE, t))
    jax.effects_barrier()
    assert len(seen) == EVALUATIONS[name]
    assert sorted(set(seen), reverse=True) == [float(time) for time in t[:-1]]


@pytest.mark.parametrize("name", SOLVERS)
def test_what_has_no_velocity_stays_to_the_bit(name):
    moves = np.arange(5) % 2 == 0
    t = solver.timesteps(9, 3.0, "trailing")
    found = np.asarray(jax.jit(lambda x: SOLVERS[name](lambda x, t: moves * curved(x, t), x, t))(NOISE))
    assert (found[:, ~moves] == NOISE[:, ~moves]).all()
    assert (found[:, moves] != NOISE[:, moves]).all()


# --- Against diffusers ------------------------------------------------------------------------------------------------


def theirs(scheduler):
    x = torch.from_numpy(NOISE)
    for timestep in scheduler.timesteps:
        x = scheduler.step(curved(x, timestep / 1000), timestep, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize("steps", [1, 2, 7, 28])
def test_heun_is_that_of_diffusers(steps):
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    t = solver.timesteps(steps, 3.0, "linspace")
    np.testing.assert_allclose(np.repeat(t, 2)[1:-2], scheduler.timesteps.numpy() / 1000, atol=1e-6)
    np.testing.assert_allclose(solver.heun(curved, NOISE, t), theirs(scheduler), rtol=0, atol=1e-5)


def multistep(steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    )
    scheduler.set_timesteps(steps)
    # They truncate the timesteps that the network sees to integers; `step` reads the sigmas only.
    scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    return scheduler


@pytest.mark.parametrize("steps", [1, 2, 7, 28])
def test_dpm_solver_is_that_of_diffusers(steps):
    """On their timesteps, which begin at 0.9997: every step but the first and the last is of second order."""
    scheduler = multistep(steps)
    t = scheduler.sigmas.numpy()
    assert 0.999 < t[0] < 1
    np.testing.assert_allclose(solver.dpm_solver_2m(curved, NOISE, t), theirs(scheduler), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 28])
def test_dpm_solver_on_our_timesteps(steps, spacing):
    """These begin at 1, where lambda is infinite."""
    scheduler, t = multistep(steps), solver.timesteps(steps, 3.0, spacing)
    scheduler.sigmas, scheduler.timesteps = torch.from_numpy(t), torch.from_numpy(1000 * t[:-1])
    found = solver.dpm_solver_2m(curved, NOISE, t)
    np.testing.assert_allclose(found, theirs(scheduler), rtol=0, atol=1e-5)
    if steps > 2:
        assert np.abs(found - solver.euler(curved, NOISE, t)).max() > 1e-3
