"""Weights that a run starts from, or that are drawn with: of other runs, of published checkpoints, of a part by itself.

WORKDIR names a finished run, WORKDIR@STEP a checkpoint of any.
"""

import dataclasses
import functools
import json
import pathlib
import re
import typing
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from mmcore_jax import config as config_lib
from mmcore_jax import pretrained, sharding
from mmcore_jax.config import Config, Lora, Model, UserError, split_step
from mmcore_jax.data import packing
from mmcore_jax.data.image import check_processor, processor_file
from mmcore_jax.data.text import check_same_tokenizer
from mmcore_jax.mmcore import MMCORE, Params
from mmcore_jax.nn.layers import is_lora
from mmcore_jax.training.checkpoint import fingerprints, item_handlers
from mmcore_jax.training.optimizer import Flat
from mmcore_jax.training.state import Constants, Plan, join, make_plan, random_params

RANDOM = "random"
PART_FILE = "part.json"

Abstract = dict[str, jax.ShapeDtypeStruct]


def check_sources(config: Config) -> None:
    """Raises `UserError` if there is not, or not yet, what `config.init` says that a part comes from."""
    for part, source in config.init.items():
        if source != RANDOM:
            wanted_by = f"{config.stage} (config.init.{part})"
            _check_there(split_step(source)[0], part, wanted_by)
            if _is_of_run(source):
                step_of(source, wanted_by)


def initial_params(config: Config, model: MMCORE, plan: Plan, batch: Any, paths: list[str]) -> Flat:
    """The parameters `paths` at the start of a run, from where `config.init` says.

    LoRA on weights that have none there begins at random, with a product of zero.

    Raises:
      UserError: if `config.init` lacks a part, names one that the stage has not, or a source cannot serve it.
    """
    parts = sorted({path.split("/")[0] for path in plan.shapes})
    if set(parts) != set(config.init):
        difference = sorted(set(parts) ^ set(config.init))[0]
        raise UserError(f"config.init must name the parts {', '.join(parts)} and no others; see {difference!r}.")
    params: Flat = {}
    for part in parts:
        source, like = config.init[part], plan.part(part, config.execution.frozen_dtype)
        like = {path: leaf for path, leaf in like.items() if path in paths}
        if source == RANDOM or not like:
            continue
        if part == "vlm":
            _check_inputs(config, split_step(source)[0])
        params |= load_weights(source, part, config.model, like, f"{config.stage} (config.init.{part})")
    fresh = [path for path in paths if path not in params]
    _check_trained(config, plan, fresh)
    return params | (random_params(config, model, plan, batch, fresh) if fresh else {})


def inherited_statistics(config: Config, frozen: Flat, where: jax.sharding.Sharding) -> Flat:
    """The statistics that the connector was trained with, or nothing if it begins anew or under another vision target.

    What it predicts is centred by them: others would move its target.
    """
    source = config.init["connector"]
    directory, _ = split_step(source)
    if source == RANDOM or (directory / PART_FILE).is_file():
        return {}
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    record = _reader(directory).restore(step_of(source, "config.init.connector"), args=args)["record"]
    known = record["frozen"].get("vision_target", {}).get("fingerprint")
    ours = fingerprints(frozen).get("vision_target")
    return _load_statistics(source, where) if known == ours else {}


def _check_trained(config: Config, plan: Plan, fresh: list[str]) -> None:
    for path in fresh:
        if is_lora(path) and plan.tuning[path].frozen and config.init[path.split("/")[0]] != RANDOM:
            raise UserError(
                f"config.tuning freezes {path!r}, which config.init does not bring: put a line with the pattern "
                "'vlm/.*/lora_[ab]' before those that freeze, or set config.model.vlm.lora to None."
            )


def _check_inputs(config: Config, source: pathlib.Path) -> None:
    """A VLM reads the tokens and sees the images that it was trained with.

    A run keeps what makes them in a directory, a published checkpoint among its files.
    """
    for directory in (source / "tokenizer", source):
        if (directory / "tokenizer.json").is_file():
            check_same_tokenizer(config.data.tokenizer, directory)
        if processor_file(directory):
            check_processor(directory, config.model.vlm.vision)


