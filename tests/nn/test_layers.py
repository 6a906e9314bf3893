"""Layers in half precision: gradients of what all tokens share are sums over tokens, and those are float32."""

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from mmcore_jax.models import mmdit
from mmcore_jax.nn.layers import Dense

TOKENS = jnp.ones((2, 64, 8), jnp.bfloat16)


def add_bias(bias: jax.Array) -> jax.Array:
    params = {"kernel": jnp.ones((8, 8)), "bias": bias}
    return Dense(8, (None, None), dtype=jnp.bfloat16).apply({"params": params}, TOKENS)


def modulate(shift: jax.Array) -> jax.Array:
    """By the slots of timesteps."""
    table = jnp.broadcast_to(shift, (2, 3, 8)).astype(jnp.bfloat16)
    return TOKENS + mmdit._pick(table, jnp.arange(2 * 64).reshape(2, 64) % 3)


def sums(program: jax.extend.core.Jaxpr) -> list[tuple[int, str]]:
    """How many values each sum of a program adds up at once, and their dtype."""
    found = []
    for equation in program.eqns:
        if equation.primitive.name == "reduce_sum":
            before, after = equation.invars[0].aval, equation.outvars[0].aval
            found.append((before.size // after.size, str(before.dtype)))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += sums(inner)
    return found


@pytest.mark.parametrize("add", [add_bias, modulate])
def test_sums_over_tokens_are_float32(add):
    def loss(shared: jax.Array) -> jax.Array:
        return jnp.sum(add(shared).astype(jnp.float32) ** 2)

    assert add(jnp.ones(8)).dtype == jnp.bfloat16
    found = [dtype for count, dtype in sums(jax.make_jaxpr(jax.grad(loss))(jnp.ones(8)).jaxpr) if count >= 64]
    assert found
    assert set(found) == {"float32"}
