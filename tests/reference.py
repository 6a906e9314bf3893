"""Published networks (PyTorch modules) with random weights, for ours to be compared with."""

import math

import numpy as np
import torch


def randomise(
    model: torch.nn.Module, scale: float | None = 0.12, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """Makes every parameter random, the scales of norms about 1, so that none hides a mistake.

    Args:
      model: changed in place, and put into evaluation mode.
      scale: of the normal distribution; None is one that keeps activations in range through any depth.
      dtype: that holds each value, so that a network in it computes the same function.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = ("norm" in name or "ln_q" in name) and "linear" not in name
            value = torch.randn_like(parameter) * (scale or _scale(parameter, is_norm))
            parameter.copy_((value + (is_norm and name.endswith("weight"))).to(dtype))
    return model.eval()


def _scale(parameter: torch.Tensor, is_norm: bool) -> float:
    if parameter.ndim > 1:
        return math.prod(parameter.shape[1:]) ** -0.5
    return 0.3 if is_norm else 0.1


def state_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Its parameters and buffers by name."""
    return {name: value.numpy() for name, value in model.state_dict().items()}