def load_run(source: pathlib.Path) -> tuple[Config, MMCORE, Params]:
    """Loads a run for inference on the devices of this process: its config, model and (averaged) parameters.

    Args:
      source: the workdir of a finished run, or WORKDIR@STEP, a checkpoint of any.

    Raises:
      UserError: if it is not there, or one that its frozen parts came from is missing.
    """
    config = config_lib.from_json(split_step(source)[0] / "config.json")
    model = MMCORE(config.model, config.execution)
    mesh = sharding.make_mesh(config_lib.Mesh(data=-1, fsdp=1, context=1, tensor=1), jax.local_devices())
    plan = make_plan(config, model, mesh, packing.placeholder(config))
    params: Flat = {}
    for part in sorted({path.split("/")[0] for path in plan.shapes}):
        like = plan.part(part, config.execution.frozen_dtype)
        params |= load_weights(str(source), part, config.model, like, str(source))
    return config, model, join(params, Constants({}, _load_statistics(source, sharding.replicated(mesh))))


def load_weights(source: str, part: str, model: Model, like: Abstract, wanted_by: str) -> Flat:
    """Loads weights of one part, onto their shardings.

    Args:
      source: the workdir of a finished run, or WORKDIR@STEP (its EMA where kept; what it had frozen itself comes from
        where it had it from), a part that `save_part` has written, or a published checkpoint.
      part: of the model.
      model: must agree with what the source says of the part.
      like: shapes, dtypes and shardings of parameters of the part by path.
      wanted_by: for errors.

    Returns:
      all that `like` names, but for LoRA where the source has none.

    Raises:
      UserError: if there is nothing at `source` (naming the command that makes it, or the files to fetch), a run is
        unfinished, or the network there is another.
    """
    directory, step = split_step(source)
    _check_there(directory, part, wanted_by)
    if step is not None and not _is_of_run(source):
        raise UserError(f"{wanted_by} names {source}, but {directory} is no run: it has no steps.")
    if pretrained.is_published(directory):
        return _load_published(directory, part, model, _without_lora(like), wanted_by)
    if (directory / PART_FILE).is_file():
        _check_same_network(source, part, model, _read_part(directory)[1], wanted_by)
        return _restore_part(_reader(directory), 0, "params", _without_lora(like), wanted_by)
    run = _open_run(source, part, wanted_by)
    if (network := getattr(run.config.model, part, None)) is not None:
        _check_same_network(source, part, model, network, wanted_by)
    theirs = _lora_of(run.config.model, part)
    if theirs is None:
        like = _without_lora(like)
    elif theirs != (ours := _lora_of(model, part)):
        raise UserError(
            f"{wanted_by} names {source}, which has LoRA: config.model.{part}.lora is {ours} and must be {theirs}."
        )
    here = {path: leaf for path, leaf in like.items() if path in run.held}
    elsewhere = {path: leaf for path, leaf in like.items() if path not in here}
    params = _restore_part(run.manager, run.step, run.item, here, wanted_by) if here else {}
    if elsewhere:
        origin = run.config.init.get(part, RANDOM)
        if origin == RANDOM:
            missing = f"parameter {min(elsewhere)!r}" if here else f"part {part!r}"
            raise UserError(f"{source} has no {missing}, which {wanted_by} asks it for.")
        params |= load_weights(origin, part, model, elsewhere, wanted_by)
    return params


class _Run(NamedTuple):
    """A checkpoint of a run: `item`, averaged where it is kept so, holds the parameters `held`."""

    config: Config
    manager: ocp.CheckpointManager
    step: int
    item: str
    held: set[str]


def step_of(source: str | pathlib.Path, wanted_by: str) -> int:
    """The step of the checkpoint that a WORKDIR or WORKDIR@STEP names.

    Raises:
      UserError: if it is not there, or the run of a WORKDIR is unfinished.
    """
    directory, step = split_step(source)
    total = config_lib.from_json(directory / "config.json").total_steps
    saved = sorted(_reader(directory).all_steps())
    last = saved[-1] if saved else 0
    if step is None and last < total:
        other = f"name a checkpoint, such as {directory}@{last}, or " if saved else ""
        raise UserError(
            f"{directory} has reached step {last} of {total}: {other}finish it with {_command_for(directory)}"
        )
    if step is not None and step not in saved:
        there = f"there are {', '.join(map(str, saved))}" if saved else "it has none"
        raise UserError(
            f"{wanted_by} names {source}, but there is no checkpoint of step {step}; {there}. A run keeps its last "
            "config.checkpoint.keep and every config.checkpoint.keep_period steps."
        )
    return last if step is None else step


def _is_of_run(source: str | pathlib.Path) -> bool:
    directory, _ = split_step(source)
    return not pretrained.is_published(directory) and not (directory / PART_FILE).is_file()


