"""The step is compiled with the options of its platform, unless the environment has them."""

import types

import jax
import jax.numpy as jnp
import pytest

from mmcore_jax import config as config_lib
from mmcore_jax import sharding
from mmcore_jax.training import compilation


def double(state, batch):
    return state + batch, batch


def test_options_reach_the_compiler(monkeypatch):
    mesh, given = sharding.make_mesh(config_lib.Mesh(1, 1, 1, 1), jax.devices()[:1]), (jnp.ones(2), jnp.ones(2))
    monkeypatch.setitem(compilation.OPTIONS, "cpu", {"xla_no_such_option": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such_option'"):
        compilation.compiled_step(double, mesh)(*given)
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_option=false")
    assert compilation.compiled_step(double, mesh)(*given)[0].tolist() == [2, 2]


def test_what_the_compiler_refuses_for_other_chips_is_for_v5e_alone():
    """It does so of programs that are too large for a test, such as stage 1 of 7B."""

    def options(kind: str) -> dict:
        return compilation._options(types.SimpleNamespace(platform="tpu", device_kind=kind))

    assert any("reduce_scatter" in name for name in options("TPU v5 lite"))
    for kind in ("TPU v5", "TPU v6 lite"):
        assert options(kind) == compilation.OPTIONS["tpu"]
        assert not any("reduce_scatter" in name for name in options(kind))
