"""What trains, and how: the stage table and the optax multi-optimizer.

Parameters are a flat dict from path ("dit/blocks/x_q/kernel") to array. The table of `config.tuning` is read from the
top, the first pattern that matches a whole path wins; only the trainable subtree ever meets the optimizer.
"""

import re

import jax
import jax.numpy as jnp
import optax

from mmcore_jax.config import Config, Tuning, UserError
from mmcore_jax.nn.layers import is_lora

Flat = dict[str, jax.Array]


def assign(paths: list[str], table: tuple[Tuning, ...]) -> dict[str, Tuning]:
    """Returns the line of the table that each parameter falls under.

    Raises:
      UserError: naming a parameter that nothing matches, or a pattern that decides for none.
    """
    assigned = {}
    for path in paths:
        line = next((line for line in table if re.fullmatch(line.pattern, path)), None)
        if line is None:
            raise UserError(f"config.tuning has no pattern for the parameter {path!r}: add one, or a last line '.*'.")
        assigned[path] = line
    for line in table:
        if line not in assigned.values():
            raise UserError(
                f"config.tuning: the pattern {line.pattern!r} decides for no parameter: correct it or take it out."
            )
    return assigned


def schedule(config: Config, scale: float = 1.0) -> optax.Schedule:
    """Linear warm-up, flat until `flat` of the run, then constant, linear or cosine down to `final` of the peak."""
    c, peak = config.optimizer, scale * config.optimizer.learning_rate
    turn = max(c.warmup_steps, round(c.flat * config.total_steps))
    rest = max(config.total_steps - turn, 1)
    tails = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, c.final * peak, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, c.final),
    }
    warmup = optax.linear_schedule(peak / max(c.warmup_steps, 1), peak, max(c.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, optax.constant_schedule(peak), tails[c.decay]()], [c.warmup_steps, turn])


def make_optimizer(config: Config, assigned: dict[str, Tuning]) -> optax.GradientTransformation:
    """AdamW for each distinct line of the table, after clipping by the global norm of everything that trains.

    Weight decay falls on matrices (and higher) only, counted without the layer axis of a scanned stack.
    """
    c = config.optimizer
    lines = {str(index): line for index, line in enumerate(dict.fromkeys(assigned.values())) if not line.frozen}
    label_of = {line: label for label, line in lines.items()}

    def decayed(params: Flat) -> dict[str, bool]:
        return {path: path.endswith(("/kernel", "/embedding", "/head")) or is_lora(path) for path in params}

    def adamw(line: Tuning) -> optax.GradientTransformation:
        decay = c.weight_decay if line.weight_decay is None else line.weight_decay
        rate = schedule(config, line.learning_rate)
        return optax.adamw(rate, c.b1, c.b2, c.eps, weight_decay=decay, mask=decayed, mu_dtype=jnp.float32)

    transforms = {label: adamw(line) for label, line in lines.items()}
    partition = optax.partition(transforms, lambda params: {path: label_of[assigned[path]] for path in params})
    clip = optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
    return optax.chain(clip, partition)