def _open_run(source: str | pathlib.Path, part: str, wanted_by: str) -> _Run:
    directory, _ = split_step(source)
    _check_there(directory, part, wanted_by)
    step, config = step_of(source, wanted_by), config_lib.from_json(directory / "config.json")
    item = "ema" if config.optimizer.ema_decay else "params"
    held = set(_metadata(directory.absolute(), step)[item].tree)
    return _Run(config, _reader(directory), step, item, held)


def _lora_of(model: Model, part: str) -> Lora | None:
    return getattr(getattr(model, part, None), "lora", None)


def _without_lora(like: Abstract) -> Abstract:
    return {path: leaf for path, leaf in like.items() if not is_lora(path)}


def _check_there(directory: pathlib.Path, part: str, wanted_by: str) -> None:
    if any((directory / name).is_file() for name in (pretrained.PIPELINE, PART_FILE, "config.json")):
        return
    files = pretrained.files_to_fetch(directory, part)
    if files is None or _is_run(directory):
        remedy = f"make it with {_command_for(directory)}"
    else:
        remedy = f"fetch {files} and put them there."
    raise UserError(f"{wanted_by} needs the part {part!r} from {directory}, which holds no weights: {remedy}")


def _load_published(directory: pathlib.Path, part: str, model: Model, like: Abstract, wanted_by: str) -> Flat:
    published = pretrained.settled(pretrained.open_part(directory, part))
    _check_same_network(str(directory), part, model, published.config, wanted_by)
    config = pretrained.without_lora(getattr(model, part))
    params = pretrained.read(published, config, unflatten_dict(like, sep="/")[part])
    return flatten_dict({part: params}, sep="/")


def _check_same_network(source: str, part: str, model: Model, found: Any, wanted_by: str) -> None:
    different = pretrained.differences(getattr(model, part), found, f"config.model.{part}")
    if different:
        listed = ", ".join(f"{path} is {ours!r} and must be {theirs!r}" for path, ours, theirs in different)
        raise UserError(f"{wanted_by} names {source}, which has another network: {listed}.")


def _restore_part(manager: ocp.CheckpointManager, step: int, item: str, like: Abstract, wanted_by: str) -> Flat:
    available = _metadata(manager.directory.parent, step)[item].tree
    for path, expected in like.items():
        shape = tuple(available[path].shape) if path in available else None
        if shape != expected.shape:
            raise UserError(
                f"{manager.directory.parent} has {path!r} of shape {shape}, but {wanted_by} expects {expected.shape}."
            )
    restore = ocp.args.PyTreeRestore(like, ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True)
    return manager.restore(step, args=ocp.args.Composite(**{item: restore}))[item]


# --- A part by itself -------------------------------------------------------------------------------------------------


def save_part(directory: pathlib.Path, part: str, config: Any, params: Any) -> None:
    """Writes one part as a checkpoint that `config.init` can name: all of it, or nothing.

    Args:
      directory: to be made.
      part: of MMCORE.
      config: its settings, a dataclass of `config.py`.
      params: its parameter tree.

    Raises:
      UserError: if the directory is there already or cannot be written.
    """
    with pretrained.new_directory(directory) as temporary:
        record = {"part": part, "model": dataclasses.asdict(config)}
        (temporary / PART_FILE).write_text(json.dumps(record, indent=2) + "\n")
        with ocp.CheckpointManager((temporary / "checkpoints").absolute()) as manager:
            arrays = ocp.args.StandardSave(flatten_dict({part: params}, sep="/"))
            manager.save(0, args=ocp.args.Composite(params=arrays))


def load_part(source: pathlib.Path, part: str | None) -> tuple[Any, Any]:
    """Loads one part of a run (`load_run`), or what `save_part` has written, onto the first device.

    Returns:
      its settings, a dataclass of `config.py`, and its parameter tree.

    Raises:
      UserError: if there is no such part.
    """
    dtypes, (directory, _) = None, split_step(source)
    if (directory / PART_FILE).is_file():
        saved, config = _read_part(directory)
        if part not in (None, saved):
            raise UserError(f"{directory} has the part {saved!r} and not {part!r}.")
        stored = _metadata(directory.absolute(), 0)["params"].tree
        dtypes = {path.partition("/")[2]: leaf.dtype for path, leaf in stored.items()}
        part, model = saved, _model_of(saved, config)
    else:
        model = _model_with(directory, part)
        config = getattr(model, part)
    flat = load_weights(str(source), part, model, _abstract(part, config, dtypes), str(source))
    return config, unflatten_dict(flat, sep="/")[part]


