"""The guided denoising loop of the sampler beside that of Stable Diffusion 3 in diffusers.

Both start from the same noise, prompt embeddings and weights, and take the same Euler steps with the same guidance; the
latents that they end with must agree.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import numpy as np
import torch

from mmcore_jax.benchmarks import networks
from mmcore_jax.benchmarks.networks import MMDiTSizes
from mmcore_jax.benchmarks.timing import COMPILED, EAGER, OURS, Comparison, Contestant, compare
from mmcore_jax.bridge.conditioning import Condition
from mmcore_jax.config import Model, Pixels, Sampling
from mmcore_jax.data.layout import Diffusion, Images, Interleaved
from mmcore_jax.diffusion import guidance, solver
from mmcore_jax.generate import integrate
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.nn.patches import patchify, unpatchify

STEPS, SHIFT, SCALE = 8, 3.0, 5.0
WARMUP = 2
TOLERANCE = 1e-4  # of the final latents, relative to the largest


def measure(sizes: MMDiTSizes, repeats: int, compile: bool = True) -> Comparison:
    """Times the sampling of `sizes.batch` images from noise."""
    original = networks.make_mmdit(sizes).eval()
    arrays = networks.mmdit_arrays(sizes, 2 * sizes.batch)  # without the prompt first, then with it
    contestants = [
        Contestant(OURS, our_loop(sizes, original, arrays)),
        Contestant(EAGER, torch_loop(sizes, original, arrays)),
    ]
    if compile:
        compiled = torch.compile(copy.deepcopy(original))
        contestants.append(Contestant(COMPILED, torch_loop(sizes, compiled, arrays)))
    described = dataclasses.asdict(sizes) | {"steps": STEPS}
    return compare("mmdit", described, contestants, WARMUP, repeats, TOLERANCE)


def our_loop(sizes: MMDiTSizes, original: torch.nn.Module, arrays: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
    """The loop of `generate`, which returns latents `[B, C, H, W]`."""
    ours = networks.load_ours(original)
    model = MMCORE(Model(None, None, None, None, ours.config, Pixels("pixel")), ours.execution)
    latent_meta, context_meta = networks.frame_metas(sizes, sizes.batch)
    batch = Interleaved(
        row=np.arange(sizes.batch),
        tokens=None,
        patches=None,
        images=Images(None, None, generated=np.ones((sizes.batch, 1), bool), queries=None, number=None),
        diffusion=Diffusion(context_meta, None, latent_meta, None),
    )
    contexts = arrays["encoder_hidden_states"].reshape(2, sizes.batch, sizes.context, sizes.context_width)
    pooled = arrays["pooled_projections"].reshape(2, sizes.batch, 1, sizes.pooled_width)
    images = arrays["hidden_states"][: sizes.batch].transpose(0, 2, 3, 1)
    settings = Sampling("euler", STEPS, SCALE, 1.0, (0.0, 1.0), 0.0, SHIFT, "linspace")
    timesteps = solver.timesteps(settings.steps, settings.timestep_shift, settings.timestep_spacing)

    @jax.jit
    def loop(params: Any, *inputs: Any) -> jax.Array:
        tokens = integrate(model.bind({"params": {"dit": params}}), *inputs, settings)
        return unpatchify(tokens, ours.config.patch_size, *images.shape[1:3]).transpose(0, 3, 1, 2)

    branches = guidance.branches("text", SCALE, 1.0)
    noise = patchify(images, ours.config.patch_size)
    inputs = jax.device_put((Condition(contexts, pooled), branches, noise, batch, timesteps))
    return lambda: np.asarray(loop(ours.params, *inputs))


def torch_loop(
    sizes: MMDiTSizes, transformer: torch.nn.Module, arrays: dict[str, np.ndarray]
) -> Callable[[], np.ndarray]:
    """The loop of `StableDiffusion3Pipeline`, from prompt embeddings to latents `[B, C, H, W]`."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    contexts, pooled = (torch.from_numpy(arrays[name]) for name in ("encoder_hidden_states", "pooled_projections"))

    @torch.inference_mode()
    def run() -> np.ndarray:
        scheduler.set_timesteps(STEPS)
        latents = torch.from_numpy(arrays["hidden_states"][: sizes.batch])
        for timestep in scheduler.timesteps:
            both = torch.cat([latents] * 2)
            velocities = transformer(
                hidden_states=both,
                encoder_hidden_states=contexts,
                pooled_projections=pooled,
                timestep=timestep.expand(both.shape[0]),
            ).sample
            without, given = velocities.chunk(2)
            latents = scheduler.step(without + SCALE * (given - without), timestep, latents).prev_sample
        return latents.numpy()

    return run
