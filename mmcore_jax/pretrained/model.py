"""Published checkpoints as networks of ours, and the other way.

    model = pretrained.load("Qwen2.5-VL-3B-Instruct", mesh, dtype="bfloat16")
    logits = model(input_ids=..., attention_mask=..., pixel_values=..., image_grid_thw=...)
    pretrained.export(model.params, model.config, "exported")

A family is a file of this package and a line in `FAMILIES`.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, SingleDeviceSharding

from mmcore_jax import sharding
from mmcore_jax.config import Execution, UserError
from mmcore_jax.pretrained import autoencoder_kl, files, mmdit, qwen_vl, siglip, table
from mmcore_jax.pretrained.family import Family
from mmcore_jax.pretrained.lora import merge, write_config
from mmcore_jax.progress import progress

FAMILIES = (qwen_vl.FAMILY, siglip.FAMILY, mmdit.FAMILY, autoencoder_kl.FAMILY)
EXECUTION = Execution("float32", "float32", "blockwise", scan_layers=True, remat="none")
PIPELINE = "model_index.json"

# A stored buffer may have been rounded to half precision.
BUFFER_TOLERANCE = 2.0**-8


@dataclasses.dataclass(frozen=True)
class Published:
    """A published checkpoint that has been recognised and not yet read."""

    directory: pathlib.Path
    family: Family
    settings: files.Settings
    config: Any


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network with its weights: called with the named arrays of the original's `forward`, it gives the same."""

    family: Family
    settings: files.Settings
    config: Any
    params: Any
    execution: Execution

    def __call__(self, **arrays: Any) -> jax.Array:
        """NumPy or JAX arrays in, a JAX array out, axes in the order of the original."""
        return self.family.forward(self._model, self.params, self.settings, **arrays)

    def encode(self, x: Any) -> tuple[jax.Array, jax.Array]:
        """Of an autoencoder: images `[B, 3, H, W]` in [-1, 1] to mean and log-variance of latents `[B, C, h, w]`."""
        return self._of_autoencoder("encode")(self._model, self.params, jnp.asarray(x))

    def decode(self, z: Any) -> jax.Array:
        """Of an autoencoder: latents `[B, C, h, w]`, neither shifted nor scaled, to images `[B, 3, H, W]`."""
        return self._of_autoencoder("decode")(self._model, self.params, jnp.asarray(z))

    @property
    def _model(self) -> nn.Module:
        return self.family.model(self.config, self.execution)

    def _of_autoencoder(self, method: str) -> Callable[..., Any]:
        found = getattr(self.family, method)
        if found is None:
            raise UserError(f"{self.settings.file.parent} is {self.family.name}, which is no autoencoder.")
        return found


# --- In ---------------------------------------------------------------------------------------------------------------


def load(
    directory: str | pathlib.Path,
    mesh: Mesh | None = None,
    dtype: Any = None,
    execution: Execution = EXECUTION,
    component: str | None = None,
) -> Pretrained:
    """Loads a published checkpoint, parameter by parameter, onto the devices that hold them.

    Args:
      directory: holds config.json and safetensors, or is a pipeline of diffusers.
      mesh: to shard over by the rules of `sharding.py`; None is the first device alone.
      dtype: of the parameters; None keeps what is stored.
      execution: how the network runs.
      component: of a pipeline: "transformer", "vae".

    Raises:
      UserError: naming the file, and the tensor, that is missing, damaged or not what config.json says.
    """
    published = settled(open_published(directory, component))
    family, config = published.family, published.config
    tensors, entries = open_tensors(published, config), family.entries(config)
    dtypes = dict.fromkeys(table.paths(entries), dtype) if dtype else table.stored_dtypes(entries, tensors)
    like = abstract_params(family, config, execution, mesh, dtypes)
    params = table.load(entries, tensors, like, tensors.where)
    return Pretrained(family, published.settings, config, params, execution)


def is_published(directory: str | pathlib.Path) -> bool:
    """Whether a directory holds a published checkpoint, or a pipeline of them, rather than a run of ours."""
    directory = pathlib.Path(directory)
    if (directory / PIPELINE).is_file():
        return True
    file = directory / "config.json"
    return file.is_file() and _kind(files.read_json(file)) is not None


