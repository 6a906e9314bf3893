"""The losses, one a file, by the name that `config.objectives` gives them.

Each has `count(batch)`, what it is normalised by over the whole global batch, and
`loss(forward, settings, keys, step, count) -> (loss, metrics)`, pure. Losses and metrics of parts of a batch add up to
those of the whole, so neither the mesh nor gradient accumulation changes them. `keys` holds one random key a row.
"""

from mmcore_jax.objectives import alignment, flow_matching, next_token, sigmoid_contrastive

OBJECTIVES = {
    "sigmoid_contrastive": sigmoid_contrastive,
    "next_token": next_token,
    "alignment": alignment,
    "flow_matching": flow_matching,
}
