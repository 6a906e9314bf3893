"""The one step of every stage: sum the weighted objectives, differentiate what trains, update.

Where batches have images of several shapes, these become latents before the step, which is compiled once for them all.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmcore_jax.config import Config, UserError
from mmcore_jax.data import geometry
from mmcore_jax.data.layout import Interleaved
from mmcore_jax.mmcore import MMCORE, Forward
from mmcore_jax.objectives import OBJECTIVES
from mmcore_jax.sharding import constrain
from mmcore_jax.training import bad_steps
from mmcore_jax.training.optimizer import Flat
from mmcore_jax.training.state import Constants, Plan, State, join

Metrics = dict[str, jax.Array]


def make_step(config: Config, model: MMCORE, plan: Plan) -> Callable[[State, Constants, Any], tuple[State, Metrics]]:
    """Returns the pure function `(state, constants, batch) -> (state, metrics)`, which `train` jits."""
    active = {name: settings for name in OBJECTIVES if (settings := getattr(config.objectives, name)) is not None}
    accumulation = config.optimizer.accumulation

    def loss(params: Flat, constants: Constants, batch: Any, key: jax.Array, step: jax.Array, counts: Metrics):
        forward = Forward(model, join(params, constants), batch)
        total, metrics = jnp.zeros(()), {}
        for number, (name, settings) in enumerate(active.items()):
            keys = row_keys(jax.random.fold_in(key, number), batch.row)
            value, details = OBJECTIVES[name].loss(forward, settings, keys, step, counts[name])
            total = total + settings.weight * value
            metrics |= {name: value} | {f"{name}/{key}": detail for key, detail in details.items()}
        return total, metrics | {"loss": total}

    def step(state: State, constants: Constants, batch: Any) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        counts = {name: OBJECTIVES[name].count(batch) for name in active}

        def gradients(part: Any) -> tuple[Flat, Metrics]:
            return jax.grad(loss, has_aux=True)(state.params, constants, part, key, state.step, counts)

        if accumulation == 1:
            grads, metrics = gradients(batch)
        else:
            grads, metrics = _accumulate(gradients, batch, accumulation)
        updates, opt_state = plan.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = _update_ema(config, state, params)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        good, health = bad_steps.judge(config.bad_steps, state.health, metrics)
        before = state.params, state.opt_state, state.ema
        after = bad_steps.choose(good, (params, opt_state, ema), before)
        metrics |= {"bad_steps/total": health.bad, "bad_steps/in_a_row": health.in_a_row}
        return State(state.step + 1, *after, health), metrics

    return step


def make_encode(config: Config, model: MMCORE, plan: Plan) -> Callable[[Constants, Interleaved], Interleaved] | None:
    """Returns what puts latents into a batch in place of its pixels, compiled for each bucket; None if there is one.

    Raises:
      UserError: if the autoencoder trains, which no gradient would reach.
    """
    if not geometry.one_bucket(config):
        return None
    for path in plan.trainable:
        if path.startswith("autoencoder/"):
            raise UserError(
                f"config.tuning trains {path!r}, but images of several config.data.aspect_ratios are encoded before "
                "the step: freeze autoencoder/.*, or leave one ratio."
            )
    capacity = geometry.derive(config.model, config.data).latent_capacity

    @jax.jit
    def encode(constants: Constants, pixels: jax.Array) -> jax.Array:
        latents = model.apply({"params": join({}, constants)}, pixels, method="latents")
        latents = jnp.pad(latents, ((0, 0), (0, 0), (0, capacity - latents.shape[2]), (0, 0)))
        return constrain(latents, "batch", None, None, None)

    def replace(constants: Constants, batch: Interleaved) -> Interleaved:
        features = batch.features._replace(latents=encode(constants, batch.images.pixels))
        return batch._replace(images=batch.images._replace(pixels=None), features=features)

    return replace


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """One key a row, from its position in the global batch: the same on any mesh and with any accumulation."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def _accumulate(gradients: Callable, batch: Any, parts: int) -> tuple[Flat, Metrics]:
    """Sums gradients and metrics over `parts` parts of the batch; each takes every `parts`-th row: shards stay put."""
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), batch)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], split))
    )

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(part)), None

    return jax.lax.scan(add, zeros, split)[0]


def _update_ema(config: Config, state: State, params: Flat) -> Flat:
    """Exponential moving average, with a short memory while the run is young."""
    if not config.optimizer.ema_decay:
        return {}
    decay = jnp.minimum(config.optimizer.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, params)