def open_published(directory: str | pathlib.Path, component: str | None = None) -> Published:
    """Recognises the family of a published checkpoint by its config.json.

    Raises:
      UserError: if it is missing, of no family that we have, or a pipeline of which no component was chosen.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UserError(
            f"{directory} is no directory: fetch config.json and the *.safetensors files, and put them there."
        )
    if (directory / PIPELINE).is_file():
        directory = _component(directory, component)
    elif component is not None:
        raise UserError(f"{directory} is no pipeline (it has no {PIPELINE}): leave out the component {component!r}.")
    settings = files.read_json(directory / "config.json")
    kind = _kind(settings)
    family = next((family for family in FAMILIES if kind in family.kinds), None)
    if family is None:
        known = ", ".join(kind for family in FAMILIES for kind in family.kinds)
        raise UserError(f"{settings.file} describes {kind!r}, which is none of {known}.")
    return Published(directory, family, settings, family.read_config(settings))


def _kind(settings: files.Settings) -> str | None:
    named = settings.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return settings.get("model_type") or settings.get("_class_name") or first


def _component(directory: pathlib.Path, component: str | None) -> pathlib.Path:
    index = files.read_json(directory / PIPELINE)
    kinds = {kind for family in FAMILIES for kind in family.kinds}
    known = [name for name, value in index.items() if isinstance(value, list) and kinds.intersection(map(str, value))]
    if component not in known:
        wanted = "is a pipeline" if component is None else f"has no component {component!r} of a family that we have"
        raise UserError(f"{directory} {wanted}: choose from {', '.join(known) or 'another checkpoint'}.")
    return directory / component


def open_part(directory: str | pathlib.Path, part: str) -> Published:
    """Recognises a published checkpoint, or the component of a pipeline, that is to be a part of MMCORE.

    Raises:
      UserError: as `open_published`, and if it is of a family that cannot be this part.
    """
    components = {family.part: family.component for family in FAMILIES}
    is_pipeline = (pathlib.Path(directory) / PIPELINE).is_file()
    published = open_published(directory, components.get(part) if is_pipeline else None)
    if published.family.part != part:
        raise UserError(f"{directory} is of the family {published.family.name}, which cannot be the part {part!r}.")
    return published


def settled(published: Published) -> Published:
    """With what config.json leaves open, as the tensors of the checkpoint have it."""
    stored = files.open_tensors(published.directory, published.family.stem)
    return dataclasses.replace(published, config=published.family.settle(published.config, stored))


def files_to_fetch(directory: pathlib.Path, part: str) -> str | None:
    """What of a published checkpoint must lie in `directory` to be a part of MMCORE; None for a part of no family."""
    family = next((family for family in FAMILIES if family.part == part), None)
    if family is None:
        return None
    # diffusers publishes pipelines, of which a component may also stand alone.
    inside = "" if family.stem == "model" or directory.name == family.component else f"{family.component}/"
    names = [f"{inside}config.json", f"{inside}{family.stem}*.safetensors", *family.beside]
    names = [PIPELINE, *names] if inside else names
    return f"{', '.join(names)} (and {inside}{family.stem}.safetensors.index.json, if in shards) of {family.name}"


def abstract_params(
    family: Family,
    config: Any,
    execution: Execution = EXECUTION,
    mesh: Mesh | None = None,
    dtypes: Mapping[str, Any] | None = None,
) -> Any:
    """Shapes, and the shardings on a mesh, of the parameters of a network: a tree of `jax.ShapeDtypeStruct`.

    Args:
      family: of the network.
      config: our dataclass.
      execution: how the network runs.
      mesh: None is the first device alone.
      dtypes: by path; None is float32.
    """
    model = family.model(config, execution)
    boxed = jax.eval_shape(functools.partial(family.init, model), jax.random.key(0))["params"]
    flat = flatten_dict(nn.unbox(boxed), sep="/")
    if mesh is None:
        shardings = dict.fromkeys(flat, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        shardings = flatten_dict(sharding.parameter_shardings(boxed, mesh), sep="/")
    placed = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtypes[path] if dtypes else leaf.dtype, sharding=shardings[path])
        for path, leaf in flat.items()
    }
    return unflatten_dict(placed, sep="/")


def read(published: Published, config: Any, like: Any) -> Any:
    """Reads parameters that a network of `config` has, in the shapes, dtypes and shardings of `like`.

    Args:
      published: the checkpoint; tensors of a part that `config` sets to None stay unread.
      config: agrees with that of the checkpoint, see `differences`.
      like: tree of `jax.ShapeDtypeStruct`, of all parameters or of some.
    """
    family, tensors = published.family, open_tensors(published, config)
    entries, whole = family.entries(config), abstract_params(family, config)
    table.check(entries, tensors, flatten_dict(whole, sep="/"), tensors.where)
    return table.read(entries, tensors, like)


def open_tensors(published: Published, config: Any) -> files.Tensors:
    """The tensors by the names of the key table, without those that a network of `config` does not read."""
    family = published.family
    stored, buffers = files.open_tensors(published.directory, family.stem), family.buffers(config)
    for name, value in buffers.items():
        _check_buffer(stored, name, value)
    renamed = {name: family.rename(config, name) for name in stored}
    return stored.renamed({name: new for name, new in renamed.items() if new is not None and new not in buffers})


def _check_buffer(stored: files.Tensors, name: str, value: np.ndarray) -> None:
    if name not in stored:
        return
    if stored[name].shape != value.shape or np.abs(stored[name].astype(np.float32) - value).max() > BUFFER_TOLERANCE:
        raise UserError(f"the tensor {stored.where(name)} is not what config.json makes it: fetch both again.")


class Difference(NamedTuple):
    """A setting that two configs do not share."""

    path: str
    ours: Any
    theirs: Any


def differences(ours: Any, theirs: Any, path: str) -> list[Difference]:
    """The settings of the weights in which two configs differ; what ours sets to None, it does without."""
    if ours is None or ours == theirs:
        return []
    if not dataclasses.is_dataclass(ours) or not isinstance(theirs, type(ours)):
        return [Difference(path, ours, theirs)]
    names = [field.name for field in dataclasses.fields(ours) if field.metadata.get("of_weights", True)]
    return [
        found for name in names for found in differences(getattr(ours, name), getattr(theirs, name), f"{path}.{name}")
    ]


# --- Out --------------------------------------------------------------------------------------------------------------


def export(
    params: Any,
    config: Any,
    directory: str | pathlib.Path,
    dtype: Any = None,
    shard_bytes: int = files.SHARD_BYTES,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that the original's `from_pretrained` opens: all of it, or nothing. LoRA is merged.

    Args:
      params: of the network, as `load` gives them.
      config: our dataclass; its type says which family.
      directory: to be made.
      dtype: of the tensors; None keeps that of each parameter.
      shard_bytes: at most so many in a file, unless one tensor has more.
      settings: of config.json that do not follow from `config`, such as the ids of special tokens.

    Raises:
      UserError: if the original has no such network, or the directory cannot be written.
    """
    family, (config, params) = family_of(config), merge(config, params)
    stored = np.result_type(*(leaf.dtype for leaf in jax.tree.leaves(params)))
    settings = family.write_config(config, str(np.dtype(dtype or stored))) | dict(settings or {})
    directory = pathlib.Path(directory)
    buffers = family.buffers(config)
    back = family.settle(family.read_config(_as_read(settings, directory / "config.json")), buffers)
    for path, ours, theirs in differences(config, back, family.part):
        raise UserError(f"{path} is {ours!r}, and {family.name} has {theirs!r} only: {directory} is not written.")
    entries = family.entries(config)
    specs = [*_specs(entries, params, dtype)]
    specs += [files.Spec(name, np.dtype(dtype or stored), value.shape) for name, value in buffers.items()]
    arrays = itertools.chain(_arrays(entries, params), buffers.values())
    with files.new_directory(directory) as temporary:
        files.write_json(temporary / "config.json", settings)
        files.write_tensors(temporary, family.stem, specs, progress(arrays, len(specs), "writing tensors"), shard_bytes)


