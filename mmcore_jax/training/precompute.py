"""Features of all examples by the frozen parts of a run, before it starts: see `data/features.py`."""

import concurrent.futures
import functools
import hashlib
import itertools
from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mmcore_jax import sharding
from mmcore_jax.config import Config, UserError
from mmcore_jax.data import features, geometry, layout, packing
from mmcore_jax.data.example import BadExample
from mmcore_jax.data.features import CHUNK, PARTS
from mmcore_jax.data.layout import Features, Interleaved, Picture
from mmcore_jax.data.reader import Prepared, Reader
from mmcore_jax.mmcore import MMCORE, Forward, Params
from mmcore_jax.nn import masks
from mmcore_jax.progress import Progress
from mmcore_jax.training.checkpoint import fingerprints
from mmcore_jax.training.optimizer import Flat
from mmcore_jax.training.state import Constants, Plan, join


def weights(config: Config, plan: Plan, frozen: Flat) -> dict[str, str]:
    """What stands for the weights that make each kind of `config.data.features`.

    Raises:
      UserError: if they train, or the features cannot serve the objectives.
    """
    known = fingerprints({path: frozen[path] for path in plan.frozen}) if config.data.features else {}
    result = {}
    for kind in config.data.features:
        if kind == "conditioning" and (config.objectives.next_token or config.objectives.alignment):
            raise UserError(
                "config.data.features has 'conditioning', which leaves out the VLM, but config.objectives needs it for "
                "next_token or alignment: take one of them away."
            )
        if kind == "conditioning" and config.model.dit.clean_visual:
            raise UserError(
                "config.data.features has 'conditioning', which leaves out the VLM, but config.model.dit.clean_visual "
                "needs it: take one of them away."
            )
        for part in PARTS[kind]:
            if getattr(config.model, part) is None:
                raise UserError(f"config.data.features has {kind!r}, but config.model.{part} is None.")
            for path in plan.trainable:
                if path.startswith(f"{part}/"):
                    raise UserError(
                        f"config.data.features has {kind!r}, but config.tuning trains {path!r}, which makes it: freeze "
                        f"{part}/.*, or leave {kind!r} out."
                    )
        described = [(part, repr(getattr(config.model, part)), known.get(part)) for part in PARTS[kind]]
        text = repr((described, config.execution.compute_dtype))
        result[kind] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return result


def precompute(
    config: Config,
    model: MMCORE,
    plan: Plan,
    frozen: Flat,
    mesh: Mesh,
    progress: Progress,
    share: tuple[int, int] = (0, 1),
) -> dict[str, str]:
    """Makes those features of `config.data.features` that are not there, and returns `weights`.

    Args:
      config: of the run.
      model: its parts.
      plan: of its parameters.
      frozen: the frozen ones.
      mesh: the devices to use.
      progress: `(items, total, label)`; an item is a file.
      share: (i, n) makes every n-th file from the i-th on, for n machines that work side by side.

    Raises:
      UserError: as `weights` does, and if a file cannot be written.
    """
    made_by = weights(config, plan, frozen)
    if not made_by:
        return made_by
    reader = Reader(config)
    reader.shown = geometry.without(reader.sizes, PARTS.keys() - made_by.keys())  # decodes no more than is asked for
    make = _Maker(config, model, join({}, Constants(frozen, {})), mesh, reader)
    for number, source in enumerate(reader.sources):
        stores = [store for store in features.stores(config, reader, number, made_by) if store.missing]
        todo = sorted({chunk for store in stores for chunk in store.missing if chunk % share[1] == share[0]})
        if not todo:
            continue
        if jax.process_count() > 1:
            features.check(config, source.name, stores[0])
        kinds = [store.kind for store in stores]
        for chunk in progress(todo, len(todo), f"features of {source.name}"):
            made = make(number, range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(source))), kinds)
            for store in stores:
                store.write(chunk, made)
    return made_by


class _Look(NamedTuple):
    """A field of `Features` that follows from single images: as which part sees them, by which method."""

    picture: str
    method: str


_LOOKS = {"latents": _Look("pixels", "latents"), "targets": _Look("target", "target_embeddings")}


