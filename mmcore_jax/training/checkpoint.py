"""Checkpoints with Orbax: written asynchronously, complete enough that a resumed run cannot be told from another.

A checkpoint holds what trains, the optimizer's state, the EMA, the statistics of the data and a JSON record: step
(which is the whole data position), config, and for each frozen part where it came from and its fingerprint. Frozen
parameters themselves are not written.
"""

import dataclasses
import hashlib
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mmcore_jax import config as config_lib
from mmcore_jax import sharding
from mmcore_jax.config import Config, UserError
from mmcore_jax.data import layout
from mmcore_jax.data.text import check_same_tokenizer
from mmcore_jax.mmcore import MMCORE, Params
from mmcore_jax.training.optimizer import Flat
from mmcore_jax.training.state import Constants, Plan, State, join, make_plan, random_params

RANDOM = "random"


class Checkpoints:
    """The checkpoints of one run, in `WORKDIR/checkpoints`."""

    def __init__(self, workdir: pathlib.Path, config: Config) -> None:
        self._config = config
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.checkpoint.keep,
            keep_period=config.checkpoint.keep_period or None,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: State, constants: Constants, step: int) -> None:
        """Starts writing a checkpoint and returns; the arrays are copied off the devices first."""
        if self.latest_step == step:
            return
        record = {
            "step": step,
            "config": dataclasses.asdict(self._config),
            "statistics": {name: list(value.shape) for name, value in constants.statistics.items()},
            "frozen": {
                part: {"source": self._config.init[part], "fingerprint": value}
                for part, value in fingerprints(constants.frozen).items()
            },
        }
        items = {
            "params": state.params,
            "opt_state": state.opt_state,
            "statistics": constants.statistics,
            "ema": state.ema,
        }
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items() if tree}
        self._manager.save(step, args=ocp.args.Composite(record=ocp.args.JsonSave(record), **arrays))

    def restore(self, abstract: State, frozen: Flat) -> tuple[State, Constants]:
        """Restores the latest checkpoint onto the shardings of `abstract`.

        Raises:
          UserError: if the frozen parameters are not those that the run has trained with.
        """
        step = self.latest_step
        items = {"params": abstract.params, "opt_state": abstract.opt_state, "ema": abstract.ema}
        arrays = {name: ocp.args.StandardRestore(tree) for name, tree in items.items() if tree}
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        whole = abstract.step.sharding
        statistics = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
            for name, shape in record["statistics"].items()
        }
        if statistics:
            arrays["statistics"] = ocp.args.StandardRestore(statistics)
        restored = self._manager.restore(step, args=ocp.args.Composite(**arrays))
        for part, value in fingerprints(frozen).items():
            known = record["frozen"].get(part)
            if known is None or known["fingerprint"] != value:
                raise UserError(
                    f"the frozen part {part!r} from {self._config.init[part]} is not the one that this run was trained "
                    "with: restore the original, or start anew with another --workdir."
                )
        ema = restored["ema"] if abstract.ema else {}
        state = State(jax.device_put(np.int32(step), whole), restored["params"], restored["opt_state"], ema)
        return state, Constants(frozen, restored["statistics"] if statistics else {})

    def wait(self) -> None:
        """Blocks until everything is on disk."""
        self._manager.wait_until_finished()


def initial_params(config: Config, model: MMCORE, plan: Plan, batch: Any, paths: list[str]) -> Flat:
    """Parameters at the start of a run: each part that `paths` touch, from where `config.init` says.

    Raises:
      UserError: if `config.init` lacks a part, names one that the stage has not, or a source cannot serve it.
    """
    parts = sorted({path.split("/")[0] for path in plan.shapes})
    if set(parts) != set(config.init):
        difference = sorted(set(parts) ^ set(config.init))[0]
        raise UserError(f"config.init must name the parts {', '.join(parts)} and no others; see {difference!r}.")
    touched = {path.split("/")[0] for path in paths}
    fresh = {part for part in touched if config.init[part] == RANDOM}
    params = random_params(config, model, plan, batch, fresh) if fresh else {}
    for part in sorted(touched - fresh):
        if part == "vlm" and (kept := pathlib.Path(config.init[part]) / "tokenizer").is_dir():
            check_same_tokenizer(config.data.tokenizer, kept)
        params |= load_weights(config.init[part], part, plan, f"{config.stage} (config.init.{part})")
    return params


