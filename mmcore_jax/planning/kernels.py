"""FLOPs and time of the attention kernels (`nn/flash.py`), of which the compiler estimates nothing.

How much of a kernel runs follows from the rows of a batch: blocks in which nothing is seen are skipped. How fast the
rest runs is what was found for JAX's splash attention, which has the same loops, on TPU v5e with blocks of 1024 tokens.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import numpy as np

from mmcore_jax.config import Config
from mmcore_jax.data.layout import Interleaved
from mmcore_jax.nn import flash, masks
from mmcore_jax.nn.masks import Rule, TokenMeta
from mmcore_jax.planning.hlo import Instruction, Module


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Products that a kernel takes of each block, and the share of the peak that they reach on 128 channels."""

    products: int
    reached: float


_KINDS = {"forward": _Kind(2, 0.65), "queries": _Kind(3, 1.0), "keys": _Kind(4, 1.0)}
_NAME = re.compile(rf"{flash.NAME}_({'|'.join(_KINDS)})_x(\d+)_(\w+?)(?:\.\d+)?$")
_QUERY, _KEY = 2, 3  # operands, behind the two tables of blocks


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Share of the blocks that are computed, by (name of the rule, queries, keys); of others all are."""

    shares: dict[tuple[str, int, int], float] = dataclasses.field(default_factory=dict)

    def cost(self, module: Module, computation: str, line: Instruction) -> tuple[float, float] | None:
        """FLOPs of a call, and the share of the peak that they reach; None for any other kernel."""
        found = _NAME.match(line.name)
        if not found:
            return None
        kind, side, lines = _KINDS[found[1]], int(found[2]), module.computations[computation]
        (rows, heads, queries, channels), keys = (
            lines[line.operands[number]].arrays[0].dims for number in (_QUERY, _KEY)
        )
        share = self.shares.get((found[3], queries, keys[2]), 1.0)
        flops = 2.0 * kind.products * rows * heads * queries * keys[2] * channels * share
        alone = channels / side  # of a head; a product takes as long as one of all lanes
        return flops, kind.reached * alone / (flash.LANES * math.ceil(alone / flash.LANES))


def kernels(config: Config, row: Any) -> Kernels:
    """The kernels of a step of such rows."""
    if not isinstance(row, Interleaved):
        return Kernels()
    model, meta, context = config.model, row.diffusion.latent_meta, row.diffusion.context_meta
    patches = masks.windows(row.patches.meta, 1, True)
    seen = [(row.tokens.meta, masks.causal), (patches, masks.same_place)]
    if model.dit:
        joint = TokenMeta(*(np.concatenate(fields, axis=1) for fields in zip(context, meta)))
        seen += [(one, masks.DIFFUSION_RULES[model.dit.visibility]) for one in (joint, meta)]
    return Kernels(dict(_share(*one) for one in seen if one[0].kind.shape[1]))


@functools.partial(jax.jit, static_argnums=1)
def _blocks(meta: TokenMeta, rule: Rule) -> jax.Array:
    return flash.visible_blocks(meta, meta, rule) > 0


def _share(meta: TokenMeta, rule: Rule) -> tuple[tuple[str, int, int], float]:
    length = meta.kind.shape[1]
    padded = -(-length // flash.block_size(length)) * flash.block_size(length)
    return (rule.__name__, padded, padded), float(np.mean(_blocks(meta, rule)))
