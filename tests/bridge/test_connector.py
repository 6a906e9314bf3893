"""Connectors: what sees what, what they hold, and the settings that choose them."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mmcore_jax import config as config_lib
from mmcore_jax.bridge.connector import make_connector
from mmcore_jax.config import Execution, LinearConnector, Tower, TransformerConnector, UserError
from mmcore_jax.nn import attention as attention_lib
from tests.leaks import leaks
from tests.tiny import REPOSITORY

WIDTH, IMAGES, QUERIES = 12, 3, 4  # of the VLM; of a row; of an image
EXECUTION = Execution("float32", "float32", "dense", True, "none")
LINEAR = LinearConnector("linear", 6)
TRANSFORMER = TransformerConnector("transformer", 6, Tower(width=16, depth=3, heads=2, mlp_width=24))
HIDDEN = jax.random.normal(jax.random.key(0), (2, IMAGES, QUERIES, WIDTH))


def random(model, hidden=HIDDEN):
    """Random parameters throughout: norms and biases too."""
    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), hidden))
    return jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


@pytest.mark.parametrize("config", [LINEAR, TRANSFORMER])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shape_and_dtype(config, dtype):
    model = make_connector(config, dataclasses.replace(EXECUTION, compute_dtype=dtype))
    out = jax.eval_shape(lambda key: model.init_with_output(key, HIDDEN)[0], jax.random.key(0))
    assert out.shape == (2, IMAGES, QUERIES, 6)
    assert out.dtype == dtype


# --- What sees what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_queries_see_those_of_their_image_and_no_others(implementation, monkeypatch):
    """All of an image, before and after them; nothing of another image or row."""
    monkeypatch.setattr(attention_lib, "BLOCK", 3)
    model = make_connector(TRANSFORMER, dataclasses.replace(EXECUTION, attention=implementation))
    parameters, count = random(model), HIDDEN.size // WIDTH
    image = np.arange(count) // QUERIES

    def apply(x):
        return model.apply(parameters, x.reshape(HIDDEN.shape)).reshape(count, -1)

    visible = image[:, None] == image
    assert leaks(apply, HIDDEN.reshape(count, WIDTH), visible, np.ones(count, bool)) == []


def test_queries_know_their_row_and_column():
    """Equal queries differ only in where they stand to each other: a quarter turn of the grid would be seen."""
    model = make_connector(TRANSFORMER, EXECUTION)
    parameters = random(model)
    order = np.arange(QUERIES).reshape(2, 2).T.ravel()
    straight, turned = (model.apply(parameters, hidden) for hidden in (HIDDEN, HIDDEN[:, :, order]))
    assert np.abs(straight - turned[:, :, order]).max() > 1e-3
    # Distances count, not places: rotary codes turn by the difference of positions.
    same = jnp.broadcast_to(HIDDEN[:, :, :1], HIDDEN.shape)
    np.testing.assert_allclose(np.ptp(model.apply(parameters, same), axis=2), 0, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scanned_and_unrolled_agree(remat):
    def loss(scan_layers, remat):
        model = make_connector(TRANSFORMER, dataclasses.replace(EXECUTION, scan_layers=scan_layers, remat=remat))
        return lambda parameters, hidden: jnp.sum(jnp.sin(model.apply(parameters, hidden)))

    parameters = random(make_connector(TRANSFORMER, EXECUTION))
    found, expected = (
        jax.jit(jax.value_and_grad(loss(*settings), argnums=(0, 1)))(parameters, HIDDEN)
        for settings in ((True, remat), (False, "none"))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    gradients = flatten_dict(found[1][0], sep="/") | {"hidden states": found[1][1]}
    assert len(gradients) == 2 + 12 + 3 + 1
    for path, gradient in gradients.items():
        layers = np.abs(gradient) if "blocks" in path else np.abs(gradient)[None]
        assert (layers.reshape(len(layers), -1).max(axis=1) > 1e-4).all(), path


# --- Parameters -------------------------------------------------------------------------------------------------------


def counted(config, width, queries):
    model, hidden = make_connector(config, EXECUTION), jax.ShapeDtypeStruct((1, 1, queries, width), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), hidden)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("depth", "expected"), [(2, 136_600_704), (3, 203_719_808), (6, 405_077_120), (24, 1_613_220_992)]
)
def test_parameters_behind_qwen_3b(depth, expected):
    """As wide as the VLM: q, k, v with biases, out, SwiGLU, two norms a block; then a norm and a map to 1152."""
    block = 4 * 2048**2 + 3 * 2048 + 3 * 2048 * 8192 + 2 * 2048
    assert expected == depth * block + 2048 + 2048 * 1152 + 1152
    config = TransformerConnector("transformer", 1152, Tower(2048, depth, 32, 8192))
    assert counted(config, 2048, 64) == expected


def test_parameters_of_a_width_of_its_own():
    """A map to the encoder's width comes first."""
    block = 4 * 16**2 + 3 * 16 + 3 * 16 * 24 + 2 * 16
    assert counted(TRANSFORMER, WIDTH, QUERIES) == WIDTH * 16 + 16 + 3 * block + 16 + 16 * 6 + 6
    assert counted(LINEAR, WIDTH, QUERIES) == WIDTH * 6 + 6


# --- Settings ---------------------------------------------------------------------------------------------------------

GIVEN = {"kind": "transformer", "width": 128, "encoder": {"width": 192, "depth": 2, "heads": 6, "mlp_width": 512}}


def load(connector, *overrides):
    file = str(REPOSITORY / "configs/stage1.py")
    return config_lib.load(file, [f"--config.model.connector={connector}", *overrides])


def test_a_kind_from_the_command_line(tmp_path):
    config = load(GIVEN, "--config.model.connector.encoder.depth=6")
    assert config.model.connector == TransformerConnector("transformer", 128, Tower(192, 6, 6, 512))
    (tmp_path / "config.json").write_text(config.to_json())
    assert config_lib.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        (GIVEN | {"kind": "transfomer"}, r"connector.kind in .* is 'transfomer', .*, did you mean 'transformer'"),
        (GIVEN | {"kind": "linear"}, r"unknown key config.model.connector.encoder in "),
        ({"kind": "transformer", "width": 128}, r"missing key config.model.connector.encoder in "),
        (
            GIVEN | {"encoder": GIVEN["encoder"] | {"heads": 5}},
            r"encoder.width 192 must be a multiple of 4 times its 5 ",
        ),
        (GIVEN | {"encoder": GIVEN["encoder"] | {"depth": 0}}, r"encoder.depth is 0: give it at least 1 block"),
    ],
)
def test_mistakes(connector, message):
    with pytest.raises(UserError, match=message):
        load(connector)
