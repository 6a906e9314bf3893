"""Meshes over eight emulated devices, in a process of their own: every mesh gives the same loss curve."""

import pathlib

import numpy as np
import pytest

from tests import tiny

MESHES = {
    "data": (8, 1, 1, 1),
    "fsdp": (1, 8, 1, 1),
    "tensor": (4, 1, 1, 2),
    "mixed": (1, 2, 2, 2),
}
INITIALISED = ("one", "mixed")  # the others get the parameters of the first, since drawing them takes long to compile
STEPS = 20


def curves(stage: str, data: str) -> dict[str, list[float]]:
    """Loss curves of a tiny stage on one device and on every mesh. Runs where eight devices are."""
    import jax

    from mmcore_jax import config as config_lib
    from mmcore_jax import sharding
    from mmcore_jax.data.pipeline import Batches
    from mmcore_jax.mmcore import MMCORE
    from mmcore_jax.objectives import alignment
    from mmcore_jax.training.state import Constants, create_state, freeze, join, make_plan
    from mmcore_jax.training.step import make_step
    from mmcore_jax.training.weights import initial_params

    config = tiny.config(stage, pathlib.Path(data))
    batches, model = Batches(config), MMCORE(config.model, config.execution)
    result, whole = {}, {}
    for name, sizes in {"one": (1, 1, 1, 1), **MESHES}.items():
        mesh = sharding.make_mesh(config_lib.Mesh(*sizes), jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(mesh):
            plan = make_plan(config, model, mesh, batches[0].arrays)
            if name in INITIALISED:
                params = initial_params(config, model, plan, batches[0].arrays, list(plan.shapes))
                whole = whole or jax.device_get(params)
                jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), whole)
            else:
                params = jax.device_put(whole, {path: plan.shardings[path] for path in whole})
            frozen = freeze(config, plan, params)
            statistics = {}
            if config.objectives.alignment:
                statistics = alignment.measure(model, join({}, Constants(frozen, {})), batches, mesh)
            state, constants = create_state(config, plan, mesh, params), Constants(frozen, statistics)
            step, losses = jax.jit(make_step(config, model, plan), donate_argnums=0), []
            for number in range(STEPS):
                state, metrics = step(state, constants, sharding.shard_batch(batches[number].arrays, mesh))
                losses.append(float(metrics["loss"]))
            if name == "mixed":
                parts = {len(leaf.sharding.device_set) // max(1, _copies(leaf)) for leaf in state.params.values()}
                assert max(parts) > 1, "nothing is sharded"
        result[name] = losses
    return result


def _copies(leaf) -> int:
    shards = {tuple((s.start, s.stop) for s in shard.index) for shard in leaf.addressable_shards}
    return len(leaf.addressable_shards) // len(shards)


@pytest.mark.whole_runs
@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_every_mesh_gives_the_same_curve(stage: str, data) -> None:
    found = tiny.call(curves, stage, str(data), devices=8)
    for name in MESHES:
        np.testing.assert_allclose(found[name], found["one"], rtol=1e-3, err_msg=name)
    assert np.ptp(found["one"]) > 1e-2
