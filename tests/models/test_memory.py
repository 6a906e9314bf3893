"""Many condition images of 1024 x 1024 pixels: what the compiler sets aside for a training step. Nothing runs."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mmcore_jax import config as config_lib
from mmcore_jax.bridge.conditioning import Condition
from mmcore_jax.config import Execution, Model, Pixels
from mmcore_jax.data.layout import Diffusion, Images, Interleaved
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.nn.masks import TokenMeta
from tests import tiny

CONFIG = config_lib.load(str(tiny.REPOSITORY / "configs/stage2.py:qwen25vl3b_sd35m"))
PATCHES, CONTEXT = (1024 // 16) ** 2, 512  # tokens of an image, and of text and visual embeddings


def temporaries(images: int, attention: str) -> int:
    """Bytes beside arguments and results of the gradient of two blocks of SD3.5-medium, one of them dual.

    A document of `images` images is one row, with a frame embedding each.
    """
    dit = dataclasses.replace(CONFIG.model.dit, depth=2, dual_layers=1, query_positions=False)
    execution = Execution("float32", "float32", attention, True, "full")
    model = MMCORE(Model(None, None, None, None, dit, Pixels("pixel"), CONFIG.model.frames), execution)

    def array(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    def meta(length: int) -> TokenMeta:
        return TokenMeta(*[array(length, dtype=jnp.int32)] * 6)

    length, number = images * PATCHES, array(images, dtype=jnp.int32)
    batch = Interleaved(
        array(), None, None, Images(None, None, None, None, number), Diffusion(meta(CONTEXT), None, meta(length), None)
    )
    condition = Condition(array(CONTEXT, dit.context_width), array(images, dit.pooled_width))
    inputs = array(length, dit.patch_size**2 * dit.latent_channels), condition, array(images), batch
    params = nn.unbox(
        jax.eval_shape(lambda *inputs: model.init(jax.random.key(0), *inputs, method="velocity"), *inputs)
    )

    def loss(params: dict, *inputs) -> jax.Array:
        return jnp.sum(jnp.square(model.apply(params, *inputs, method="velocity")))

    return jax.jit(jax.grad(loss)).lower(params, *inputs).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("attention", "growth"), [("blockwise", 2.0), ("dense", (13**2 - 7**2) / (7**2 - 4**2))])
def test_memory_is_linear_in_the_images(attention, growth):
    """From 3 to 6 and to 12 condition images: twice as many more take twice as much more. Dense: 3.6 times."""
    three, six, twelve = (temporaries(images + 1, attention) for images in (3, 6, 12))
    assert (twelve - six) / (six - three) == pytest.approx(growth, rel=0.05)
