"""Model FLOPs of one training step, counted analytically: the numerator of model FLOPs utilisation (MFU).

The convention:
- A product of `[m, k]` and `[k, n]` is 2 m k n. All else (norms, softmax, biases, rotary codes, look-ups) is 0.
- Only what is useful counts: no padding, logits only where a token carries the next-token loss, the vision target and
  the connector only for generated images, one modulation a timestep and not one a token. A convolution multiplies its
  kernel at every position of its output, borders included; the autoencoder counts as if it never tiled.
- Attention is mask-exact: pairs (query, key) that the rule lets see each other, counted on the batch itself.
- What rematerialisation computes again is not counted.
- Backward is what it needs to be. A kernel costs its forward product again for the gradient of its input, where
  anything that trains lies in its part or before it, and once more for its own gradient, where it trains itself: 3
  forwards for what trains, 2 for a frozen part that passes gradients on, 1 for a frozen part that does not. Attention
  has no weights: both of its products have two inputs, so where gradients pass it costs 3 forwards, frozen or not.
- Parts that no active objective of the stage needs are 0, and so are those whose features the batch brings.

Kernels are taken from the shapes of the plan, so a new layer counts itself, and a new part is an error until the table
says how many rows it multiplies. B rows, L tokens, S vision patches, I images of a row, N query tokens.
"""

import math
import re
from collections.abc import Iterator

import jax
import numpy as np

from mmcore_jax.config import AutoencoderKL, Config, SiglipVision, TransformerConnector
from mmcore_jax.data.layout import Features, Interleaved, Pairs
from mmcore_jax.nn import masks
from mmcore_jax.nn.layers import is_lora
from mmcore_jax.nn.masks import CLEAN, PAD, TEXT, VISUAL, Rule, TokenMeta
from mmcore_jax.training.state import Plan

QUERY_BLOCK = 1024  # queries whose pairs are counted at once: bounds memory

# Part -> the trainable parameters that a gradient passing through it is for: its own, and those of the parts before it.
_VLM = "queries/.*|vlm/(embedding|vision/.*|decoder/.*)"
_REACHES = {
    "vlm/vision": "vlm/vision/.*",
    "vlm/decoder": _VLM,
    "vlm/head": _VLM,
    "connector": f"{_VLM}|connector/.*",
    "vision_target": "vision_target/.*",
    "conditioning": f"{_VLM}|(connector|conditioning)/.*",
    "dit": f"{_VLM}|(connector|conditioning|frames|dit)/.*",
    "autoencoder": "autoencoder/.*",
}

# Features that a batch may bring -> the parts that then do not run.
_GIVEN = {"latents": "autoencoder", "targets": "vision_target", "visual": "vlm/.*|connector"}

# Kernel -> its part, and what counts the rows that it multiplies. The first pattern that matches the whole path wins.
_KERNELS = (
    ("vlm/vision/merger/.*", "vlm/vision", "merged_patches"),
    ("vlm/vision/.*", "vlm/vision", "patches"),
    ("vlm/decoder/.*", "vlm/decoder", "tokens"),
    ("vlm/(head|embedding)", "vlm/head", "targets"),
    ("connector/.*", "connector", "queries"),
    ("vision_target/vision/head/[kv]/.*", "vision_target", "pooled_patches"),
    ("vision_target/vision/head/.*", "vision_target", "pairs"),
    ("vision_target/vision/.*", "vision_target", "target_patches"),
    ("vision_target/text/head/.*", "vision_target", "pairs"),
    ("vision_target/text/.*", "vision_target", "target_tokens"),
    ("conditioning/text_.*", "conditioning", "context_text"),
    ("conditioning/visual_.*", "conditioning", "context_visual"),
    ("conditioning/(pooled|clean)_.*", "conditioning", "generated"),  # about as many images are looked back at
    ("dit/pooled_embed/.*", "dit", "generated"),
    ("dit/(timestep_embed|norm_out|.*/[xy]_modulation)/.*", "dit", "timesteps"),
    ("dit/(context_embed|.*/y_[a-z]+)/.*", "dit", "context"),
    ("dit/(patch_embed|out|.*/(x|dual)_[a-z]+)/.*", "dit", "latents"),
)

# Dense bfloat16 peaks, FLOP/s, by a prefix of `device_kind`: the first that matches.
_PEAKS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p
    ("TPU v6", 918e12),  # v6e
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", 989e12),
)


def peak_flops(device: jax.Device) -> float | None:
    """The published dense bfloat16 peak of a device in FLOP/s, whatever dtype the run computes in; None if unknown."""
    return next((peak for prefix, peak in _PEAKS if device.device_kind.startswith(prefix)), None)


