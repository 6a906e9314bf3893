"""AutoencoderKL equals diffusers' on small random weights, through the key table."""

import dataclasses
import functools
import math

import chex
import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mmcore_jax import config
from mmcore_jax.models.autoencoder import AutoencoderKLModel
from mmcore_jax.nn import attention as attention_lib
from mmcore_jax.pretrained import autoencoder_kl as keys
from mmcore_jax.pretrained import table as key_table
from tests.reference import randomise, state_of

TOLERANCE = 1e-4
# The peer's own error in bfloat16, times this, bounds ours.
BFLOAT16_MARGIN = 1.5
PUBLISHED_SD3 = config.AutoencoderKL(
    kind="kl",
    block_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    norm_groups=32,
    quant_convs=False,
    mid_attention=True,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    tile=0,
)
_SD3 = dataclasses.replace(PUBLISHED_SD3, block_channels=(8, 16, 32, 32), norm_groups=4)
_SD1 = config.AutoencoderKL("kl", (16, 32), 2, 4, 8, True, True, 0.18215, 0.0, 0)
# Name: (config, images of this height and width).
CASES = {
    "sd3": (_SD3, (40, 24)),
    "sd1": (_SD1, (24, 40)),
    "odd widths": (dataclasses.replace(_SD3, block_channels=(24, 48, 40), layers_per_block=1, norm_groups=8), (20, 12)),
    "flux": (
        dataclasses.replace(_SD3, block_channels=(16, 16, 8, 24), scaling_factor=0.3611, shift_factor=0.1159),
        (56, 40),
    ),
    "no attention": (dataclasses.replace(_SD1, mid_attention=False), (12, 16)),
}


def peer(c: config.AutoencoderKL) -> diffusers.AutoencoderKL:
    """The published implementation."""
    levels = len(c.block_channels)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=c.block_channels,
        layers_per_block=c.layers_per_block,
        latent_channels=c.latent_channels,
        norm_num_groups=c.norm_groups,
        use_quant_conv=c.quant_convs,
        use_post_quant_conv=c.quant_convs,
        mid_block_add_attention=c.mid_attention,
        scaling_factor=c.scaling_factor,
        shift_factor=c.shift_factor,
    )


@functools.cache
def published(name: str):
    """The published implementation with every parameter random, and its state."""
    model = randomise(peer(CASES[name][0]), scale=None).requires_grad_(False)
    return model, state_of(model)


def ours(name: str, dtype: str = "float32", attention: str = "dense", **changes):
    """Our network and its parameters, from the published state."""
    c, size = CASES[name]
    model = AutoencoderKLModel(
        dataclasses.replace(c, **changes), config.Execution(dtype, "float32", attention, True, "none")
    )
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.uint8)
    like = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), image)["params"])
    return model, key_table.load(keys.entries(c), published(name)[1], like)


def run(model: AutoencoderKLModel, params, method: str, x: np.ndarray):
    return jax.jit(lambda params, x: model.apply({"params": params}, x, method=method))(params, x)


