"""Sizes that do not fit each other are refused, with the setting to change."""

import pytest

from mmcore_jax import config as config_lib
from mmcore_jax.config import UserError
from mmcore_jax.data import geometry
from tests import tiny


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--config.data.vlm_pixels=(36, 1024)", r"vlm_pixels \(36, 1024\) must ascend, from 64, the pixels of a token"),
        ("--config.data.vlm_pixels=(1024, 64)", "vlm_pixels .* must ascend"),
        ("--config.data.vlm_pixels=None", "vlm_pixels is None, but the stage has a VLM"),
        ("--config.data.image_size=None", "image_size None must be a multiple of 4, for latent patches"),
        ("--config.model.dit.patch_size=5", "image_size 32 must be a multiple of 5, for latent patches"),
        ("--config.data.image_size=64", "64 makes 16 latent patches a side, but .*position_grid 8"),
        ("--config.data.budgets.vision_patches=66", "vision_patches 66 must be a multiple of 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(change, words):
    config = config_lib.load(str(tiny.REPOSITORY / "configs/stage2.py"), [change])
    with pytest.raises(UserError, match=words):
        geometry.derive(config.model, config.data)


def test_queries_finer_than_the_vision_target_are_refused():
    config = config_lib.load(str(tiny.REPOSITORY / "configs/stage1.py"), ["--config.model.queries.grid=9"])
    with pytest.raises(UserError, match="grid 9 is finer than the vision target's patches, 8 a side"):
        geometry.derive(config.model, config.data)
