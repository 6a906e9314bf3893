"""The real step of a run, compiled ahead of time for devices that need not be there."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from mmcore_jax import sharding
from mmcore_jax.config import Config, UserError
from mmcore_jax.data import features, geometry, packing
from mmcore_jax.data.layout import Interleaved, Pairs
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.nn.masks import IMAGE, NOISED, TEXT, VISUAL, TokenMeta
from mmcore_jax.training.compilation import compiled_step
from mmcore_jax.training.state import Constants, Plan, State, abstract_state, make_plan
from mmcore_jax.training.step import make_step

LOCAL = "local"


class Program(NamedTuple):
    """The step that `train` runs, and what it is called with: shapes, types and where each lies."""

    mesh: Mesh
    plan: Plan
    step: Any
    arguments: tuple[State, Constants, Any]

    def compile(self) -> Any:
        """Compiles; raises `jax.errors.JaxRuntimeError` where the memory of a device is too small."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(*self.arguments).compile()


def devices(topology: str, slices: int = 1) -> list:
    """The devices of "local", or of a TPU topology such as "v5e:16x16", of which there may be several slices.

    Raises:
      UserError: if the compiler for TPUs does not know the topology.
    """
    if topology == LOCAL:
        return jax.devices()
    try:
        return topologies.get_topology_desc(topology, platform="tpu", num_slices=slices).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--topology={topology} is none that the compiler for TPUs knows: {reason}.") from error


def program(config: Config, devices: list) -> Program:
    """The step of a run on these devices, without making a single array.

    Raises:
      UserError: if the mesh or the batch does not fit the devices.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch(config.batch_size, config.optimizer.accumulation, mesh)
    model = MMCORE(config.model, config.execution)
    with jax.set_mesh(mesh):
        plan = make_plan(config, model, mesh, _batch(packing.placeholder(config), config.batch_size, mesh))
        state, constants = abstract_state(config, plan, mesh), _constants(config, plan, mesh)
    row = empty_row(config)
    if geometry.one_bucket(config):  # `make_encode` has put latents in the place of pixels
        latents = features.empty(1, config, geometry.derive(config.model, config.data), ["latents"]).latents
        row = row._replace(images=row.images._replace(pixels=None), features=row.features._replace(latents=latents))
    batch = _batch(row, config.batch_size, mesh)
    return Program(mesh, plan, compiled_step(make_step(config, model, plan), mesh), (state, constants, batch))


def empty_row(config: Config) -> Interleaved | Pairs:
    """One row of nothing but padding, in the shapes in which batches come, features of `config.data` included."""
    data = config.data
    if not data.features:
        return packing.placeholder(config)
    sizes = geometry.derive(config.model, data)
    given = features.empty(1, config, sizes, data.features)
    return packing.empty(1, data.budgets, geometry.without(sizes, data.features))._replace(features=given)


def full_row(config: Config) -> Interleaved | Pairs:
    """One row that fills its budgets with examples of a text and a generated image each, to count useful work by.

    What the VLM reads beside text and queries are images of the largest size. Only metadata is filled in.
    """
    row = empty_row(config)
    if isinstance(row, Pairs):
        return row._replace(valid=np.ones_like(row.valid))
    images, budgets, model = row.images, config.data.budgets, config.model
    rows, cols = geometry.derive(model, config.data).buckets[0] if model.dit else (0, 0)
    latents = rows * cols
    frames = min(budgets.images, budgets.latent_tokens // latents) if latents else budgets.images
    patch = model.vlm.vision.patch_size
    seen, side = config.data.vlm_pixels[1] // patch**2, math.isqrt(config.data.vlm_pixels[1]) // patch
    queries = frames * images.queries.shape[-1]
    kinds = np.full(budgets.vlm_tokens, TEXT)
    kinds[: row.patches.meta.kind.shape[1] // model.vlm.vision.merge_size**2] = IMAGE
    learned = bool(config.objectives.next_token and config.objectives.next_token.user_text)
    targets = learned * np.where(np.arange(kinds.size) < kinds.size - queries, kinds == TEXT, False) - 1
    number = np.arange(budgets.context_tokens) * frames // budgets.context_tokens
    place = np.arange(number.size) - np.searchsorted(number, number)
    context = np.where(place < images.queries.shape[-1], VISUAL, TEXT)
    return row._replace(
        tokens=row.tokens._replace(meta=_shared(row.tokens.meta, kinds, frames), targets=targets[None]),
        patches=row.patches._replace(meta=_tiled(row.patches.meta, IMAGE, seen, side)),
        images=images._replace(generated=np.arange(budgets.images)[None] < frames),
        diffusion=row.diffusion._replace(
            context_meta=_shared(row.diffusion.context_meta, context, frames),
            latent_meta=_tiled(row.diffusion.latent_meta, NOISED, latents, cols)
            if latents
            else row.diffusion.latent_meta,
        ),
    )


def _shared(meta: TokenMeta, kinds: np.ndarray, frames: int) -> TokenMeta:
    """Tokens `[1, L]` that `frames` documents of one frame, one after the other, share evenly."""
    number = (np.arange(kinds.size) * frames // kinds.size)[None].astype(np.int32)
    return meta._replace(document=number, frame=number, kind=kinds[None].astype(np.int32))


def _tiled(meta: TokenMeta, kind: int, size: int, side: int) -> TokenMeta:
    """Tokens `[1, L]` of images of `size` tokens, `side` in a row, one after the other and each a document."""
    number, place = np.divmod(np.arange(meta.kind.shape[1], dtype=np.int32)[None], size)
    kinds = np.full_like(number, kind)
    return meta._replace(document=number, frame=number, kind=kinds, row=place // side, col=place % side)


def _constants(config: Config, plan: Plan, mesh: Mesh) -> Constants:
    dtype = jnp.dtype(config.execution.frozen_dtype)
    frozen = {
        path: jax.ShapeDtypeStruct(plan.shapes[path].shape, dtype, sharding=plan.shardings[path])
        for path in plan.frozen
    }
    if not config.objectives.alignment:
        return Constants(frozen, {})
    shape = (config.model.queries.grid**2, config.model.vision_target.vision.width)
    return Constants(
        frozen, {"target_mean": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.replicated(mesh))}
    )


def _batch(row: Any, rows: int, mesh: Mesh) -> Any:
    where = NamedSharding(mesh, sharding.spec("batch"))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=where), row)