class _Maker:
    """Runs the frozen parts over examples of a source."""

    def __init__(self, config: Config, model: MMCORE, params: Params, mesh: Mesh, reader: Reader) -> None:
        self._config, self._params, self._mesh, self._reader = config, params, mesh, reader
        self._look = jax.jit(functools.partial(_look, model), static_argnames="method")
        self._condition = jax.jit(functools.partial(_condition, model))

    def __call__(self, number: int, indices: range, kinds: Collection[str]) -> list[list[Features] | str]:
        """The features of each image of each example, or why an example cannot be used."""

        def prepare(index: int) -> Prepared | str:
            try:
                return self._reader.prepare(number, index)
            except BadExample as bad:
                return str(bad)

        with concurrent.futures.ThreadPoolExecutor(self._config.data.threads) as threads:
            made = list(threads.map(prepare, indices))
        good = [example for example in made if isinstance(example, Prepared)]
        frames = [[{} for _ in example.images] for example in good]
        for kind in kinds:
            if kind in _LOOKS:
                self._look_at_images(kind, good, frames)
            else:
                self._read_examples(good, frames)
        features = ([Features(**fields) for fields in example] for example in frames)
        return [example if isinstance(example, str) else next(features) for example in made]

    def _look_at_images(self, kind: str, good: list[Prepared], frames: list[list[dict]]) -> None:
        """Writes what follows from each image alone; equal images are looked at once, those of a shape together."""
        wanted: dict[tuple, dict[bytes, tuple[np.ndarray, list[dict]]]] = {}
        for picture, fields in zip(_flat(example.images for example in good), _flat(frames)):
            if (image := getattr(picture, _LOOKS[kind].picture)) is not None:
                wanted.setdefault(image.shape, {}).setdefault(image.tobytes(), (image, []))[1].append(fields)
        for different in wanted.values():
            self._look_at_shape(kind, list(different.values()))

    def _look_at_shape(self, kind: str, different: list[tuple[np.ndarray, list[dict]]]) -> None:
        size = self._config.batch_size
        for first in range(0, len(different), size):
            part = different[first : first + size]
            images = np.stack([image for image, _ in part])
            images = np.pad(images, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))
            images = sharding.shard_batch(images, self._mesh)
            seen = np.asarray(self._look(self._params, images, method=_LOOKS[kind].method))
            for values, (_, places) in zip(seen, part):
                for fields in places:
                    fields[kind] = values

    def _read_examples(self, good: list[Prepared], frames: list[list[dict]]) -> None:
        """Writes the conditioning: packed examples through the VLM."""
        budgets, size = self._config.data.budgets, self._config.batch_size
        sizes = geometry.without(self._reader.sizes, ["latents", "targets"])
        taken = np.array([layout.lengths(example.content, sizes) for example in good])
        rows = packing.plan(taken, budgets, np.random.default_rng(0)) if good else []
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            packed = [
                [(good[i].content, [Picture(vlm=image.vlm) for image in good[i].images]) for i in row] for row in part
            ]
            batch = packing.assemble(packed + [[]] * (size - len(part)), first, budgets, sizes)
            text, visual = map(np.asarray, self._condition(self._params, sharding.shard_batch(batch, self._mesh)))
            context, generated = batch.diffusion.context_meta, batch.images.generated
            for b, row in enumerate(part):
                for slot, fields in enumerate(_flat(frames[i] for i in row)):
                    if generated[b, slot]:
                        is_text = (context.kind[b] == masks.TEXT) & (context.frame[b] == slot)
                        fields |= {"text": text[b, is_text], "visual": visual[b, slot]}


def _look(model: MMCORE, params: Params, images: jax.Array, method: str) -> jax.Array:
    """Features of images `[n, height, width, 3]`."""
    return model.apply({"params": params}, images[:, None], method=method)[:, 0]


def _condition(model: MMCORE, params: Params, batch: Interleaved) -> tuple[jax.Array, jax.Array]:
    forward = Forward(model, params, batch)
    return forward.text_embeddings, forward.visual_embeddings


_flat = itertools.chain.from_iterable
