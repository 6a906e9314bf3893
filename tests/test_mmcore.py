"""Stage 2 on the latents of a small AutoencoderKL: one training step and one picture through all rooms."""

import math
import pathlib

import flax.linen as nn
import jax
import jax.extend
import numpy as np
import pytest

from mmcore_jax import config as config_lib
from mmcore_jax import sharding
from mmcore_jax.config import Config, Pixels, UserError
from mmcore_jax.data import geometry
from mmcore_jax.data.pipeline import Batches
from mmcore_jax.data.text import load_tokenizer
from mmcore_jax.generate import Generator
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.models.autoencoder import make_autoencoder
from mmcore_jax.training.checkpoint import fingerprints
from mmcore_jax.training.flops import step_flops
from mmcore_jax.training.state import Constants, create_state, freeze, join, make_plan
from mmcore_jax.training.step import make_step
from mmcore_jax.training.weights import initial_params
from tests import tiny

AUTOENCODER = dict(
    kind="kl",
    block_channels=(8, 16),
    layers_per_block=1,
    latent_channels=4,
    norm_groups=4,
    quant_convs=True,
    mid_attention=True,
    scaling_factor=0.5,
    shift_factor=0.1,
    tile=0,
)
PARTS = ("vlm", "queries", "connector", "conditioning", "frames", "dit", "autoencoder")
FROZEN = {"pattern": "(vlm|queries|connector|autoencoder)/.*", "frozen": True}


def configured(data: pathlib.Path, *extra: str, **changes) -> Config:
    """The tiny stage 2: 16 x 16 pixels are 8 x 8 latents, 4 x 4 patches of 2 x 2."""
    return tiny.config(
        "stage2",
        data,
        f"--config.model.autoencoder={AUTOENCODER | changes}",
        "--config.model.dit.patch_size=2",
        "--config.model.dit.latent_channels=4",
        "--config.model.frames={'count': 2}",
        f"--config.init={dict.fromkeys(PARTS, 'random')}",
        f"--config.tuning=({FROZEN}, {{'pattern': '.*'}})",
        *extra,
    )


def test_a_step_and_a_picture(data):
    config = configured(data)
    assert geometry.derive(config.model, config.data).buckets == ((4, 4),)
    mesh = sharding.make_mesh(config_lib.Mesh(1, 1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        batch, model = Batches(config)[0].arrays, MMCORE(config.model, config.execution)
        plan = make_plan(config, model, mesh, batch)
        params = initial_params(config, model, plan, batch, list(plan.shapes))
        assert not params["frames/embedding"].any()
        constants = Constants(freeze(config, plan, params), {})
        state = create_state(config, plan, mesh, params)
        step = jax.jit(make_step(config, model, plan), donate_argnums=0)
        state, metrics = step(state, constants, sharding.shard_batch(batch, mesh))
        assert 0.1 < float(metrics["loss"]) < 10

        part = {path for path in plan.shapes if path.startswith("autoencoder/")}
        assert {path.split("/")[1] for path in part} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
        assert part <= set(plan.frozen)
        kept = {path: constants.frozen[path] for path in part}
        assert fingerprints(kept) == fingerprints({path: params[path] for path in part})
        trained = {path: params[path] for path in plan.trainable}
        assert fingerprints(trained) != fingerprints(state.params)

        generator = Generator(config, model, load_tokenizer(config.data.tokenizer))
        requests = [tiny.examples()[task][0] for task in ("text_to_image", "edit_colour")]
        images = generator(join(state.params, constants), requests, config.sampling)
    assert images.shape == (2, 16, 16, 3)
    assert images.dtype == np.uint8
    assert images.std() > 1


def test_encoding_costs_its_products(data):
    """The frozen encoder counts one forward of each product that its traced program has, over the images in use."""
    config = configured(data)
    batch, model = Batches(config)[0].arrays, MMCORE(config.model, config.execution)
    plan = make_plan(config, model, sharding.make_mesh(config.mesh, jax.devices()[:1]), batch)
    meta = batch.diffusion.latent_meta
    used = [(row, frame) for row in range(meta.kind.shape[0]) for frame in set(meta.frame[row][meta.kind[row] > 0])]
    images = np.stack([batch.images.pixels[row, frame] for row, frame in used])
    encoder = make_autoencoder(config.model.autoencoder, config.execution)
    variables = nn.unbox(jax.eval_shape(encoder.init, jax.random.key(0), images))
    program = jax.make_jaxpr(lambda variables: encoder.apply(variables, images, method="encode"))(variables)
    assert step_flops(config, plan, batch)["autoencoder"] == sum(map(product_flops, program.eqns))


def product_flops(equation: jax.extend.core.JaxprEqn) -> float:
    """FLOPs of a convolution or a matrix product, borders included; 0 of all else."""
    shapes, out = [variable.aval.shape for variable in equation.invars], equation.outvars[0]
    if equation.primitive.name == "conv_general_dilated":
        return 2.0 * out.aval.size * math.prod(shapes[1][:3])
    if equation.primitive.name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][0]
        return 2.0 * out.aval.size * math.prod(shapes[0][axis] for axis in contracted)
    return 0.0


def test_the_config_comes_back_from_json(data, tmp_path):
    for config in (configured(data), tiny.config("stage2", data)):
        (tmp_path / "config.json").write_text(config.to_json())
        assert config_lib.from_json(tmp_path / "config.json") == config
    assert isinstance(config.model.autoencoder, Pixels)


@pytest.mark.parametrize(
    ("extra", "changes", "words"),
    [
        ("--config.model.dit.latent_channels=3", {}, "latent_channels is 3, but the latents .* have 4 channels"),
        ("--config.model.dit.patch_size=16", {}, "image_size 16 must be a multiple of 32, for latent patches"),
        ("--config.seed=1", {"kind": "vae"}, "autoencoder.kind .* is 'vae', expected one of 'pixel', 'kl'"),
        ("--config.seed=1", {"tiles": 0}, "unknown key config.model.autoencoder.tiles .* did you mean 'tile'"),
    ],
)
def test_mistakes(data, extra, changes, words):
    def prepare() -> None:
        config = configured(data, extra, **changes)
        geometry.derive(config.model, config.data)

    with pytest.raises(UserError, match=words):
        prepare()
