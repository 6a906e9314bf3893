"""One training step in float32, forward, backward and AdamW, beside PyTorch eager and torch.compile.

All start from the same weights and see the same batch; the losses of every step that is taken must agree. PyTorch gets
its fastest settings: the fused AdamW, and the attention that the published networks choose themselves.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from mmcore_jax.benchmarks import networks
from mmcore_jax.benchmarks.networks import IMAGE_TOKEN, MMDiTSizes, VLMSizes
from mmcore_jax.benchmarks.timing import COMPILED, EAGER, OURS, Comparison, Contestant, compare
from mmcore_jax.models import qwen_vl
from mmcore_jax.models.mmdit import Slots
from mmcore_jax.nn import masks
from mmcore_jax.nn.patches import patchify
from mmcore_jax.training.optimizer import Flat

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP_NORM = 1e-4, (0.9, 0.98), 1e-8, 0.01, 1.0
WARMUP = 3
TOLERANCE = 1e-4  # of the losses of one step after another, relative


class Task(NamedTuple):
    """The same work for both."""

    original: torch.nn.Module
    original_loss: Callable[[torch.nn.Module], torch.Tensor]
    params: Any
    loss: Callable[[Any, Any], jax.Array]
    batch: Any


def measure(name: str, sizes: MMDiTSizes | VLMSizes, repeats: int, compile: bool = True) -> Comparison:
    """Times the step of one network, "mmdit" or "vlm"."""
    task = TASKS[name](sizes)
    contestants = [Contestant(OURS, our_step(task)), Contestant(EAGER, torch_step(task.original, task.original_loss))]
    if compile:
        compiled = torch.compile(copy.deepcopy(task.original))
        contestants.append(Contestant(COMPILED, torch_step(compiled, task.original_loss)))
    return compare(name, dataclasses.asdict(sizes), contestants, WARMUP, repeats, TOLERANCE)


# --- Steps ------------------------------------------------------------------------------------------------------------


def our_step(task: Task) -> Callable[[], np.ndarray]:
    """A step that returns its loss."""

    def decayed(params: Flat) -> dict[str, bool]:
        return {path: path.endswith(("kernel", "embedding", "head")) for path in params}

    adamw = optax.adamw(LEARNING_RATE, *BETAS, EPS, weight_decay=WEIGHT_DECAY, mask=decayed)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), adamw)

    def step(state: tuple[Flat, Any], batch: Any) -> tuple[tuple[Flat, Any], jax.Array]:
        params, opt_state = state
        loss, gradients = jax.value_and_grad(lambda params: task.loss(unflatten_dict(params, sep="/"), batch))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    params = jax.tree.map(jnp.copy, flatten_dict(task.params, sep="/"))  # its own, since steps donate them
    state, batch = (params, optimizer.init(params)), jax.device_put(task.batch)
    jitted = jax.jit(step, donate_argnums=0)

    def run() -> np.ndarray:
        nonlocal state
        state, loss = jitted(state, batch)
        return np.asarray(jax.block_until_ready((loss, state))[0])

    return run


def torch_step(model: torch.nn.Module, loss: Callable[[torch.nn.Module], torch.Tensor]) -> Callable[[], np.ndarray]:
    """A step that returns its loss."""
    parameters = list(model.parameters())
    groups = [
        dict(params=[parameter for parameter in parameters if parameter.ndim > 1], weight_decay=WEIGHT_DECAY),
        dict(params=[parameter for parameter in parameters if parameter.ndim < 2], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, BETAS, EPS, fused=True)

    def run() -> np.ndarray:
        optimizer.zero_grad(set_to_none=True)
        value = loss(model)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        return value.detach().numpy()

    return run


# --- Tasks ------------------------------------------------------------------------------------------------------------


def mmdit(sizes: MMDiTSizes) -> Task:
    """The mean squared error of a velocity."""
    original = networks.make_mmdit(sizes)
    ours = networks.load_ours(original)
    arrays = networks.mmdit_arrays(sizes, sizes.batch)
    target = np.random.default_rng(1).standard_normal(arrays["hidden_states"].shape, np.float32)
    tensors, target_tensor = {name: torch.from_numpy(x) for name, x in arrays.items()}, torch.from_numpy(target)

    def original_loss(model: torch.nn.Module) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(**tensors).sample, target_tensor)

    model = ours.family.model(ours.config, ours.execution)
    latent_meta, context_meta = networks.frame_metas(sizes, sizes.batch)

    def loss(params: Any, batch: dict[str, Any]) -> jax.Array:
        velocity = model.apply({"params": params}, *batch["inputs"], masks.block_causal, batch["pooled"])
        return jnp.mean(jnp.square(velocity - batch["target"]))

    def patches(images: np.ndarray) -> jax.Array:
        return patchify(images.transpose(0, 2, 3, 1), ours.config.patch_size)

    inputs = (
        patches(arrays["hidden_states"]),
        arrays["encoder_hidden_states"],
        arrays["timestep"][:, None] / 1000,
        Slots(np.zeros_like(context_meta.kind), np.zeros_like(latent_meta.kind)),
        latent_meta,
        context_meta,
    )
    batch = dict(inputs=inputs, pooled=arrays["pooled_projections"][:, None], target=patches(target))
    return Task(original, original_loss, ours.params, loss, batch)


def vlm(sizes: VLMSizes) -> Task:
    """Cross entropy of the next token, wherever it is text."""
    original = networks.make_vlm(sizes)
    ours = networks.load_ours(original)
    arrays = networks.vlm_arrays(sizes)
    targets = np.pad(arrays["input_ids"][:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    targets[targets == IMAGE_TOKEN] = -1
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    tensors["mm_token_type_ids"] = (tensors["input_ids"] == IMAGE_TOKEN).int()
    target_tensor = torch.from_numpy(targets).flatten()

    def original_loss(model: torch.nn.Module) -> torch.Tensor:
        logits = model(**tensors).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, target_tensor, ignore_index=-1)

    model = ours.family.model(ours.config, ours.execution)

    def loss(params: Any, batch: dict[str, Any]) -> jax.Array:
        logits, targets = model.apply({"params": params}, batch["prompts"]), batch["targets"]
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        learned = targets >= 0
        return jnp.sum(learned * (jax.nn.logsumexp(logits, axis=-1) - chosen)) / jnp.sum(learned)

    prompts = qwen_vl.prepare(ours.config, **arrays, image_token=IMAGE_TOKEN)
    return Task(original, original_loss, ours.params, loss, dict(prompts=prompts, targets=targets))


TASKS: dict[str, Callable[[Any], Task]] = {"mmdit": mmdit, "vlm": vlm}
