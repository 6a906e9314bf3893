"""The real step of small stages, compiled for eight emulated devices: placed as intended, and only expected traffic."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from mmcore_jax import sharding
from mmcore_jax.planning import outcome as outcome_lib
from mmcore_jax.planning.program import Program
from mmcore_jax.training.state import Constants, State
from tests import tiny

MESHES = {"data": (8, 1, 1, 1), "fsdp": (1, 8, 1, 1), "tensor": (1, 4, 1, 2)}
AXES = {"data": {"data"}, "fsdp": {"fsdp"}, "tensor": {"fsdp", "tensor", "fsdp x tensor"}}


def outcomes(stage: str) -> dict[str, dict]:
    """What `plan` records of a stage on each mesh. Runs where eight devices are."""
    from mmcore_jax.planning.outcome import evaluate

    found = {}
    for name, sizes in MESHES.items():
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in zip(sharding.AXES, sizes)]
        found[name] = evaluate(tiny.config(stage, pathlib.Path("nowhere"), *mesh), "local").record()
    return found


@pytest.mark.parametrize("stage", ["stage0"])
def test_every_mesh_splits_what_it_should(stage: str) -> None:
    found = tiny.call(outcomes, stage, devices=8)
    whole = found["data"]
    for name, outcome in found.items():
        moved = {kind: sum(t["bytes"] for t in outcome["transfers"] if t["kind"] == kind) for kind in _kinds(outcome)}
        assert outcome["fits"]
        assert outcome["seconds"] is None
        assert outcome["replicated"] == []
        assert {transfer["axes"] for transfer in outcome["transfers"]} <= AXES[name]
        # No mesh repeats work that another splits, and none leaves any out.
        assert 0.95 * whole["compiled_flops"] < outcome["compiled_flops"] < 1.1 * whole["compiled_flops"]
        if name == "data":
            # Every gradient is summed; no parameter is gathered.
            assert moved["all-reduce"] > whole["memory"]["parameters"]
            assert moved.get("all-gather", 0) < whole["memory"]["parameters"] / 2
        else:
            for kind in ("parameters", "moments", "EMA"):
                assert outcome["memory"][kind] < whole["memory"][kind] / 5
            assert moved["all-gather"] > whole["memory"]["parameters"] / 4
    assert 8 * whole["compiled_flops"] > 0.95 * whole["model_flops"]["total"]


def _kinds(outcome: dict) -> set[str]:
    return {transfer["kind"] for transfer in outcome["transfers"]}


def table_traffic() -> tuple[list[tuple[str, int]], int]:
    """What moves to differentiate a lookup, (kind, bytes) each, and the bytes of all embeddings.

    Runs where eight devices are.
    """
    from mmcore_jax.config import Mesh
    from mmcore_jax.models.qwen_vl import QwenVLModel
    from mmcore_jax.planning import hlo

    config = tiny.config("stage1", pathlib.Path("nowhere"))
    mesh = sharding.make_mesh(Mesh(2, 4, 1, 1))
    model = QwenVLModel(dataclasses.replace(config.model.vlm, tie_embeddings=True), config.execution)
    shape = config.model.vlm.vocab_size, config.model.vlm.width
    table = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    ids = jax.ShapeDtypeStruct((16, shape[0]), jnp.int32, sharding=NamedSharding(mesh, sharding.spec("batch")))

    def looked_up(table: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.sin(model.apply({"params": {"embedding": table}}, ids, method="embed_text")).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(looked_up), out_shardings=table.sharding).lower(table, ids).compile()
    module = hlo.parse(compiled.as_text())
    found = [hlo.collective(module, name, line) for name, line, _ in hlo.executed(module)]
    return [(one.kind, one.bytes) for one in found if one], 4 * shape[0] * shape[1]


def test_no_device_holds_the_gradient_of_all_embeddings() -> None:
    moved, whole = tiny.call(table_traffic, devices=8)
    assert {"all-to-all", "all-reduce"} <= {kind for kind, _ in moved}
    assert max(size for kind, size in moved if kind != "all-to-all") <= whole / 4


def test_what_every_device_holds_whole_is_named() -> None:
    mesh = AbstractMesh((1, 4, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)

    def leaf(*spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    state = State(leaf("fsdp"), {"dit/out/kernel": leaf("fsdp"), "dit/in/kernel": leaf()}, (), {})
    made = Program(mesh, None, None, (state, Constants({}, {"mean": leaf()}), None))
    assert {large.where for large in outcome_lib._replicated(made)} == {"dit/in/kernel", "mean"}
    assert {large.bytes for large in outcome_lib._replicated(made)} == {4 * 1024**2}
    alone = AbstractMesh((4, 1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    assert outcome_lib._replicated(made._replace(mesh=alone)) == []
