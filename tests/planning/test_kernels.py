"""Attention kernels in a prediction: what runs of them follows from the rows of a batch."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from mmcore_jax import config as config_lib
from mmcore_jax.config import Mesh
from mmcore_jax.nn import masks
from mmcore_jax.planning import hlo
from mmcore_jax.planning.kernels import Kernels, kernels
from mmcore_jax.planning.predict import CHIPS, Links, predict
from mmcore_jax.planning.program import full_row, program
from tests import tiny

TEXT = (pathlib.Path(__file__).parent / "modules/kernel.txt").read_text()
MODULE = hlo.parse(TEXT)
LINKS = Links(CHIPS["TPU v5 lite"], 197e12, np.zeros((1, 3), int))
WHOLE = 4 * 24 * 4096 * 2048 * 64  # two products


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_kernel_takes_what_it_computes(share):
    found = predict(MODULE, {"data": 1}, LINKS, Kernels({("block_causal", 4096, 2048): share}))
    assert found.flops == share * WHOLE
    # Half of the 128 lanes, and of those the share that splash attention reaches.
    assert found.seconds == pytest.approx(share * WHOLE / (0.65 / 2 * 197e12))
    assert found.kinds == {"attention kernels": found.seconds}
    assert found.parts == {"dit": found.seconds}
    assert found.kernels == {"another_kernel": 1}


def test_heads_side_by_side_take_as_long_as_alone():
    paired = (
        TEXT.replace("_x1_", "_x2_").replace("[1,24,4096,64]", "[1,12,4096,128]").replace("12,2048,64", "12,2048,128")
    )
    alone, together = (predict(hlo.parse(text), {"data": 1}, LINKS) for text in (TEXT, paired))
    assert (together.flops, together.seconds) == (alone.flops, alone.seconds)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("jit(step)/jvp(MMCORE.hidden_states)/MMCORE.embed/vlm.embed/vision/while/body/dot", "vlm/vision"),
        ("jit(step)/transpose(jvp(MMCORE.hidden_states))/vlm.decode/decoder/while/body/dot", "vlm"),
        ("jit(step)/jvp(MMCORE.target_embeddings)/vision_target.signed_features/vision/dot", "vision_target"),
        ("jit(step)/mul", "the rest"),
    ],
)
def test_time_goes_to_the_part_of_the_model_that_takes_it(path, part):
    text = TEXT.replace("jit(step)/jvp(MMCORE.velocity)/dit/dit._run/while/body/flash_forward_x1_block_causal", path)
    assert set(predict(hlo.parse(text), {"data": 1}, LINKS).parts) == {part}


def test_shares_are_those_of_full_rows():
    """Three drawings of 4096 latents in a row see themselves and their part of the context: 3 x 16 + 13 + 12 blocks."""
    config = config_lib.load(str(tiny.REPOSITORY / "configs/stage2.py:qwen25vl3b_sd35m"))
    found = kernels(config, full_row(config)).shares
    assert found["block_causal", 13 * 1024, 13 * 1024] == pytest.approx((3 * 16 + 13 + 12) / 13**2)
    assert found["block_causal", 12 * 1024, 12 * 1024] == pytest.approx(1 / 3)
    assert found["causal", 2048, 2048] == 0.75
    assert found["same_place", 4096, 4096] == 0.25


def test_documents_of_a_row_lie_one_after_the_other():
    """16 of 256 tokens in the 4096 of a row: two of them meet in a block, and no two blocks see each other."""
    config = config_lib.load(str(tiny.REPOSITORY / "configs/stage1.py:qwen25vl7b_sd35l"))
    row = full_row(config)
    assert (np.diff(row.tokens.meta.document[0]) >= 0).all()
    assert np.bincount(row.tokens.meta.document[0]).tolist() == [256] * 16
    assert kernels(config, row).shares["causal", 4096, 4096] == 0.25
    assert (row.tokens.targets >= 0).any() == config.objectives.next_token.user_text


def test_the_context_of_a_row_lies_by_frame():
    """Of each frame its queries and its text."""
    config = config_lib.load(str(tiny.REPOSITORY / "configs/stage2.py:qwen25vl3b_sd35m"))
    context, queries = full_row(config).diffusion.context_meta, config.model.queries.grid**2
    for frame in range(3):
        assert (context.kind[0, context.frame[0] == frame] == masks.VISUAL).sum() == queries


def test_images_of_several_ratios_are_encoded_before_the_step():
    config = config_lib.load(str(tiny.REPOSITORY / "configs/stage2.py:qwen25vl3b_sd35m"))
    config = dataclasses.replace(config, mesh=Mesh(1, 1, 1, 1), batch_size=1)
    several = dataclasses.replace(config, data=dataclasses.replace(config.data, aspect_ratios=(1.0, 1.5)))
    for one, pixels in ((config, True), (several, False)):
        batch = program(one, jax.devices()[:1]).arguments[2]
        assert (batch.images.pixels is not None) == pixels == (batch.features.latents is None)