def step_flops(config: Config, plan: Plan, batch: Interleaved | Pairs) -> dict[str, float]:
    """Model FLOPs of one training step on these rows, by part and as "total".

    Args:
      config: its model, objectives and batch size.
      plan: shapes of the parameters, and which of them train.
      batch: host arrays; of several processes, each counts its own rows.

    Raises:
      ValueError: naming a kernel that the table does not know.
    """
    rows, attention = _count(config, batch)
    trainable = set(plan.trainable)
    reached = {part: any(re.fullmatch(pattern, path) for path in trainable) for part, pattern in _REACHES.items()}
    flops = dict.fromkeys(_REACHES, 0.0)
    for path, shape in plan.shapes.items():
        if _is_kernel(config, path):
            part, counted_by = _line(path)
            forward = 2.0 * rows.get(counted_by, 0) * math.prod(shape.shape)
            flops[part] += forward * (1 + reached[part] + (path in trainable))
    for part, forward in attention:
        flops[part] += forward * (3 if reached[part] else 1)
    given = batch.features if isinstance(batch, Interleaved) else Features()
    for field, pattern in _GIVEN.items():
        if getattr(given, field) is not None:
            flops |= {part: 0.0 for part in flops if re.fullmatch(pattern, part)}
    used = {part: count for part, count in flops.items() if count}
    return used | {"total": sum(used.values())}


def attention_pairs(q: TokenMeta, k: TokenMeta, rule: Rule) -> int:
    """How many pairs of a query that is not padding and a key the rule lets see each other; host metadata `[B, L]`."""
    total = 0
    for row in range(q.kind.shape[0]):
        keys = TokenMeta(*(field[row][None, :] for field in k))
        used = np.flatnonzero(q.kind[row] != PAD)
        for start in range(0, used.size, QUERY_BLOCK):
            block = used[start : start + QUERY_BLOCK]
            total += np.count_nonzero(rule(TokenMeta(*(field[row][block, None] for field in q)), keys))
    return int(total)


def _is_kernel(config: Config, path: str) -> bool:
    """Whether a parameter is a factor of a matrix product: a tied embedding is, as the head."""
    tied = config.model.vlm is not None and config.model.vlm.tie_embeddings
    return path.endswith("/kernel") or is_lora(path) or path == ("vlm/embedding" if tied else "vlm/head")


def _line(path: str) -> tuple[str, str]:
    if path.startswith("autoencoder/"):
        return "autoencoder", _positions(path)
    for pattern, part, counted_by in _KERNELS:
        if re.fullmatch(pattern, path):
            return part, counted_by
    raise ValueError(f"training/flops.py does not know how many rows the parameter {path!r} multiplies")


def _positions(path: str) -> str:
    """What counts the positions of a kernel of the autoencoder: a level of the encoder. The decoder never runs here."""
    if path.startswith(("autoencoder/decoder/", "autoencoder/post_quant_conv/")):
        return "decoded"
    if path.startswith("autoencoder/encoder/conv_in/"):
        return "encoded_0"
    down = re.match(r"autoencoder/encoder/down_(\d+)/(downsample/)?", path)
    return f"encoded_{int(down[1]) + bool(down[2])}" if down else "encoded"


# --- What a batch holds -----------------------------------------------------------------------------------------------

Attention = Iterator[tuple[str, float]]


def _count(config: Config, batch: Interleaved | Pairs) -> tuple[dict[str, int], list[tuple[str, float]]]:
    """Rows by name, and forward FLOPs of the products between activations by part, of what the objectives need."""
    if isinstance(batch, Pairs):
        return _pair_rows(config, batch), list(_pair_attention(config, batch))
    return _interleaved_rows(config, batch), list(_interleaved_attention(config, batch))


def _interleaved_rows(config: Config, batch: Interleaved) -> dict[str, int]:
    active, latents = config.objectives, batch.diffusion.latent_meta
    images = int(np.count_nonzero(batch.images.generated))
    patches = _used(batch.patches.meta)
    rows = {"tokens": _used(batch.tokens.meta), "patches": patches}
    rows["merged_patches"] = patches // config.model.vlm.vision.merge_size**2
    if active.next_token:
        rows["targets"] = int(np.count_nonzero(batch.tokens.targets >= 0))
    if active.alignment:
        rows["target_patches"] = images * _patches(config.model.vision_target.vision)
    if active.alignment or active.flow_matching:
        rows["queries"] = images * batch.images.queries.shape[-1]
    if active.flow_matching:
        kinds = batch.diffusion.context_meta.kind
        rows["context"] = _used(batch.diffusion.context_meta)
        rows["context_text"] = int(np.count_nonzero(kinds == TEXT))
        rows["context_visual"] = int(np.count_nonzero(kinds == VISUAL))
        rows["latents"] = _used(latents)
        rows["generated"] = images
        # One timestep for each generated frame, and t = 0 for all clean frames of a row.
        rows["timesteps"] = images + int(np.count_nonzero((latents.kind == CLEAN).any(axis=1)))
        rows |= _encoder_rows(config, batch)
    return rows


