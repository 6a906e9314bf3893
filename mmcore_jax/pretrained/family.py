"""What a family of published networks consists of; each has a file of its own, and a line in `FAMILIES`."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mmcore_jax.config import Execution
from mmcore_jax.pretrained.files import Settings
from mmcore_jax.pretrained.table import Entry


def _as_it_is(config: Any, name: str) -> str:
    return name


def _settled(config: Any, stored: Mapping[str, np.ndarray]) -> Any:
    return config


def _no_buffers(config: Any) -> dict[str, np.ndarray]:
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of published networks.

    Attributes:
      name: for people.
      part: of MMCORE that it can be.
      component: its directory in a pipeline of diffusers.
      kinds: the `model_type` or `_class_name` of its config.json.
      stem: of the name of its weights.
      read_config: from config.json to our dataclass; raises `UserError` for what is not implemented.
      write_config: the inverse, for weights of the named dtype.
      config: our dataclass.
      entries: the key table.
      model: the network.
      init: makes the variables of a network, from a key.
      forward: the original's `forward` on its named arrays: (model, params, config.json, arrays) to an array.
      comparisons: yields (what it is, ours, the original's), of a loaded checkpoint and its directory, on random input.
      rename: their name as the table has it, None for a tensor that our config does without.
      buffers: what they store and we compute.
      settle: the config with what config.json leaves open, as the stored tensors have it.
      beside: files that are published with the weights, and needed with them.
      encode: of an autoencoder, (model, params, images) to the mean and log-variance of latents.
      decode: of an autoencoder, (model, params, latents) to images.
      lora_entries: the key table of the LoRA alone, as PEFT names it, of a family that can have one.
      lora_modules: a regular expression that PEFT finds by what has LoRA.
    """

    name: str
    part: str
    component: str
    kinds: tuple[str, ...]
    stem: str
    read_config: Callable[[Settings], Any]
    write_config: Callable[[Any, str], dict[str, Any]]
    config: type
    entries: Callable[[Any], list[Entry]]
    model: Callable[[Any, Execution], nn.Module]
    init: Callable[[nn.Module, jax.Array], Any]
    forward: Callable[..., jax.Array]
    comparisons: Callable[[Any, pathlib.Path], Iterator[tuple[str, jax.Array, np.ndarray]]]
    rename: Callable[[Any, str], str | None] = _as_it_is
    buffers: Callable[[Any], dict[str, np.ndarray]] = _no_buffers
    settle: Callable[[Any, Mapping[str, np.ndarray]], Any] = _settled
    beside: tuple[str, ...] = ()
    encode: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    decode: Callable[..., jax.Array] | None = None
    lora_entries: Callable[[Any], list[Entry]] | None = None
    lora_modules: Callable[[Any], str] | None = None
