"""Pooling patches to the query grid, against PyTorch."""

import numpy as np
import pytest
import torch

from mmcore_jax.nn.patches import average_pool


@pytest.mark.parametrize(("side", "grid"), [(27, 8), (8, 2), (4, 4), (7, 3)])
def test_average_pool_is_pytorchs_adaptive_one(side, grid):
    features = np.random.default_rng(0).normal(size=(2, side * side, 5)).astype(np.float32)
    square = torch.from_numpy(features).reshape(2, side, side, 5).permute(0, 3, 1, 2)
    expected = torch.nn.functional.adaptive_avg_pool2d(square, grid).permute(0, 2, 3, 1).reshape(2, grid * grid, 5)
    np.testing.assert_allclose(average_pool(features, grid), expected.numpy(), atol=1e-6)
