"""Frame embeddings: nothing at the start and for one image, and what tells the images of a document apart."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmcore_jax import config as config_lib
from mmcore_jax.bridge.conditioning import Condition
from mmcore_jax.config import Frames, Model, Pixels, UserError
from mmcore_jax.data import geometry
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.nn.masks import CLEAN, NOISED
from tests import rows, tiny
from tests.models.test_leaks import DIT, random

ROW = jax.tree.map(jnp.asarray, rows.pack(rows.INTERLEAVED, rows.DRAWING))  # images 0, 1, 2; then image 0 in slot 3
META = jax.tree.map(lambda field: np.asarray(field[0]), ROW.diffusion.latent_meta)
EXECUTION = config_lib.Execution("float32", "float32", "dense", True, "none")
TOKENS = jax.random.normal(jax.random.key(1), (*ROW.diffusion.latent_meta.kind.shape, 12))


def velocity(frames, table=None, alone=()):
    """Velocities `[T, P]` of a random network, whose frame embeddings are `table`."""
    dit = dataclasses.replace(DIT, position="sincos")
    model = MMCORE(Model(None, None, None, None, dit, Pixels("pixel"), frames), EXECUTION)
    context = jax.random.normal(jax.random.key(2), (1, ROW.diffusion.context_meta.kind.shape[1], DIT.context_width))
    condition = Condition(context, None, np.isin(np.arange(rows.BUDGETS.images), alone)[None])
    arguments = TOKENS, condition, jnp.full((1, rows.BUDGETS.images), 0.5), ROW
    shapes = jax.eval_shape(lambda key: model.init(key, *arguments, method="velocity"), jax.random.key(0))["params"]
    params = {part: random(nn.unbox(shapes)[part]) for part in ("dit",)}
    if table is not None:
        assert shapes["frames"]["embedding"].value.shape == table.shape
        params["frames"] = {"embedding": table}
    return jax.jit(lambda params: model.apply({"params": params}, *arguments, method="velocity")[0])(params)


TABLE = jax.random.normal(jax.random.key(3), (4, DIT.width))
GENERATED = META.kind == NOISED


@pytest.mark.parametrize("alone", [(), (2,)])
def test_what_they_change(alone):
    """Zero ones nothing; others all but the first image of a document, wherever in the row it stands."""
    without = velocity(None, alone=alone)
    np.testing.assert_array_equal(velocity(Frames(4), jnp.zeros_like(TABLE), alone), without)
    changed = (velocity(Frames(4), TABLE, alone) != without).any(axis=-1)
    first = np.isin(META.frame, (0, 3)) | (GENERATED & np.isin(META.frame, alone))
    used = GENERATED | (META.kind == CLEAN)
    np.testing.assert_array_equal(changed[used], ~first[used])


def test_each_is_of_one_image():
    """Image 1 has the first embedding and image 2 the second; what shows it is what the loss says of the others."""

    def loss(table, frame):
        return jnp.sum(jnp.where((GENERATED & (META.frame == frame))[:, None], velocity(Frames(4), table), 0.0))

    at_zero = jnp.zeros_like(TABLE)
    for frame, needed in ((1, [True, False, False, False]), (2, [True, True, False, False]), (3, [False] * 4)):
        gradient = jax.grad(loss)(at_zero, frame)
        np.testing.assert_array_equal((gradient != 0).any(axis=-1), needed)


def test_more_images_than_embeddings(tmp_path):
    data = tiny.write_dataset(tmp_path)
    config = tiny.config("stage2", data, "--config.model.frames={'count': 1}")
    with pytest.raises(UserError, match=r"budgets.images 3 are more than .*model.frames tells apart: make its count 2"):
        geometry.derive(config.model, config.data)
