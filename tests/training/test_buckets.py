"""Images of several shapes in training: encoded before the step, or kept as latents and packed beside each other."""

import dataclasses
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from mmcore_jax.bridge.conditioning import Drop
from mmcore_jax.config import Budgets, UserError
from mmcore_jax.data import example as example_lib
from mmcore_jax.data import features, geometry, layout, packing
from mmcore_jax.data.layout import Features
from mmcore_jax.data.pipeline import Batches
from mmcore_jax.data.reader import Reader
from mmcore_jax.mmcore import Forward
from mmcore_jax.nn.masks import NOISED
from mmcore_jax.training.state import Constants, create_state
from mmcore_jax.training.step import make_encode, make_step
from tests import tiny
from tests.training.test_precompute import Setting

RATIOS = ("--config.data.aspect_ratios=(1.0,2.0,0.5)", "--config.model.dit.position_grid=8")
SHAPES = [(16, 16), (16, 32), (32, 16)]  # height and width of images


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The tiny dataset; in its examples, the images have one shape after the other."""
    directory = tiny.write_dataset(tmp_path_factory.mktemp("buckets") / "data")
    for task, items in tiny.examples().items():
        writer = ArrayRecordWriter(str(directory / f"{task}-train-00000-of-00001.array_record"), "group_size:1")
        for number, item in enumerate(items):
            writer.write(example_lib.encode(reshaped(item, SHAPES[number % 3])))
        writer.close()
    return directory


def reshaped(item, size):
    segments = []
    for segment in item["segments"]:
        if segment["type"] == "image":
            file = io.BytesIO()
            Image.open(io.BytesIO(segment["image"])).resize(size[::-1]).save(file, "PNG")
            segment = {**segment, "image": file.getvalue()}
        segments.append(segment)
    return {**item, "segments": segments}


def test_latents_are_made_before_the_step_or_kept(data):
    """The same losses in every bucket, by a step that is compiled once."""
    online, kept = (Setting("stage2", data, kinds, *RATIOS) for kinds in ((), ("latents",)))
    reader, batches = Reader(kept.config, kept.precompute()), Batches(online.config)
    encode, constants = make_encode(online.config, online.model, online.plan), Constants(online.frozen, {})
    state = create_state(online.config, online.plan, online.mesh, online.params)
    step = jax.jit(make_step(online.config, online.model, online.plan))
    first = {}  # the first batch of each bucket
    for number in range(12):
        first.setdefault(batches[number].arrays.images.pixels.shape[2:4], number)
    assert set(first) == {(16, 16), (12, 20), (20, 12)}

    def loss(batch):
        return float(step(state, constants, jax.tree.map(jnp.asarray, batch))[1]["loss"])

    found = {number: loss(encode(constants, batches[number].arrays)) for number in first.values()}
    assert step._cache_size() == 1
    assert len({round(value, 4) for value in found.values()}) == 3
    for number, value in found.items():
        rows = [batches._planner.row(number * 8 + row) for row in range(8)]
        packed = [[(one.content, one.images) for one in (reader.prepare(*draw) for draw in row)] for row in rows]
        given = features.empty(8, kept.config, reader.sizes, ("latents",))
        batch = packing.assemble(packed, 0, kept.config.data.budgets, reader.shown, given)
        assert batch.images.pixels.size == 0
        batch = batch._replace(images=batch.images._replace(pixels=None))
        assert loss(batch) == pytest.approx(value, rel=1e-5)


def test_kept_latents_mix_the_buckets(data):
    """There are rows that hold images of several shapes."""
    kept = Setting("stage2", data, ("latents",), *RATIOS)
    meta = kept.batches()[0].arrays.diffusion.latent_meta
    drawn = [frames[kinds == NOISED] for kinds, frames in zip(meta.kind, meta.frame)]
    assert {15, 16} in [set(np.unique(frames, return_counts=True)[1].tolist()) for frames in drawn]


def test_an_autoencoder_that_trains_needs_one_bucket(data):
    setting = Setting("stage2", data, (), *RATIOS)
    plan = setting.plan._replace(tuning={**setting.plan.tuning, "autoencoder/x": setting.plan.tuning["dit/out/bias"]})
    with pytest.raises(UserError, match=r"trains 'autoencoder/x', but images of several config.data.aspect_ratios"):
        make_encode(setting.config, setting.model, plan)
    config = dataclasses.replace(
        setting.config, data=dataclasses.replace(setting.config.data, aspect_ratios=(1.0, 1.01))
    )
    assert make_encode(config, setting.model, plan) is None  # both are squares


def test_an_image_beside_others_is_drawn_as_if_alone(data):
    """Three documents of three shapes in a row, and each in a row of its own, of no more capacity than it needs."""
    setting, rng = Setting("stage2", data, (), *RATIOS), np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(setting.model.init, jax.random.key(0), packing.placeholder(setting.config)))
    params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes["params"])
    sizes = geometry.without(geometry.derive(setting.config.model, setting.config.data), ["latents"])
    reader, tasks = Reader(setting.config), tiny.examples()
    documents = [
        reshaped(tasks["text_to_image"][0], SHAPES[1]),
        reshaped(tasks["edit_tone"][1], SHAPES[2]),
        reshaped(tasks["caption"][2], SHAPES[1]),
        reshaped(tasks["text_to_image"][3], SHAPES[0]),
    ]
    items = [layout.make_item(document, reader._chat, sizes) for document in documents]
    assert [item.frames[0].shape for item in items] == [(3, 5), (5, 3), None, (4, 4)]
    rows = []
    for item in items:
        latents = [rng.normal(size=(15 + (frame.shape == (4, 4)), 48)).astype(np.float32) for frame in item.frames]
        pictures = [layout.picture(frame, sizes) for frame in item.frames]
        given = [picture._replace(features=Features(values)) for picture, values in zip(pictures, latents)]
        rows.append((item, given if item.frames[0].shape else pictures))

    @jax.jit
    def velocity(params, batch):
        forward = Forward(setting.model, params, batch)
        nothing = jnp.zeros(batch.images.generated.shape, bool)
        states = forward.text_embeddings, forward.visual_embeddings
        condition = forward.model.condition(*states, batch, Drop(nothing, nothing))
        tokens = forward.model.latent_tokens(forward.latents, 0.5 * forward.latents + 0.2, batch)
        return forward.model.velocity(tokens, condition, 0.6 * jnp.ones(nothing.shape), batch)

    def drawn(row, sizes):
        """The velocities of the noised tokens of a row, in their order."""
        budgets = np.sum([layout.lengths(item, sizes) for item, _ in row], axis=0)
        given = Features(np.zeros((1, budgets[-1], sizes.latent_capacity, 48), np.float32))
        batch = packing.assemble([row], 0, Budgets(*map(int, budgets)), sizes, given)
        meta = batch.diffusion.latent_meta
        return np.asarray(velocity(params, batch))[0, meta.kind[0] == NOISED]

    together = drawn(rows, sizes)
    alone = []
    for item, pictures in rows:
        if shape := item.frames[0].shape:
            own = dataclasses.replace(sizes, buckets=(shape,), latent_capacity=shape[0] * shape[1])
            alone.append(drawn([(item, pictures)], own))
    assert [len(part) for part in alone] == [15, 15, 16]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-5)
    assert together.std() > 0.1