def _encoder_rows(config: Config, batch: Interleaved) -> dict[str, int]:
    """Positions at each level of the autoencoder's encoder, and of latents."""
    c, images = config.model.autoencoder, _encoded_images(batch)
    if not isinstance(c, AutoencoderKL):
        return {}
    height, width = batch.images.pixels.shape[2:4]
    levels = [images * (height >> level) * (width >> level) for level in range(len(c.block_channels))]
    return {f"encoded_{level}": positions for level, positions in enumerate(levels)} | {"encoded": levels[-1]}


def _encoded_images(batch: Interleaved) -> int:
    """Images of which the diffusion sequence has a copy, clean or noised or both."""
    meta = batch.diffusion.latent_meta
    return sum(np.unique(frames[kinds != PAD]).size for frames, kinds in zip(meta.frame, meta.kind))


def _interleaved_attention(config: Config, batch: Interleaved) -> Attention:
    model, active = config.model, config.objectives
    tokens, patches = batch.tokens.meta, batch.patches.meta
    yield "vlm/decoder", _scores(model.vlm.width, model.vlm.depth, attention_pairs(tokens, tokens, masks.causal))

    vision = model.vlm.vision
    full = len(set(vision.full_attention_blocks) & set(range(vision.depth)))
    yield "vlm/vision", _scores(vision.width, full, attention_pairs(patches, patches, masks.same_frame))
    places = TokenMeta(*map(np.asarray, masks.windows(patches, vision.window_size // vision.patch_size, False)))
    pairs = attention_pairs(places, places, masks.same_place)
    yield "vlm/vision", _scores(vision.width, vision.depth - full, pairs)

    images = int(np.count_nonzero(batch.images.generated))
    if isinstance(model.connector, TransformerConnector) and (active.alignment or active.flow_matching):
        encoder, queries = model.connector.encoder, batch.images.queries.shape[-1]
        yield "connector", _scores(encoder.width, encoder.depth, images * queries**2)
    if active.alignment:
        target = model.vision_target.vision
        yield "vision_target", _scores(target.width, target.depth, images * _patches(target) ** 2)
    if active.flow_matching:
        context, latents = batch.diffusion.context_meta, batch.diffusion.latent_meta
        rule = masks.DIFFUSION_RULES[model.dit.visibility]
        joint = TokenMeta(*(np.concatenate(fields, axis=1) for fields in zip(context, latents)))
        yield "dit", _scores(model.dit.width, model.dit.depth, attention_pairs(joint, joint, rule))
        if model.dit.dual_layers:
            pairs = attention_pairs(latents, latents, rule)
            yield "dit", _scores(model.dit.width, model.dit.dual_layers, pairs)
        c = model.autoencoder
        if isinstance(c, AutoencoderKL) and c.mid_attention:
            positions = math.prod(side // c.downsampling for side in batch.images.pixels.shape[2:4])
            yield "autoencoder", _scores(c.block_channels[-1], 1, _encoded_images(batch) * positions**2)


def _pair_rows(config: Config, batch: Pairs) -> dict[str, int]:
    images, patches = batch.row.size, _patches(config.model.vision_target.vision)
    return {
        "pairs": images,
        "target_patches": images * patches,
        "pooled_patches": images * patches,
        "target_tokens": int(np.count_nonzero(batch.valid)),
    }


def _pair_attention(config: Config, batch: Pairs) -> Attention:
    vision, text = config.model.vision_target.vision, config.model.vision_target.text
    images, patches = batch.row.size, _patches(vision)
    yield "vision_target", _scores(vision.width, vision.depth, images * patches**2)
    yield "vision_target", _scores(vision.width, 1, images * patches)  # the probe
    yield "vision_target", _scores(text.width, text.depth, int(np.sum(np.sum(batch.valid, axis=1) ** 2)))
    # Every image with every text of the global batch, or of its accumulation part.
    yield "vision_target", 2.0 * images * config.batch_size / config.optimizer.accumulation * vision.width


def _scores(width: int, depth: int, pairs: int) -> float:
    """Forward FLOPs of attention: scores and weighted values, for all heads of `depth` layers."""
    return 4.0 * width * depth * pairs


def _used(meta: TokenMeta) -> int:
    return int(np.count_nonzero(meta.kind != PAD))


def _patches(vision: SiglipVision) -> int:
    return (vision.image_size // vision.patch_size) ** 2
