"""Alignment of predicted visual embeddings with a frozen vision encoder (MMCORE equation 1)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmcore_jax import config as config_lib
from mmcore_jax import sharding
from mmcore_jax.config import UserError
from mmcore_jax.data.layout import Interleaved
from mmcore_jax.mmcore import MMCORE, Forward, Params

MEASURED_BATCHES = 32


def count(batch: Interleaved) -> jax.Array:
    """Number of generated images."""
    return jnp.maximum(jnp.sum(batch.images.generated), 1).astype(jnp.float32)


def loss(
    forward: Forward, settings: config_lib.Alignment, keys: jax.Array, step: jax.Array, count: jax.Array
) -> tuple[jax.Array, dict]:
    """Mean over generated images of the mean over queries of 1 - cosine, in float32."""
    targets = forward.targets if settings.center else forward.targets + forward.target_mean
    similarity = cosine(forward.visual_embeddings, targets).mean(-1)
    return jnp.sum(forward.batch.images.generated * (1 - similarity)) / count, {}


def measure(model: MMCORE, params: Params, batches: Sequence, mesh: Mesh) -> dict[str, jax.Array]:
    """The mean target embedding over the generated images of the first batches, `{"target_mean": [N, D_visual]}`.

    Raises:
      UserError: if those generate no image.
    """

    def add(total: tuple, params: Params, batch: Interleaved) -> tuple:
        targets = Forward(model, params, batch).target_embeddings
        sums = jnp.einsum("bi,bind->nd", batch.images.generated.astype(jnp.float32), targets)
        return total[0] + sums, total[1] + jnp.sum(batch.images.generated)

    whole, grid = sharding.replicated(mesh), model.config.queries.grid
    width = model.config.vision_target.vision.width
    total = jax.device_put((np.zeros((grid * grid, width), np.float32), np.float32(0)), whole)
    step = jax.jit(add, out_shardings=whole)
    for number in range(min(MEASURED_BATCHES, len(batches))):
        arrays = batches[number].arrays
        arrays = arrays._replace(images=arrays.images._replace(pixels=None))
        total = step(total, params, sharding.shard_batch(arrays, mesh))
    if not total[1]:
        raise UserError(
            f"the first batches (up to {MEASURED_BATCHES}) generate no image, so that targets have no mean to measure: "
            "give a source that does a weight from step 0 on, or begin without config.objectives.alignment."
        )
    return {"target_mean": total[0] / total[1]}


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Cosine over the last axis, float32."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.sum(x * x, -1) * jnp.sum(y * y, -1)
    return jnp.sum(x * y, -1) * jax.lax.rsqrt(norms + 1e-12)
