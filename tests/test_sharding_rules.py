"""The sharding table refuses what Flax would resolve in silence."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mmcore_jax import config, sharding
from mmcore_jax.config import UserError
from mmcore_jax.sharding import Named


def mesh(data=1, fsdp=1, context=1, tensor=1):
    return AbstractMesh((data, fsdp, context, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 4)


def array(*shape, names=None):
    value = jax.ShapeDtypeStruct(shape, jnp.float32)
    return value if names is None else Named(value, names)


def test_spec():
    assert sharding.spec("batch", "length", None) == PartitionSpec(("data", "fsdp"), "context", None)
    assert sharding.spec("layers", "embed", "mlp") == PartitionSpec(None, "fsdp", "tensor")
    assert sharding.spec() == PartitionSpec()


def test_every_rule_names_axes_of_the_mesh():
    assert {axis for axes in sharding.RULES.values() for axis in axes} <= set(sharding.AXES)


def test_an_unknown_name():
    with pytest.raises(ValueError, match="unknown logical axis 'embedd'"):
        sharding.spec("embedd", None)
    with pytest.raises(ValueError, match="unknown logical axis 'headz'"):
        sharding.parameter(jax.nn.initializers.zeros, "headz")


@pytest.mark.parametrize("names", [("embed", "embed"), ("heads", "mlp"), ("batch", "embed")])
def test_two_names_that_claim_one_axis(names):
    with pytest.raises(ValueError, match="twice"):
        sharding.spec(*names)


def test_constrain():
    x = jnp.zeros((2, 3))
    assert sharding.constrain(x, "batch", None) is x
    with pytest.raises(ValueError, match="1 logical axes"):
        sharding.constrain(x, "batch")
    with pytest.raises(ValueError, match="unknown logical axis"):
        sharding.constrain(x, "batch", "lenght")


def test_parameter_shardings():
    tree = {
        "kernel": array(8, 6, names=("embed", "mlp")),
        "odd": array(7, 6, names=("embed", "mlp")),
        "stacked": array(3, 8, 6, names=("layers", "embed", "mlp")),
        "scale": array(8),
    }
    specs = jax.tree.map(lambda s: s.spec, sharding.parameter_shardings(tree, mesh(fsdp=4, tensor=2)))
    assert specs == {
        "kernel": PartitionSpec("fsdp", "tensor"),
        "odd": PartitionSpec(None, "tensor"),
        "stacked": PartitionSpec(None, "fsdp", "tensor"),
        "scale": PartitionSpec(None),
    }


def test_a_large_replicated_parameter_is_named():
    side = int(np.sqrt(sharding.LARGE))
    nameless, odd = array(side, side, names=(None, None)), array(side + 1, side + 1, names=("embed", None))
    for tree in ({"part": {"nameless": nameless}}, {"part": {"odd": odd}}, {"part": {"bare": array(side, side)}}):
        with pytest.raises(ValueError, match=f"left replicated: .*{next(iter(tree['part']))}"):
            sharding.parameter_shardings(tree, mesh(fsdp=4))
        sharding.parameter_shardings(tree, mesh(data=4))  # nothing to shard it over
    sharding.parameter_shardings({"small": array(side - 1, side, names=(None, None))}, mesh(fsdp=4))
    sharding.parameter_shardings({"split": array(side, side, names=("embed", None))}, mesh(fsdp=4))


def test_mesh_errors():
    settings = config.Mesh(data=-1, fsdp=1, context=1, tensor=1)
    assert dict(sharding.make_mesh(settings).shape) == dict(data=len(jax.devices()), fsdp=1, context=1, tensor=1)
    with pytest.raises(UserError, match="does not divide"):
        sharding.make_mesh(config.Mesh(data=1, fsdp=len(jax.devices()) + 1, context=1, tensor=1))
    with pytest.raises(UserError, match="at most one -1"):
        sharding.make_mesh(config.Mesh(data=-1, fsdp=-1, context=1, tensor=1))


def test_batch_size():
    sharding.check_batch(16, 2, mesh(data=2, fsdp=4, tensor=2))
    with pytest.raises(UserError, match="make it a multiple of 16"):
        sharding.check_batch(24, 2, mesh(data=2, fsdp=4, tensor=2))


def test_named_parameters_keep_their_names_in_a_stack():
    named = Named(jnp.zeros((2, 3)), ("embed", "mlp"))
    stacked = named.add_axis(0, {"partition_name": "layers"})
    assert stacked.names == ("layers", "embed", "mlp")
    assert stacked.remove_axis(0, {}).names == named.names


def test_slices_are_split_along_the_data_axis():
    with pytest.raises(UserError, match="data is 1: make it a multiple of the 2 slices"):
        sharding.make_mesh(config.Mesh(1, 8, 1, 1), chips("TPU v5 lite", 2, 2, slices=2))


def test_nodes_of_gpus_are_no_slices():
    devices = [
        Device(id=n, process_index=n // 4, slice_index=n // 4, coords=[n % 4], platform="gpu", device_kind="H100")
        for n in range(8)
    ]
    placed = sharding.make_mesh(config.Mesh(1, 8, 1, 1), devices)
    assert [*placed.devices.flat] == devices


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite"])
@pytest.mark.parametrize("sizes", [(1, 32, 1, 2), (2, 32, 1, 1), (1, 16, 4, 1)])
def test_meshes_of_all_chips_split_their_axes(kind, sizes):
    devices = chips(kind, *((4, 4, 4) if kind == "TPU v5" else (8, 8)))
    assert sharding.make_mesh(config.Mesh(*sizes), devices).devices.shape == sizes


class Device(types.SimpleNamespace):
    """A stand-in that a mesh can be made of."""

    __hash__ = object.__hash__


def chips(kind: str, *shape: int, slices: int = 1) -> list:
    """TPUs in a grid, four in a row of y and x to a process."""
    places = [(n, place[::-1]) for n in range(slices) for place in np.ndindex(*shape[::-1])]
    return [
        Device(
            id=number, process_index=number // 4, slice_index=n, coords=(*place, 0)[:3], core_on_chip=0,
            platform="tpu", device_kind=kind,
        )
        for number, (n, place) in enumerate(places)
    ]  # fmt: skip
