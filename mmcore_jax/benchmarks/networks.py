"""Small published networks with random weights, ours with the same weights, and one batch for both.

The weights go through the files that `save_pretrained` writes and the key maps of `pretrained`. B rows, L tokens.
"""

import dataclasses
import tempfile

import diffusers
import numpy as np
import torch
import transformers

from mmcore_jax import pretrained
from mmcore_jax.config import Execution
from mmcore_jax.nn.masks import NOISED, TEXT, TokenMeta
from mmcore_jax.pretrained import Pretrained

# As the recipes for a CPU have it.
EXECUTION = Execution("float32", "float32", "dense", scan_layers=False, remat="none")
IMAGE_TOKEN = 0
CHANNELS = 64  # of a head


@dataclasses.dataclass(frozen=True)
class MMDiTSizes:
    """SD3: an image of `side` by `side` patches and `context` tokens in each row."""

    width: int = 384
    depth: int = 4
    side: int = 16
    context: int = 77
    context_width: int = 512
    pooled_width: int = 256
    batch: int = 4


@dataclasses.dataclass(frozen=True)
class VLMSizes:
    """Qwen2.5-VL: a text of `tokens`, an image of `side` by `side` patches among them, in each row."""

    width: int = 384
    depth: int = 4
    kv_heads: int = 2
    mlp_width: int = 1024
    vocabulary: int = 4096
    tokens: int = 384
    side: int = 16
    vision_width: int = 256
    vision_depth: int = 4
    batch: int = 4


def load_ours(original: torch.nn.Module) -> Pretrained:
    """Our network with the weights of a published one, in float32."""
    with tempfile.TemporaryDirectory() as directory:
        original.save_pretrained(directory)
        return pretrained.load(directory, dtype="float32", execution=EXECUTION)


# --- MMDiT ------------------------------------------------------------------------------------------------------------


def make_mmdit(sizes: MMDiTSizes) -> diffusers.SD3Transformer2DModel:
    """An SD3 with QK norm."""
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=2 * sizes.side,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=sizes.depth,
        attention_head_dim=CHANNELS,
        num_attention_heads=sizes.width // CHANNELS,
        joint_attention_dim=sizes.context_width,
        caption_projection_dim=sizes.width,
        pooled_projection_dim=sizes.pooled_width,
        pos_embed_max_size=2 * sizes.side,
        qk_norm="rms_norm",
    )


def mmdit_arrays(sizes: MMDiTSizes, rows: int) -> dict[str, np.ndarray]:
    """What the published `forward` takes, random, for so many rows."""
    shapes = dict(
        hidden_states=(rows, 16, 2 * sizes.side, 2 * sizes.side),
        encoder_hidden_states=(rows, sizes.context, sizes.context_width),
        pooled_projections=(rows, sizes.pooled_width),
    )
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return arrays | {"timestep": 1000 * rng.uniform(0.1, 1.0, rows).astype(np.float32)}


def frame_metas(sizes: MMDiTSizes, rows: int) -> tuple[TokenMeta, TokenMeta]:
    """Metadata of the latents and of the context, where each row draws one image from a text."""
    row, col = np.indices((sizes.side, sizes.side)).reshape(2, -1) - (sizes.side + 1) // 2
    nothing = np.zeros(sizes.context, int)
    return _meta(rows, NOISED, row, col), _meta(rows, TEXT, nothing, nothing)


def _meta(rows: int, kind: int, row: np.ndarray, col: np.ndarray) -> TokenMeta:
    fields = np.broadcast_arrays(0, 0, kind, row, col, np.arange(row.size))
    return TokenMeta(*(np.broadcast_to(field, (rows, row.size)).astype(np.int32) for field in fields))


# --- VLM --------------------------------------------------------------------------------------------------------------


def make_vlm(sizes: VLMSizes) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL whose every other block of the vision tower looks beyond windows of 4 by 4 patches."""
    torch.manual_seed(0)
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=dict(
                hidden_size=sizes.width,
                num_hidden_layers=sizes.depth,
                num_attention_heads=sizes.width // CHANNELS,
                num_key_value_heads=sizes.kv_heads,
                intermediate_size=sizes.mlp_width,
                vocab_size=sizes.vocabulary,
                rope_parameters=dict(rope_type="default", mrope_section=[8, 12, 12], rope_theta=1e6),
                bos_token_id=1,
                eos_token_id=2,
                use_cache=False,
            ),
            vision_config=dict(
                depth=sizes.vision_depth,
                hidden_size=sizes.vision_width,
                num_heads=sizes.vision_width // CHANNELS,
                intermediate_size=2 * sizes.vision_width,
                patch_size=14,
                window_size=56,
                fullatt_block_indexes=list(range(1, sizes.vision_depth, 2)),
                out_hidden_size=sizes.width,
            ),
            image_token_id=IMAGE_TOKEN,
            vision_start_token_id=3,
            vision_end_token_id=4,
            video_token_id=5,
        )
    )


def vlm_arrays(sizes: VLMSizes) -> dict[str, np.ndarray]:
    """What the published processor makes of a batch: each row begins with an image and goes on with random text."""
    rng, merged = np.random.default_rng(0), (sizes.side // 2) ** 2
    ids = rng.integers(6, sizes.vocabulary, (sizes.batch, sizes.tokens))
    ids[:, 0], ids[:, 1 : 1 + merged], ids[:, 1 + merged] = 3, IMAGE_TOKEN, 4
    return dict(
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        pixel_values=rng.standard_normal((sizes.batch * sizes.side**2, 6 * 14**2), np.float32),
        image_grid_thw=np.tile([1, sizes.side, sizes.side], (sizes.batch, 1)),
    )


SIZES = {"mmdit": MMDiTSizes(), "vlm": VLMSizes()}
