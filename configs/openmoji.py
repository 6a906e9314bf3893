"""Parts that the embedded recipes share between their stages: small networks for 32-pixel drawings, and larger ones.

Rendered from OpenMoji (CC BY-SA 4.0) by `python -m mmcore_jax.prepare --dataset openmoji --output data/openmoji`.
"""

from ml_collections import ConfigDict

IMAGE_SIZE = 32
VLM_PIXELS = (IMAGE_SIZE**2, IMAGE_SIZE**2)
VOCABULARY = 4096  # room for the 3,335 tokens of the captions
DATA = "data/openmoji"
TOKENIZER = f"{DATA}/tokenizer"
INDEX = f"{DATA}/index"


def source(task: str, weight: float, split: str = "train") -> ConfigDict:
    """The examples of a task."""
    return ConfigDict(dict(kind="array_record", shards=f"{DATA}/{task}-{split}-*.array_record", weight=weight))


def gauges(every: int, *tasks: str) -> ConfigDict:
    """Measures on held-out examples of tasks."""
    return ConfigDict(dict(every=every, examples=20, sources={task: source(task, 1.0, "held_out") for task in tasks}))


def siglip(text: bool) -> ConfigDict:
    """A SigLIP of 128 channels; the stages after the first use its vision tower only."""
    vision = dict(width=128, depth=3, heads=2, mlp_width=512, image_size=IMAGE_SIZE, patch_size=4)
    words = dict(width=128, depth=2, heads=2, mlp_width=512, vocab_size=VOCABULARY, max_length=16)
    # From the published -10, made for batches of 32,768, the bias would not come far in the steps of stage 0.
    bias = -4.85  # minus the logarithm of the 127 other texts of a batch
    return ConfigDict(dict(vision=vision, text=words if text else None, initial_scale=10.0, initial_bias=bias))


def vlm() -> ConfigDict:
    """A Qwen2.5-VL of 192 channels."""
    vision = dict(
        width=96,
        depth=2,
        heads=2,
        mlp_width=256,
        patch_size=4,
        merge_size=2,
        window_size=16,
        full_attention_blocks=(1,),
    )
    return ConfigDict(
        dict(
            width=192,
            depth=4,
            heads=6,
            kv_heads=2,
            mlp_width=512,
            vocab_size=VOCABULARY,
            mrope_section=(4, 6, 6),
            rope_theta=10_000.0,
            rms_norm_eps=1e-6,
            tie_embeddings=False,
            vision=vision,
            lora=None,
        )
    )


def queries() -> ConfigDict:
    """K = 2: four query tokens."""
    return ConfigDict(dict(grid=2))


def connector() -> ConfigDict:
    """MMCORE's linear map to the vision target."""
    return ConfigDict(dict(kind="linear", width=128))


def optimizer(**changes: float | str) -> ConfigDict:
    """AdamW with a short warm-up and a cosine tail, but for what a stage changes."""
    settings = dict(
        learning_rate=2e-3,
        b1=0.9,
        b2=0.98,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,
        warmup_steps=40,
        decay="cosine",
        flat=0.0,
        final=0.02,
        ema_decay=0.98,
        accumulation=1,
    )
    return ConfigDict(settings | changes)


def lengthen(config: ConfigDict) -> ConfigDict:
    """The parts of `openmoji_long`: drawings of 64 pixels in patches of 8, more channels and layers, 16 queries."""
    model = config.model
    config.recipe = "openmoji_long"
    if model.vision_target:
        tower = dict(width=192, depth=4, heads=3, mlp_width=768)
        model.vision_target.vision.update(tower, image_size=64, patch_size=8)
        if model.vision_target.text:
            model.vision_target.text.update(tower)
    if model.vlm:
        model.vlm.update(width=256, depth=6, heads=8, mlp_width=704)
        model.vlm.vision.update(width=128, depth=3, mlp_width=352, patch_size=8, window_size=32)
        model.vlm.vision.full_attention_blocks = (2,)
        model.queries.grid, model.connector.width = 4, 192
        config.data.vlm_pixels = (64**2, 64**2)
        config.data.budgets.update(vlm_tokens=208, vision_patches=192, images=4)
    if model.dit:
        model.dit.update(width=384, depth=6, heads=6, patch_size=8, context_width=256, pooled_width=256)
        config.data.image_size = 64
        config.data.budgets.update(context_tokens=80, latent_tokens=256)
    return config


def documents(config: ConfigDict) -> ConfigDict:
    """Rows with room for a document of three images, of which two are generated, and what tells its images apart."""
    config.recipe = "openmoji_documents"
    config.data.budgets.update(vlm_tokens=112, vision_patches=192, images=4)
    if config.model.dit:
        config.data.budgets.latent_tokens = 256
        config.model.frames = dict(count=3)
        config.init.frames = "random"
    return config


def mesh() -> ConfigDict:
    """All devices along the data axis."""
    return ConfigDict(dict(data=-1, fsdp=1, context=1, tensor=1))


def execution() -> ConfigDict:
    """Layers are unrolled: for four of them a loop saves no compile time worth its overhead on a CPU."""
    return ConfigDict(
        dict(compute_dtype="float32", frozen_dtype="float32", attention="dense", scan_layers=False, remat="none")
    )