def draw(name: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Images in [-1, 1] `[2, height, width, 3]`, and latents that would fit them."""
    rng, c = np.random.default_rng(height), CASES[name][0]
    small = (height // c.downsampling, width // c.downsampling)
    images = rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    return images, rng.normal(size=(2, *small, c.latent_channels)).astype(np.float32)


def theirs(model: diffusers.AutoencoderKL, images: np.ndarray, latents: np.ndarray) -> dict[str, np.ndarray]:
    """Moments of images, and images of latents, by the published implementation in its dtype."""

    def channels_first(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(model.dtype)

    def channels_last(x: torch.Tensor) -> np.ndarray:
        return x.float().numpy().transpose(0, 2, 3, 1)

    posterior = model.encode(channels_first(images)).latent_dist
    found = {"mean": posterior.mean, "log_variance": posterior.logvar}
    found["images"] = model.decode(channels_first(latents)).sample
    return {part: channels_last(x) for part, x in found.items()}


def compare(model, params, images: np.ndarray, latents: np.ndarray, expected: dict) -> dict[str, float]:
    """Largest differences by part, of shapes that are checked."""
    mean, log_variance = run(model, params, "moments", images)
    found = {"mean": mean, "log_variance": log_variance, "images": run(model, params, "reconstruct", latents)}
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    return {part: float(np.abs(found[part] - expected[part]).max()) for part in expected}


@pytest.mark.parametrize(("name", "attention"), [*((name, "dense") for name in CASES), ("flux", "blockwise")])
def test_moments_and_images(name, attention, monkeypatch, record_property):
    monkeypatch.setattr(attention_lib, "BLOCK", 8)
    expected = theirs(published(name)[0], *draw(name, *CASES[name][1]))
    found = compare(*ours(name, attention=attention), *draw(name, *CASES[name][1]), expected)
    record_property("max_difference", found)
    assert all(0.3 < expected[part].std() < 3 for part in expected), {part: x.std() for part, x in expected.items()}
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    ("name", "tile", "sides"),
    [("sd1", 8, (15, 7)), ("sd1", 4, (3, 10)), ("sd1", 12, (12, 12)), ("odd widths", 4, (9, 4))],
)
def test_tiles(name, tile, sides, record_property):
    """Tiles that are whole, cut short, or narrower than what neighbours share; and an image of one tile."""
    c, model = CASES[name][0], published(name)[0]
    images, latents = draw(name, *(side * c.downsampling for side in sides))
    model.tile_latent_min_size, model.tile_sample_min_size = tile, tile * c.downsampling
    whole = theirs(model, images, latents)
    model.enable_tiling()
    try:
        expected = theirs(model, images, latents)
    finally:
        model.disable_tiling()
    found = compare(*ours(name, tile=tile), images, latents, expected)
    record_property("max_difference", found)
    assert max(found.values()) < TOLERANCE, found
    differs = max(float(np.abs(whole[part] - expected[part]).max()) for part in expected)
    assert (differs > 0.1) == (max(sides) > tile)  # tiles change the result; one tile does not


@pytest.mark.parametrize("name", ["sd3", "sd1"])
def test_bfloat16(name, record_property):
    """In bfloat16 both are about as far from the published result in float32; mean and largest error."""
    model, state = published(name)
    images, latents = draw(name, *CASES[name][1])
    exact = theirs(model, images, latents)
    half = peer(CASES[name][0]).eval().requires_grad_(False)
    half.load_state_dict({path: torch.from_numpy(value) for path, value in state.items()})
    coarse = theirs(half.to(torch.bfloat16), images, latents)
    network, params = ours(name, dtype="bfloat16")
    mean, log_variance = run(network, params, "moments", images)
    found = {"mean": mean, "log_variance": log_variance, "images": run(network, params, "reconstruct", latents)}
    for part, expected in exact.items():
        for kind, measure in (("mean", np.mean), ("max", np.max)):
            error, bound = (float(measure(np.abs(np.asarray(x) - expected))) for x in (found[part], coarse[part]))
            record_property(f"{part}_{kind}", (error, bound))
            assert 0 < error < BFLOAT16_MARGIN * bound, (part, kind, error, bound)


def test_encode_and_decode_shift_and_scale():
    """As diffusers' pipelines do: (mean - shift) * scale in, latents / scale + shift out, any leading axes."""
    model, params = ours("sd3")
    c, images = model.config, np.random.default_rng(0).integers(0, 256, (2, 1, 16, 8, 3), np.uint8)
    latents = run(model, params, "encode", images)
    signed = torch.from_numpy((images[:, 0] / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2))
    theirs_model = published("sd3")[0]
    expected = (theirs_model.encode(signed).latent_dist.mode() - c.shift_factor) * c.scaling_factor
    chex.assert_trees_all_close(latents[:, 0], expected.numpy().transpose(0, 2, 3, 1), atol=TOLERANCE, rtol=0)
    pixels = theirs_model.decode(expected / c.scaling_factor + c.shift_factor).sample
    pixels = (pixels / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)
    chex.assert_trees_all_close(run(model, params, "decode", latents)[:, 0], pixels, atol=TOLERANCE, rtol=0)
    assert pixels.std() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_round_trip_of_the_table(name):
    _, params = ours(name)
    exported = dict(key_table.export(keys.entries(CASES[name][0]), params))
    chex.assert_trees_all_equal(exported, published(name)[1])


@pytest.mark.parametrize(
    ("c", "count"),
    [
        (PUBLISHED_SD3, 83_819_683),
        (dataclasses.replace(PUBLISHED_SD3, latent_channels=4, quant_convs=True), 83_653_863),
    ],
)
def test_published_parameter_counts(c, count):
    """SD3 (and FLUX), and SD1 (and SDXL)."""
    model = AutoencoderKLModel(c, config.Execution("float32", "float32", "dense", True, "none"))
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), image)["params"])
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in peer(c).parameters())
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == expected == count
