"""The state of a run: what trains and what does not, apart from each other.

`State` is donated to each step and written to checkpoints. `Constants` are neither: frozen parameters, in the dtype
that `config.execution` names, and statistics of the data (which are small, and checkpointed).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from mmcore_jax import sharding
from mmcore_jax.config import Config
from mmcore_jax.mmcore import MMCORE, Params
from mmcore_jax.training import bad_steps
from mmcore_jax.training import optimizer as optimizer_lib
from mmcore_jax.training.optimizer import Flat


class State(NamedTuple):
    """What a step changes. `ema` is empty where `ema_decay` is 0; `health` is what bad steps are known by."""

    step: jax.Array
    params: Flat
    opt_state: Any
    ema: Flat
    health: Any = ()


class Constants(NamedTuple):
    """What a step reads only."""

    frozen: Flat
    statistics: Flat


def join(params: Flat, constants: Constants) -> Params:
    """The parameter tree that the model takes."""
    return unflatten_dict({**params, **constants.frozen}, sep="/") | {"statistics": constants.statistics}


class Plan(NamedTuple):
    """Shapes and placement of every parameter, and the optimizer over those that train."""

    shapes: dict[str, jax.ShapeDtypeStruct]
    shardings: dict[str, NamedSharding]
    tuning: dict[str, Any]
    optimizer: Any

    @property
    def trainable(self) -> list[str]:
        return [path for path, line in self.tuning.items() if not line.frozen]

    @property
    def frozen(self) -> list[str]:
        return [path for path, line in self.tuning.items() if line.frozen]

    def part(self, name: str, frozen_dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of the parameters of one part, in the dtypes that the run keeps them in."""
        return {
            path: jax.ShapeDtypeStruct(
                leaf.shape, frozen_dtype if self.tuning[path].frozen else leaf.dtype, sharding=self.shardings[path]
            )
            for path, leaf in self.shapes.items()
            if path.split("/")[0] == name
        }


def make_plan(config: Config, model: MMCORE, mesh: Mesh, batch: Any) -> Plan:
    """Evaluates shapes and shardings without making a single array; `batch` may be abstract."""
    boxed = jax.eval_shape(functools.partial(_init, model), jax.eval_shape(jax.random.key, 0), batch)
    shapes = flatten_dict(nn.unbox(boxed), sep="/")
    shardings = flatten_dict(sharding.parameter_shardings(boxed, mesh), sep="/")
    tuning = optimizer_lib.assign(list(shapes), config.tuning)
    return Plan(shapes, shardings, tuning, optimizer_lib.make_optimizer(config, tuning))


@functools.partial(jax.jit, static_argnums=0)
def _init(model: MMCORE, key: jax.Array, batch: Any) -> Params:
    """All parameters with the names of their axes. Compiled so as to be traced once, for shapes and for values."""
    return model.init(key, batch)["params"]


def random_params(config: Config, model: MMCORE, plan: Plan, batch: Any, paths: list[str]) -> Flat:
    """Random parameters, created where they live: the same numbers on any mesh, and whichever others are made."""

    def make(key: jax.Array) -> Flat:
        flat = flatten_dict(nn.unbox(_init(model, key, batch)), sep="/")
        return {path: flat[path] for path in paths}

    shardings = {path: plan.shardings[path] for path in paths}
    return jax.jit(make, out_shardings=shardings)(jax.random.key(config.seed))


def freeze(config: Config, plan: Plan, params: Flat) -> Flat:
    """The frozen ones among `params`, in the dtype that frozen parameters are kept in."""
    return {path: params[path].astype(config.execution.frozen_dtype) for path in plan.frozen}


def abstract_state(config: Config, plan: Plan, mesh: Mesh) -> State:
    """Shapes and shardings of the state: moments and EMA lie where their parameters do."""
    whole = sharding.replicated(mesh)
    params = {path: _placed(plan.shapes[path], plan.shardings[path]) for path in plan.trainable}
    shapes = jax.eval_shape(plan.optimizer.init, params)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return _placed(leaf, plan.shardings.get(names[-1], whole) if names and leaf.ndim else whole)

    opt_state = jax.tree_util.tree_map_with_path(place, shapes)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    health = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), bad_steps.health())
    return State(step, params, opt_state, dict(params) if config.optimizer.ema_decay else {}, health)


def create_state(config: Config, plan: Plan, mesh: Mesh, params: Flat) -> State:
    """The state at step 0, of the trainable ones among `params`. It owns its arrays, since steps donate it."""
    params = {path: params[path] for path in plan.trainable}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, plan, mesh))

    def create(params: Flat) -> State:
        ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else {}
        params, opt_state = jax.tree.map(jnp.copy, params), plan.optimizer.init(params)
        return State(jnp.zeros((), jnp.int32), params, opt_state, ema, bad_steps.health())

    return jax.jit(create, out_shardings=shardings)(params)


def _placed(leaf: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