def load_lora(source: pathlib.Path, part: str | None) -> tuple[Any, Any, str]:
    """Loads the LoRA of a part of a run (`load_run`), onto the first device.

    Returns:
      the part's settings, the parameter tree of the LoRA alone, and where the weights lie that it is put on.

    Raises:
      UserError: if there is none, or the run has trained other weights of the part with it.
    """
    directory, _ = split_step(source)
    model = None if pretrained.is_published(directory) else _model_with(directory, part)
    if model is None or _lora_of(model, part) is None:
        raise UserError(f"{source} has no LoRA: leave out --adapter, or name the workdir of a run that has.")
    base, config = _lora_base(source, part), getattr(model, part)
    like = {path: leaf for path, leaf in _abstract(part, config).items() if is_lora(path)}
    flat = load_weights(str(source), part, model, like, str(source))
    return config, unflatten_dict(flat, sep="/")[part], base


def _lora_base(source: pathlib.Path, part: str) -> str:
    """Follows LoRA to the weights that it is put on, which must have stayed as they were."""
    run = _open_run(source, part, str(source))
    if _lora_of(run.config.model, part) is None:
        return str(source)
    trained = [path for path in run.held if path.split("/")[0] == part and not is_lora(path)]
    if trained:
        raise UserError(
            f"{source} has trained {min(trained)!r} beside its LoRA, which an adapter does not hold: leave out "
            "--adapter, and LoRA is merged."
        )
    origin = pathlib.Path(run.config.init[part])
    return _lora_base(origin, part) if _is_of_run(origin) else str(origin)


def _model_with(workdir: pathlib.Path, part: str | None) -> Model:
    model = config_lib.from_json(workdir / "config.json").model
    held = [field.name for field in dataclasses.fields(model) if getattr(model, field.name) is not None]
    if part not in held:
        raise UserError(f"{workdir} has no part {part!r}: choose --part from {', '.join(held)}.")
    return model


def _abstract(part: str, config: Any, dtypes: dict[str, Any] | None = None) -> Abstract:
    like = pretrained.abstract_params(pretrained.family_of(config), config, dtypes=dtypes)
    return flatten_dict({part: like}, sep="/")


def _read_part(directory: pathlib.Path) -> tuple[str, Any]:
    record = json.loads((directory / PART_FILE).read_text())
    expected = typing.get_type_hints(Model)[record["part"]]
    return record["part"], config_lib.from_dict(expected, record["model"], "model", directory / PART_FILE)


def _model_of(part: str, config: Any) -> Model:
    return Model(**dict.fromkeys((field.name for field in dataclasses.fields(Model)), None) | {part: config})


# --- Reading ----------------------------------------------------------------------------------------------------------


def _reader(workdir: pathlib.Path) -> ocp.CheckpointManager:
    """Opens another run's checkpoints."""
    handlers = item_handlers(ocp.options.MultiprocessingOptions())
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), item_handlers=handlers)


@functools.lru_cache(maxsize=32)
def _metadata(workdir: pathlib.Path, step: int) -> Any:
    """What a checkpoint holds, which never changes; many parts of one are asked for in turn."""
    return _reader(workdir).item_metadata(step)


def _load_statistics(source: str | pathlib.Path, where: jax.sharding.Sharding) -> Flat:
    """The statistics of the data in a run's checkpoint."""
    workdir, step = split_step(source)[0], step_of(source, str(source))
    found = _metadata(workdir.absolute(), step)
    if "statistics" not in found.keys():  # noqa: SIM118, not a dict
        return {}
    leaves = found["statistics"].tree.items()
    wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where) for name, leaf in leaves}
    restore = ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted))
    return _reader(workdir).restore(step, args=ocp.args.Composite(statistics=restore))["statistics"]


def _is_run(directory: pathlib.Path) -> bool:
    """Whether what is missing there would be a run, by its name: STAGE-RECIPE, or anything right in `runs`."""
    return directory.parent.name == "runs" or re.fullmatch(r"stage\w*-\w+", directory.name) is not None


def _command_for(workdir: pathlib.Path) -> str:
    match = re.fullmatch(r"(\w+)-(\w+)", workdir.name)
    stage, recipe = match.groups() if match else ("STAGE", "RECIPE")
    return f"python -m mmcore_jax.train --config=configs/{stage}.py:{recipe} --workdir={workdir}"