def export_adapter(
    params: Any, config: Any, directory: str | pathlib.Path, base: str | pathlib.Path, dtype: Any = None
) -> None:
    """Writes the LoRA of a network by itself, as PEFT's `from_pretrained` opens it: all of it, or nothing.

    Args:
      params: of the network.
      config: our dataclass.
      directory: to be made.
      base: where the published form of the network without LoRA lies.
      dtype: of the tensors; None keeps that of each parameter.

    Raises:
      UserError: if the network has no LoRA, or the directory cannot be written.
    """
    if getattr(config, "lora", None) is None:
        raise UserError(f"{family_of(config).name} has no LoRA here: {directory} is not written.")
    entries = family_of(config).lora_entries(config)
    with files.new_directory(pathlib.Path(directory)) as temporary:
        settings = write_config(config, family_of(config).lora_modules(config), str(base))
        files.write_json(temporary / "adapter_config.json", settings)
        specs, arrays = list(_specs(entries, params, dtype)), _arrays(entries, params)
        files.write_tensors(temporary, "adapter_model", specs, arrays, files.SHARD_BYTES)


def family_of(config: Any) -> Family:
    """The family of a dataclass of `config.py`."""
    for family in FAMILIES:
        if isinstance(config, family.config):
            return family
    raise UserError(f"{type(config).__name__} is of no published family, so it has no published form.")


def _as_read(settings: dict, file: pathlib.Path) -> files.Settings:
    return files.Settings(
        {key: _as_read(value, file) if isinstance(value, dict) else value for key, value in settings.items()}, file
    )


def _specs(entries: list[table.Entry], params: Any, dtype: Any) -> Iterator[files.Spec]:
    ours = flatten_dict(params, sep="/")
    for entry in entries:
        shape = table.exported_shape(entry, ours)
        for name in entry.names:
            yield files.Spec(name, np.dtype(dtype or ours[entry.ours[0]].dtype), shape)


def _arrays(entries: list[table.Entry], params: Any) -> Iterator[np.ndarray]:
    return (array for _, array in table.export(entries, params))
