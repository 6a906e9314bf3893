"""Checkpoints with Orbax: written asynchronously, complete enough that a resumed run cannot be told from another.

A checkpoint holds what trains, the optimizer's state, the EMA, the statistics of the data and a JSON record: step,
the position in the data and what was seen of it, config, and for each part with frozen parameters where they came from
and their fingerprint. Frozen parameters themselves are not written.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from mmcore_jax.config import FULL, Config, TryAgain, UserError
from mmcore_jax.processes import gather, is_first
from mmcore_jax.training.optimizer import Flat
from mmcore_jax.training.state import Constants, State

RUN_FILE = "run_id"
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def run_id(workdir: pathlib.Path) -> str:
    """What tells a run from one that had its workdir before and was deleted; empty if an earlier version began it."""
    path = workdir / RUN_FILE
    return path.read_text() if path.exists() else ""


class Checkpoints:
    """The checkpoints of one run: in `WORKDIR/checkpoints`, and more frequent ones on a disk of each host.

    Those in the workdir serve any mesh and any number of processes. Of the others each process keeps its own part, and
    they serve only the same ones.
    """

    def __init__(self, workdir: pathlib.Path, config: Config) -> None:
        self._config, self._record = config, {}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.checkpoint.keep,
            keep_period=config.checkpoint.keep_period or None,
            enable_async_checkpointing=True,
        )
        handlers = item_handlers(ocp.options.MultiprocessingOptions())
        lasting = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options, item_handlers=handlers)
        self._managers = {"lasting": lasting}
        if config.checkpoint.local_every:
            self._managers["local"] = _local_manager(workdir, config)
        places = self._places()
        self.latest_step = places[0][0] if places else None
        if config.checkpoint.local_every:
            self._drop_parts(places)
        for tier, manager in self._managers.items():
            if tier == "local" or is_first():
                for part in manager.directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(part, ignore_errors=True)

    def due(self, step: int) -> bool:
        """Whether to save after a step."""
        settings = self._config.checkpoint
        return step % settings.every == 0 or (settings.local_every > 0 and step % settings.local_every == 0)

    def save(self, state: State, constants: Constants, step: int, data: dict, last: bool = False) -> None:
        """Starts writing a checkpoint and returns; the arrays are copied off the devices first.

        `data` says, as JSON values, where the run stands in its data, and what it has seen. The `last` one of a process
        goes into the workdir.

        Raises:
          UserError: if it, or the one before, cannot be written.
        """
        if (step, "lasting") in self._places():
            return
        items = {"params": state.params, "opt_state": state.opt_state, "ema": state.ema}
        items["statistics"] = constants.statistics
        record = {
            "step": step,
            "data": data,
            "config": dataclasses.asdict(self._config),
            "fingerprints": fingerprints(_flat(items)),
            "statistics": {name: list(value.shape) for name, value in constants.statistics.items()},
            "frozen": {
                part: {"source": self._config.init[part], "fingerprint": value}
                for part, value in fingerprints(constants.frozen).items()
            },
        }
        arrays = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items() if tree}
        lasting = last or step % self._config.checkpoint.every == 0
        manager = self._managers["lasting" if lasting else "local"]
        with _writing(manager), jax.transfer_guard("allow"):  # of barriers
            manager.save(step, args=ocp.args.Composite(record=ocp.args.JsonSave(record), **arrays))
        self.latest_step = step

    def data(self) -> dict:
        """What the checkpoint that was restored says of the data; empty if there was none."""
        return self._record.get("data", {})

    def restore(self, abstract: State, frozen: Flat) -> tuple[State, Constants]:
        """Restores the latest whole checkpoint onto the shardings of `abstract`.

        Damaged ones are passed over with a warning, and moved out of the way.

        Raises:
          UserError: if there is none, or the frozen parameters are not those that the run has trained with.
        """
        self.wait()
        damaged: list[tuple[int, str]] = []
        for step, tier in self._places():
            directory = self._managers[tier].directory / str(step)
            found, problem = _read_twice(directory, abstract)
            problem = next(filter(None, gather(problem)), "") or _mismatch(*found)
            if not problem:
                break
            logging.warning("the checkpoint %s is damaged and passed over: %s", directory, problem)
            damaged.append((step, tier))
        else:
            raise UserError(
                f"none of the {len(damaged)} checkpoints in {self._managers['lasting'].directory} can be read (see the "
                "warnings above): bring one back, or start anew with another --workdir."
            )
        for place in damaged:
            self._set_aside(*place)
        self._record, items = found
        self._check_frozen(frozen)
        self.latest_step, whole = step, abstract.step.sharding
        state = State(
            jax.device_put(np.int32(step), whole), items["params"], items["opt_state"], items.get("ema", abstract.ema)
        )
        return state, Constants(frozen, items.get("statistics", {}))

    def wait(self) -> None:
        """Blocks until everything is on disk.

        Raises:
          UserError: if it cannot be written.
        """
        for manager in self._managers.values():
            with _writing(manager):
                manager.wait_until_finished()

    def _places(self) -> list[tuple[int, str]]:
        """Step and tier of the checkpoints that all processes have, the newest first."""
        known = [[step, tier] for tier, manager in self._managers.items() for step in manager.all_steps()]
        everywhere = set.intersection(*({(step, tier) for step, tier in theirs} for theirs in gather(known)))
        return sorted(everywhere, reverse=True)

    def _drop_parts(self, places: list[tuple[int, str]]) -> None:
        """Deletes what this process has of checkpoints that another lacks: all are to save those steps anew."""
        manager = self._managers["local"]
        for step in manager.all_steps():
            if (step, "local") not in places:
                shutil.rmtree(manager.directory / str(step))
        manager.reload()

    def _set_aside(self, step: int, tier: str) -> None:
        """Makes room for a whole checkpoint of that step."""
        manager = self._managers[tier]
        aside = manager.directory.with_name(f"{manager.directory.name}-damaged")
        if tier == "local" or jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / str(step), ignore_errors=True)
            (manager.directory / str(step)).rename(aside / str(step))
        gather(None)
        manager.reload()

    def _check_frozen(self, frozen: Flat) -> None:
        for part, value in fingerprints(frozen).items():
            known = self._record["frozen"].get(part)
            if known is None or known["fingerprint"] != value:
                raise UserError(
                    f"the frozen part {part!r} from {self._config.init[part]} is not the one that this run was trained "
                    "with: restore the original, or start anew with another --workdir."
                )


_TREES = ("params", "opt_state", "ema", "statistics")


def item_handlers(among: ocp.options.MultiprocessingOptions) -> dict[str, Any]:
    """What reads and writes each item, `among` some of the processes."""
    handlers = {name: ocp.PyTreeCheckpointHandler(multiprocessing_options=among) for name in _TREES}
    return handlers | {"record": ocp.JsonCheckpointHandler(multiprocessing_options=among)}


def _local_manager(workdir: pathlib.Path, config: Config) -> ocp.CheckpointManager:
    """Keeps what lies on the devices of this process, in a directory that no other process or mesh looks into."""
    among = ocp.options.MultiprocessingOptions(primary_host=None, barrier_sync_key_prefix="local")
    arrays = ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=None, use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    handlers: dict[str, Any] = {"record": ocp.JsonCheckpointHandler(multiprocessing_options=among)}
    for name in _TREES:
        handlers[name] = ocp.PyTreeCheckpointHandler(multiprocessing_options=among, type_handler_registry=registry)
    of_run = hashlib.sha256(f"{workdir.absolute()}{run_id(workdir)}".encode()).hexdigest()[:8]
    part = f"process_{jax.process_index()}_of_{jax.process_count()}"
    if jax.process_count() > 1:
        part += f"-mesh_{'_'.join(map(str, dataclasses.astuple(config.mesh)))}-devices_{jax.device_count()}"
    root = pathlib.Path(config.checkpoint.local).absolute()
    directory = root / f"{workdir.name}-{of_run}" / part
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to config.checkpoint.local {root}: {error.strerror}.") from error
    # Orbax says at every save that it does not know how much all processes write together.
    logging.get_absl_logger().addFilter(lambda record: "Global object size" not in record.getMessage())
    # What Orbax says of directories made in the background all processes hear, and take another's for their own: one
    # that is slow would write where nothing is yet, fail, and the others wait for it.
    asynchronous = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.CheckpointManager(
        directory,
        item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=2, create=False, multiprocessing_options=among, async_options=asynchronous
        ),
    )


def _read_twice(directory: Any, abstract: State) -> tuple[Any, str]:
    """What `_read` returns, or None and why; storage that refuses once may give it a moment later.

    Raises:
      UserError: as `_read` does.
      JaxRuntimeError: where the devices have no room, which is no fault of the checkpoint.
    """
    for pause in (1, 0):
        try:
            return _read(directory, abstract), ""
        except UserError:
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            problem = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        time.sleep(pause)
    return None, problem


def _read(directory: Any, abstract: State) -> tuple[dict, dict[str, Any]]:
    """The record and the arrays of a checkpoint. Each process reads by itself: if one fails, none waits for it.

    Raises:
      UserError: if the checkpoint has an EMA and the run has none, or the other way round.
    """
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(composite_options=options, **item_handlers(alone))
    reader = ocp.Checkpointer(handler, multiprocessing_options=alone)
    record = reader.restore(directory, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
    decay = record["config"]["optimizer"]["ema_decay"]
    if bool(decay) != bool(abstract.ema):
        raise UserError(
            f"the checkpoint {directory} was made with config.optimizer.ema_decay {decay:g}: an EMA neither begins nor "
            "ends within a run; set it back, or start anew with another --workdir."
        )
    items = {"params": abstract.params, "opt_state": abstract.opt_state, "ema": abstract.ema}
    items["statistics"] = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=abstract.step.sharding)
        for name, shape in record["statistics"].items()
    }
    arrays = {
        name: ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
        for name, tree in items.items()
        if tree
    }
    return record, dict(reader.restore(directory, args=ocp.args.Composite(**arrays)).items())


def _mismatch(record: dict, items: dict[str, Any]) -> str:
    """What is wrong with arrays that could be read, if they are not those that were written."""
    found = fingerprints(_flat(items))
    known = record.get("fingerprints", found)  # earlier versions wrote none
    wrong = [name for name, value in found.items() if known[name] != value]
    return f"{', '.join(wrong)} changed since they were written" if wrong else ""


def _flat(items: dict[str, Any]) -> Flat:
    leaves = jax.tree_util.tree_flatten_with_path(items)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@contextlib.contextmanager
def _writing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns a disk that is full or closed to us into a `UserError`, and what may pass into `TryAgain`."""
    try:
        yield
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).split("\n")[0][-200:]  # the system's own words come last
        full, closed = (any(os.strerror(number) in str(error) for number in kind) for kind in (FULL, _CLOSED))
        raise (UserError if full or closed else TryAgain)(
            f"a checkpoint in {manager.directory} cannot be written ({reason}); the ones before it are intact: "
            f"{'make room, and ' * full}{'let it be written to, and ' * closed}run the same command again."
        ) from error


def has_saved(workdir: pathlib.Path) -> bool:
    """Whether a run has a checkpoint in its workdir."""
    return any(step.name.isdigit() for step in (workdir / "checkpoints").glob("*"))


def fingerprints(params: Flat) -> dict[str, str]:
    """A fingerprint of the bits of each part, computed where the arrays live and the same on any mesh."""
    sums = jax.device_get({path: _checksum(value) for path, value in params.items()})
    digests: dict[str, Any] = {}
    for path in sorted(sums):
        line = f"{path} {params[path].shape} {params[path].dtype} {int(sums[path])}\n"
        digests.setdefault(path.split("/")[0], hashlib.sha256()).update(line.encode())
    return {part: digest.hexdigest()[:16] for part, digest in digests.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Position-weighted sum modulo 2^32 of an array's bits; integer sums do not depend on their order."""
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    weights = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        weights = weights * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * weights * jnp.uint32(2654435761) + 1), dtype=jnp.uint32)