def load_run(workdir: pathlib.Path) -> tuple[Config, MMCORE, Params]:
    """Loads a finished run for inference on the devices of this process: its config, model and (averaged) parameters.

    Raises:
      UserError: if there is no finished run in `workdir`, or one that its frozen parts came from is missing.
    """
    config = config_lib.from_json(workdir / "config.json")
    model = MMCORE(config.model, config.execution)
    mesh = sharding.make_mesh(config_lib.Mesh(data=-1, fsdp=1, context=1, tensor=1), jax.local_devices())
    plan = make_plan(config, model, mesh, layout.placeholder(config))
    params: Flat = {}
    for part in sorted({path.split("/")[0] for path in plan.shapes}):
        params |= load_weights(str(workdir), part, plan, str(workdir))
    return config, model, join(params, Constants({}, _load_statistics(workdir, sharding.replicated(mesh))))


def load_weights(source: str, part: str, plan: Plan, wanted_by: str) -> Flat:
    """Loads one part's weights (EMA where kept) from the finished run in the workdir `source`, onto their shardings.

    Where that run had the part frozen itself, its origin is followed.

    Raises:
      UserError: if the run is missing or unfinished (naming the command that makes it), or its shapes differ.
    """
    workdir = pathlib.Path(source)
    command = _command_for(workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"{wanted_by} needs the part {part!r} from {source}, which does not exist: make it with {command}"
        )
    config = config_lib.from_json(workdir / "config.json")
    manager = _reader(workdir)
    step = manager.latest_step() or 0
    if step < config.total_steps:
        raise UserError(f"{source} has reached step {step} of {config.total_steps}: finish it with {command}")
    item = "ema" if config.optimizer.ema_decay else "params"
    available = manager.item_metadata(step)[item].tree
    if not any(path.split("/")[0] == part for path in available):
        if config.init.get(part, RANDOM) == RANDOM:
            raise UserError(f"{source} has no part {part!r}, which {wanted_by} asks it for.")
        return load_weights(config.init[part], part, plan, wanted_by)
    wanted = {}
    for path, expected in plan.shapes.items():
        if path.split("/")[0] != part:
            continue
        shape = tuple(available[path].shape) if path in available else None
        if shape != expected.shape:
            raise UserError(f"{source} has {path!r} of shape {shape}, but {wanted_by} expects {expected.shape}.")
        wanted[path] = jax.ShapeDtypeStruct(expected.shape, expected.dtype, sharding=plan.shardings[path])
    restore = ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True)
    return manager.restore(step, args=ocp.args.Composite(**{item: restore}))[item]


def _reader(workdir: pathlib.Path) -> ocp.CheckpointManager:
    """Opens another run's checkpoints."""
    trees = ("params", "ema", "opt_state", "statistics")
    handlers = {name: ocp.PyTreeCheckpointHandler() for name in trees} | {"record": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), item_handlers=handlers)


def _load_statistics(workdir: pathlib.Path, where: jax.sharding.Sharding) -> Flat:
    """The statistics of the data in a finished run's newest checkpoint."""
    manager = _reader(workdir)
    step = manager.latest_step()
    found = manager.item_metadata(step)
    if "statistics" not in found.keys():  # noqa: SIM118, not a dict
        return {}
    leaves = found["statistics"].tree.items()
    wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where) for name, leaf in leaves}
    restore = ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted))
    return manager.restore(step, args=ocp.args.Composite(statistics=restore))["statistics"]


def fingerprints(params: Flat) -> dict[str, str]:
    """A fingerprint of the bits of each part, computed where the arrays live and the same on any mesh."""
    sums = jax.device_get(_checksums(params))
    digests: dict[str, Any] = {}
    for path in sorted(sums):
        line = f"{path} {params[path].shape} {params[path].dtype} {int(sums[path])}\n"
        digests.setdefault(path.split("/")[0], hashlib.sha256()).update(line.encode())
    return {part: digest.hexdigest()[:16] for part, digest in digests.items()}


@jax.jit
def _checksums(params: Flat) -> dict[str, jax.Array]:
    """Position-weighted sums modulo 2^32 of each array's bits; integer sums do not depend on their order."""

    def checksum(x: jax.Array) -> jax.Array:
        unsigned = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        weights = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            weights = weights * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(bits * (2 * weights * jnp.uint32(2654435761) + 1), dtype=jnp.uint32)

    return jax.tree.map(checksum, params)


def _command_for(workdir: pathlib.Path) -> str:
    match = re.fullmatch(r"(\w+)-(\w+)", workdir.name)
    stage, recipe = match.groups() if match else ("STAGE", "RECIPE")
    return f"python -m mmcore_jax.train --config=configs/{stage}.py:{recipe} --workdir={workdir}"
