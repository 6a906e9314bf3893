"""A stack of equal blocks: parameters with a leading layer axis, compiled once (scan), with a remat policy by name.

The parameter tree is the same whether the stack is looped over or unrolled, so a checkpoint fits either.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from mmcore_jax.config import Execution
from mmcore_jax.nn import flash

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(flash.SAVED),
    "qkv": jax.checkpoint_policies.save_only_these_names(flash.SAVED, flash.TAKEN),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(flash.SAVED),
    ),
}


def stack(block: type[nn.Module], depth: int, execution: Execution, name: str, **fields: Any) -> Callable[..., Any]:
    """Returns `(carry, layers, *shared) -> (carry, outputs)`, which applies `depth` copies of a block.

    Args:
      block: its signature is `(carry, layer, *shared) -> (carry, output)`. `layer` is its slice of `layers`, `output`
        that of `outputs`, trees of arrays with a leading layer axis (or None); `shared` is the same for every layer.
      depth: number of copies.
      execution: says whether to loop or to unroll, and what the backward pass recomputes.
      name: of the stack in the parameter tree.
      fields: of the block, beside `execution`.
    """
    if execution.remat != "none":
        block = nn.remat(block, policy=POLICIES[execution.remat], prevent_cse=not execution.scan_layers)

    def apply(carry: Any, layers: Any, *shared: Any) -> Any:
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast,) * len(shared)),
            length=depth,
            unroll=1 if execution.scan_layers else depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(name=name, execution=execution, **fields)(carry, layers, *shared)

    return apply
