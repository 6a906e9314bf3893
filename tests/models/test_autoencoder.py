"""The autoencoders' own promises: interface, tiles, memory, shardings, mistakes. Parity stands in its own file."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from mmcore_jax import config, sharding
from mmcore_jax.config import UserError
from mmcore_jax.models.autoencoder import AttentionBlock, AutoencoderKLModel, make_autoencoder, tiled
from mmcore_jax.nn import attention as attention_lib

EXECUTION = config.Execution("float32", "float32", "dense", True, "none")
TINY = config.AutoencoderKL("kl", (8, 16, 16), 1, 4, 4, True, True, 0.5, 0.1, 0)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 24, 3), np.uint8)


def tiny(c: config.AutoencoderKL = TINY):
    """A network with random parameters, made without compiling its initialisation."""
    model, rng = AutoencoderKLModel(c, EXECUTION), np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), IMAGES))
    return model, jax.tree.map(lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("c", [config.Pixels("pixel"), TINY])
def test_interface(c):
    model = make_autoencoder(c, EXECUTION)
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), IMAGES))
    latents = model.apply(variables, IMAGES, method="encode")
    side = model.config.downsampling
    chex.assert_shape(latents, (2, 3, 16 // side, 24 // side, model.config.latent_channels))
    images = model.apply(variables, latents, method="decode")
    chex.assert_shape(images, IMAGES.shape)
    chex.assert_type([latents, images], jnp.float32)
    assert images.min() >= 0
    assert images.max() <= 1


def test_samples_are_the_posterior():
    """Over many draws: the mean is what `encode` gives, the variance what the moments say, scaled."""
    model, variables = tiny()
    draw = jax.jit(jax.vmap(lambda key: model.apply(variables, IMAGES, key, method="sample")))
    samples = draw(jax.random.split(jax.random.key(1), 2000))
    mean = model.apply(variables, IMAGES, method="encode")
    signed = IMAGES.astype(np.float32) / 127.5 - 1
    spread = TINY.scaling_factor * jnp.exp(model.apply(variables, signed, method="moments")[1] / 2)
    assert float(jnp.abs((samples.mean(0) - mean) / spread).max()) < 0.15
    np.testing.assert_allclose(samples.std(0), spread, rtol=0.1)


@pytest.mark.parametrize(("tile", "height", "width"), [(4, 15, 4), (8, 13, 21), (16, 5, 40)])
def test_tiles_of_a_local_map_join_without_a_seam(tile, height, width):
    """A map that looks at one position alone gives the same in tiles, up and down in size."""
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    large = np.repeat(np.repeat(x, 2, 1), 2, 2)

    def double(tiles):
        return jnp.repeat(jnp.repeat(tiles, 2, axis=-3), 2, axis=-2)

    chex.assert_trees_all_close(tiled(double, x, tile, 1, 2), large, atol=1e-6, rtol=0)
    chex.assert_trees_all_close(tiled(lambda tiles: tiles[..., ::2, ::2, :], large, tile, 2, 1), x, atol=1e-6, rtol=0)


def test_tiles_are_looped_over():
    """Nothing is as large as the features of the whole image: 256 x 256 x 16."""
    whole, variables = tiny(dataclasses.replace(TINY, mid_attention=False))
    parts = AutoencoderKLModel(dataclasses.replace(whole.config, tile=16), EXECUTION)
    latents = jnp.zeros((1, 64, 64, 4))
    sizes = [largest_array(lambda x, m=m: m.apply(variables, x, method="decode"), latents) for m in (whole, parts)]
    assert sizes[0] == 256 * 256 * 16
    assert sizes[1] < sizes[0] / 2


def test_images_of_a_row_are_encoded_in_turn():
    """The result is that of all at once; no features are larger than the images themselves."""
    model, variables = tiny()

    def encode(images):
        return model.apply(variables, images, method="encode")

    flat = IMAGES.reshape(-1, *IMAGES.shape[2:])
    chex.assert_trees_all_close(encode(IMAGES).reshape(encode(flat).shape), encode(flat), atol=1e-5)
    assert largest_array(encode, IMAGES) == IMAGES.size < largest_array(encode, flat)


def test_blockwise_attention_is_linear_in_memory():
    x, length, sizes = jnp.zeros((1, 64, 64, 8)), 64 * 64, {}
    for attention in ("dense", "blockwise"):
        block = AttentionBlock(4, dataclasses.replace(EXECUTION, attention=attention))
        variables = nn.unbox(block.init(jax.random.key(0), x))
        sizes[attention] = largest_array(block.apply, variables, x)
    assert sizes == {"dense": length**2, "blockwise": attention_lib.BLOCK * length}


def largest_array(function, *inputs) -> int:
    """How many values the largest array of the traced program holds; the compiler's own count leaves fusions out."""

    def sizes(program: jax.extend.core.Jaxpr):
        for equation in program.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    return max(sizes(jax.make_jaxpr(function)(*inputs).jaxpr))


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_large_kernels_are_sharded(axis):
    """At the published size no large kernel stays whole, on a mesh of either kind."""
    c = dataclasses.replace(TINY, block_channels=(128, 256, 512, 512), layers_per_block=2, norm_groups=32)
    boxed = jax.eval_shape(AutoencoderKLModel(c, EXECUTION).init, jax.random.key(0), IMAGES)["params"]
    sizes = tuple(4 if name == axis else 1 for name in sharding.AXES)
    shardings = sharding.parameter_shardings(boxed, AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 4))
    assert axis in shardings["decoder"]["mid"]["resnet_0"]["conv_1"]["kernel"].spec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_groups": 3}, "norm_groups 3 must divide all of block_channels, and does not 8"),
        ({"tile": 6}, "tile 6 must be a multiple of 4"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(UserError, match=words):
        jax.eval_shape(lambda: tiny(dataclasses.replace(TINY, **changes))[1])


def test_an_image_of_a_wrong_size():
    model, variables = tiny()
    with pytest.raises(UserError, match="15 x 24 pixels need sides that are multiples of 4"):
        model.apply(variables, IMAGES[..., :15, :, :], method="encode")
