"""Published networks that the full-size recipes are made of, and where their checkpoints are expected.

A directory holds what the hub serves under its name: for Qwen2.5-VL config.json, the tokenizer and *.safetensors; for
SigLIP config.json and *.safetensors; of Stable Diffusion 3.5 the folders `transformer` and `vae` are read.
"""

import functools
from collections.abc import Callable

from ml_collections import ConfigDict

CHECKPOINTS, INDEX = "checkpoints", "data/index"
QWEN_3B, QWEN_7B = f"{CHECKPOINTS}/Qwen2.5-VL-3B-Instruct", f"{CHECKPOINTS}/Qwen2.5-VL-7B-Instruct"
SIGLIP = f"{CHECKPOINTS}/siglip-so400m-patch14-384"
SD35_MEDIUM, SD35_LARGE = f"{CHECKPOINTS}/stable-diffusion-3.5-medium", f"{CHECKPOINTS}/stable-diffusion-3.5-large"

SIGLIP_WIDTH = 1152
VLM_PIXELS = (56 * 56, 448 * 448)  # at most 256 tokens an image
VLM_PATCHES = 448 * 448 // 14**2


def source(task: str, weight: float) -> ConfigDict:
    """The user's own examples of a task, where their shards are expected."""
    return ConfigDict(dict(kind="array_record", shards=f"data/{task}/*.array_record", weight=weight))


def gauges(*tasks: str) -> ConfigDict:
    """Measures on held-out examples of tasks, where their shards are expected."""
    sources = {task: source(f"held_out/{task}", 1.0) for task in tasks}
    return ConfigDict(dict(every=1000, examples=64, sources=sources))


def qwen_3b() -> ConfigDict:
    """Qwen2.5-VL-3B."""
    sizes = dict(width=2048, depth=36, heads=16, kv_heads=2, mlp_width=11008, vocab_size=151936, tie_embeddings=True)
    return _qwen(**sizes)


def qwen_7b() -> ConfigDict:
    """Qwen2.5-VL-7B."""
    sizes = dict(width=3584, depth=28, heads=28, kv_heads=4, mlp_width=18944, vocab_size=152064, tie_embeddings=False)
    return _qwen(**sizes)


def _qwen(**sizes: int | bool) -> ConfigDict:
    vision = dict(
        width=1280,
        depth=32,
        heads=16,
        mlp_width=3420,
        patch_size=14,
        merge_size=2,
        window_size=112,
        full_attention_blocks=(7, 15, 23, 31),
    )
    positions = dict(mrope_section=(16, 24, 24), rope_theta=1_000_000.0)
    return ConfigDict(dict(**sizes, **positions, rms_norm_eps=1e-6, vision=vision))


def transformer_connector(width: int, depth: int) -> ConfigDict:
    """A transformer encoder as wide as the VLM, with heads of 64 channels, then the map to SigLIP."""
    encoder = dict(width=width, depth=depth, heads=width // 64, mlp_width=4 * width)
    return ConfigDict(dict(kind="transformer", width=SIGLIP_WIDTH, encoder=encoder))


def siglip() -> ConfigDict:
    """The vision tower of SigLIP so400m, patches of 14 at 384 pixels: 27 x 27 features."""
    vision = dict(width=SIGLIP_WIDTH, depth=27, heads=16, mlp_width=4304, image_size=384, patch_size=14)
    return ConfigDict(dict(vision=vision, text=None))


def sd35_medium() -> ConfigDict:
    """Stable Diffusion 3.5 medium, with dual attention."""
    return _sd35(width=1536, depth=24, heads=24, dual_layers=13, position_grid=384)


def sd35_large() -> ConfigDict:
    """Stable Diffusion 3.5 large."""
    return _sd35(width=2432, depth=38, heads=38, dual_layers=0, position_grid=192)


def _sd35(**sizes: int) -> ConfigDict:
    return ConfigDict(
        dict(
            **sizes,
            qk_norm=True,
            patch_size=2,
            latent_channels=16,
            context_width=4096,
            pooled_width=2048,
            position="sincos",
            position_base=64,
            position_origin="centre",
            query_gain=1.0,
            prediction="velocity",
            query_positions=True,
        )
    )


def sd3_autoencoder() -> ConfigDict:
    """The 16-channel autoencoder of Stable Diffusion 3 and 3.5, in tiles beyond 2048 pixels."""
    return ConfigDict(
        dict(
            kind="kl",
            block_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            norm_groups=32,
            quant_convs=False,
            mid_attention=True,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            tile=256,
        )
    )


def optimizer(**changes: float | str) -> ConfigDict:
    """AdamW, warmed up, then falling to a tenth along a cosine, but for what a stage changes; betas are (0.9, 0.95)."""
    settings = dict(
        learning_rate=1e-4,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,
        warmup_steps=1000,
        decay="cosine",
        flat=0.0,
        final=0.1,
        ema_decay=0.0,
        accumulation=1,
    )
    return ConfigDict(settings | changes)


def mesh() -> ConfigDict:
    """Parameters split over all devices."""
    return ConfigDict(dict(data=1, fsdp=-1, context=1, tensor=1))


# Meshes of pods of that many chips (Google names a v5p by its cores: 128 chips are its type v5p-256), in groups that
# all published widths divide by and whose gradients are scattered, not gathered.
PODS = dict(
    v5e_64=dict(data=2, fsdp=32),
    v5e_256=dict(data=8, fsdp=32),
    v5p_128=dict(data=4, fsdp=32),
)
ACCUMULATION = dict(v5e_64=4, v5e_256=1, v5p_128=1)  # a chip of v5e holds one row of the batch of 256 at once
FITTING = dict(qwen25vl3b_sd35m=("v5e_64", "v5e_256"), qwen25vl7b_sd35l=("v5e_256", "v5p_128"))


def on_pods(recipes: dict[str, Callable[[], ConfigDict]]) -> dict[str, Callable[[], ConfigDict]]:
    """The recipes, and `RECIPE_POD` for those that have a pod: the same runs, on a mesh and in pieces that fit it."""

    def on(recipe: str, pod: str) -> ConfigDict:
        config = recipes[recipe]()
        config.mesh.update(PODS[pod])
        config.optimizer.accumulation = ACCUMULATION[pod]
        return config

    pairs = [(recipe, pod) for recipe, pods in FITTING.items() for pod in pods]
    return recipes | {f"{recipe}_{pod}": functools.partial(on, recipe, pod) for recipe, pod in pairs}


def execution(remat: str) -> ConfigDict:
    """bfloat16 products, one compiled layer a stack, all in it but what `remat` keeps computed again going backward.

    What compiles for minutes is kept for a restart.
    """
    return ConfigDict(
        dict(
            compute_dtype="bfloat16",
            frozen_dtype="bfloat16",
            attention="flash",
            scan_layers=True,
            remat=remat,
            compilation_cache="compiled",
        )
    )
