"""LoRA on its way out: merged into the kernels, or as the directory that PEFT writes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mmcore_jax.nn.layers import is_lora


def without_lora(config: Any) -> Any:
    """The config of the network that LoRA is put on."""
    return dataclasses.replace(config, lora=None) if getattr(config, "lora", None) else config


@dataclasses.dataclass(frozen=True)
class Merged:
    """A stacked kernel with LoRA, of which each layer is put together when it is asked for, in float32."""

    kernel: jax.Array
    lora_a: jax.Array
    lora_b: jax.Array
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> np.dtype:
        return self.kernel.dtype

    def __getitem__(self, layer: int) -> np.ndarray:
        kernel, a, b = (np.asarray(x[layer], np.float32) for x in (self.kernel, self.lora_a, self.lora_b))
        return kernel + np.float32(self.scale) * (a @ b)


def merge(config: Any, params: Any) -> tuple[Any, Any]:
    """The config and the parameter tree of the same network without LoRA."""
    lora = getattr(config, "lora", None)
    if lora is None:
        return config, params
    flat = flatten_dict(params, sep="/")
    merged = {path: leaf for path, leaf in flat.items() if not is_lora(path)}
    for stem in (path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")):
        a, b = flat[f"{stem}/lora_a"], flat[f"{stem}/lora_b"]
        merged[f"{stem}/kernel"] = Merged(flat[f"{stem}/kernel"], a, b, lora.alpha / lora.rank)
    return without_lora(config), unflatten_dict(merged, sep="/")


def write_config(config: Any, modules: str, base: str) -> Mapping[str, Any]:
    """adapter_config.json, as PEFT reads it.

    Args:
      config: our dataclass.
      modules: a regular expression of the names of the layers that have LoRA, in full.
      base: where the weights lie that it is put on.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": int(config.lora.alpha) if config.lora.alpha.is_integer() else config.lora.alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
