"""The device mesh, and the one table that maps logical axes of arrays to its axes.

Modules name what an axis is ("embed", "mlp", "heads"); the table below says where it lives. An unknown name, or two
names of one array that claim the same mesh axis, is an error: current Flax resolves both silently.
"""

import math
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmcore_jax import config as config_lib
from mmcore_jax.config import UserError

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. Activations: batch, length and the features that tensor parallelism splits.
# Parameters: "embed" is split for storage (fsdp) and gathered when used; the others are split for good (tensor).
# "lora", the long side of a matrix that has only one, is split over both. "group_batch": the rows of all devices among
# which a parameter is split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "group_batch": ("data",),
    "length": ("context",),
    "activation_heads": ("tensor",),
    "activation_mlp": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "lora": ("tensor", "fsdp"),
    "layers": (),
}

# A parameter of this many values or more must be sharded where there is an fsdp or tensor axis to shard it over.
LARGE = 1 << 20
NAMED = 3  # of them that an error names


def make_mesh(settings: config_lib.Mesh, devices: list | None = None) -> Mesh:
    """Builds the mesh `data, fsdp, context, tensor` over all devices; slices of TPUs are split along `data` first.

    Raises:
      UserError: if the sizes do not multiply to the number of devices, or `data` is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(settings, axis) for axis in AXES]
    described = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh ({described}) needs sizes of at least 1, and at most one -1 for the rest.")
    known = math.prod(size for size in sizes if size != -1)
    filled = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(filled) != len(devices):
        raise UserError(
            f"config.mesh ({described}) does not divide the {len(devices)} {devices[0].platform} device(s): "
            f"its sizes must multiply to {len(devices)}."
        )
    # What GPUs call a slice is a node, and fsdp may well go over several.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    if filled[0] % slices:
        raise UserError(f"config.mesh.data is {filled[0]}: make it a multiple of the {slices} slices of TPUs.")
    inside, across = (filled[0] // slices, *filled[1:]), (slices, *(1 for _ in AXES[1:]))
    if slices > 1:
        placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(filled, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises `UserError` unless the global batch divides over processes, the mesh and the accumulation steps."""
    shards = batch_shards(mesh)
    if shards % jax.process_count():
        raise UserError(
            f"config.mesh splits the batch into {shards} part(s) (data x fsdp), which {jax.process_count()} processes "
            "cannot share evenly: make config.mesh.data or config.mesh.fsdp larger, and the other axes smaller."
        )
    if accumulation < 1 or batch_size < 1 or batch_size % (shards * accumulation):
        raise UserError(
            f"config.batch_size {batch_size} does not divide into {shards} batch shard(s) (mesh data x fsdp) times "
            f"{accumulation} accumulation step(s): make it a multiple of {max(1, shards * accumulation)}."
        )


def spec(*names: str | None) -> PartitionSpec:
    """Returns the partition spec of an array whose axes have these logical names (None: replicated).

    Raises:
      ValueError: for a name that the table lacks, or for two names that claim one mesh axis.
    """
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r}; the table has {', '.join(sorted(RULES))}")
    axes = [RULES[name] if name is not None else () for name in names]
    claimed = [axis for group in axes for axis in group]
    if len(claimed) != len(set(claimed)):
        raise ValueError(f"logical axes {names} claim a mesh axis twice: {claimed}")
    return PartitionSpec(*(group if len(group) > 1 else group[0] if group else None for group in axes))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the layout of an activation. Outside `jax.set_mesh` it does nothing."""
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} logical axes {names} for an array of shape {x.shape}")
    layout = spec(*names)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout)


@flax.struct.dataclass
class Named(nn.meta.AxisMetadata):
    """A parameter with its logical axis names; unlike Flax's own boxes it never constrains anything by itself."""

    value: Any
    names: tuple[str | None, ...] = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, value: Any) -> "Named":
        return self.replace(value=value)

    def add_axis(self, index: int, params: dict) -> "Named":
        names = list(self.names)
        names.insert(index, params[nn.meta.PARTITION_NAME])
        return self.replace(names=tuple(names))

    def remove_axis(self, index: int, params: dict) -> "Named":
        return self.replace(names=tuple(name for i, name in enumerate(self.names) if i != index))


def parameter(init: nn.initializers.Initializer, *names: str | None) -> nn.initializers.Initializer:
    """Attaches logical axis names to a parameter initializer."""
    spec(*names)
    return lambda *arguments: Named(init(*arguments), names)


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Returns the `NamedSharding` of every leaf of an abstract parameter tree that carries logical names.

    A dimension that its mesh axes do not divide stays whole; a large parameter that ends up replicated is an error.

    Raises:
      UserError: naming the large parameters left replicated on a mesh with an fsdp or tensor axis.
    """
    replicated = []

    def sharding(path, leaf):
        value = leaf.value if isinstance(leaf, Named) else leaf
        names = leaf.names if isinstance(leaf, Named) else (None,) * value.ndim
        fitting = [
            axes if axes is not None and size % _axes_size(mesh, axes) == 0 else None
            for size, axes in zip(value.shape, spec(*names))
        ]
        parts = math.prod(_axes_size(mesh, axes) for axes in fitting if axes is not None)
        if parts == 1 and value.size >= LARGE and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
            replicated.append(f"{jax.tree_util.keystr(path)} {value.shape}")
        return NamedSharding(mesh, PartitionSpec(*fitting))

    tree = jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, Named))
    if replicated:
        raise UserError(
            f"large parameters are left replicated: config.mesh (fsdp {mesh.shape['fsdp']}, tensor "
            f"{mesh.shape['tensor']}) does not divide {', '.join(replicated[:NAMED])}"
            f"{f' and {len(replicated) - NAMED} more' if len(replicated) > NAMED else ''}: make config.mesh.fsdp "
            "smaller, and config.mesh.data larger."
        )
    return tree


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's slice of a host batch (leading axis: rows) onto the devices, as global arrays."""
    sharding = NamedSharding(mesh, spec("batch"))
    with jax.transfer_guard_host_to_device("allow"):  # JAX does not count it as explicit where there are more processes
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def _axes_size(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
