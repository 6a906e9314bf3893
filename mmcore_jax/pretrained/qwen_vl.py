"""Qwen2.5-VL, by the names of its published files (transformers `Qwen2_5_VLForConditionalGeneration`)."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import numpy as np

from mmcore_jax.config import Bounds, Count, Index, NotNegative, QwenVision, QwenVL
from mmcore_jax.models import qwen_vl as network
from mmcore_jax.pretrained.family import Family
from mmcore_jax.pretrained.files import Section, Settings
from mmcore_jax.pretrained.table import SAME, TRANSPOSED, Entry, linear, rms_norm, video_patch_kernel

# Special tokens of the published tokenizer.
_TOKENS = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": network.IMAGE_TOKEN,
    "video_token_id": 151656,
}
# Newer releases of transformers may write the decoder and the tower as siblings within the model.
_PREFIXES = {"model.language_model.": "model.", "model.visual.": "visual."}
# The linear layers of the decoder, by our names.
_LINEAR = {name: f"self_attn.{name}_proj" for name in "qkv"} | {"out": "self_attn.o_proj"}
_LINEAR |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_Base = Annotated[float, Bounds(1)]

# --- Config -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Whole(Section):
    """What belongs to neither tower."""

    image_token_id: Index
    tie_word_embeddings: bool = False


@dataclasses.dataclass(frozen=True)
class _Text(Section):
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    intermediate_size: Count
    vocab_size: Count
    rms_norm_eps: NotNegative
    hidden_act: Literal["silu"]
    use_sliding_window: Literal[False] = False
    tie_word_embeddings: bool = False
    rope_theta: _Base | None = None


@dataclasses.dataclass(frozen=True)
class _Rope(Section):
    mrope_section: tuple[Count, Count, Count]
    rope_theta: _Base | None = None
    type: Literal["mrope", "default"] = "default"
    rope_type: Literal["mrope", "default"] = "default"


@dataclasses.dataclass(frozen=True)
class _Vision(Section):
    """Defaults are what transformers assumes; its release 4.49 left out what is equal to them, as in the 32B model."""

    hidden_size: Count
    depth: Count = 32
    num_heads: Count = 16
    intermediate_size: Count = 3420
    patch_size: Count = 14
    spatial_merge_size: Count = 2
    window_size: Count = 112
    fullatt_block_indexes: tuple[Index, ...] = (7, 15, 23, 31)
    out_hidden_size: Count = 3584
    hidden_act: Literal["silu"] = "silu"
    temporal_patch_size: Literal[network.TEMPORAL_PATCH] = network.TEMPORAL_PATCH


def read_config(settings: Settings) -> QwenVL:
    """Published files keep the decoder's settings beside all others, newer ones within `text_config`."""
    whole, beside = settings.read(_Whole), settings.section("text_config") if "text_config" in settings else settings
    text, vision = beside.read(_Text), settings.section("vision_config").read(_Vision)
    rope = beside.section("rope_parameters" if "rope_parameters" in beside else "rope_scaling").read(_Rope)
    rope_theta = rope.rope_theta or text.rope_theta
    text.require_multiple("hidden_size", "num_attention_heads")
    text.require_multiple("num_attention_heads", "num_key_value_heads")
    frequencies = text.hidden_size // text.num_attention_heads / 2
    rope.require("mrope_section", sum(rope.mrope_section) == frequencies, f"a sum of {frequencies:g}, half a head")
    (rope if "rope_theta" in rope.source else text).require("rope_theta", rope_theta is not None, "a number")
    heads = vision.num_heads
    vision.require(
        "hidden_size", vision.hidden_size % (4 * heads) == 0, f"a multiple of 4 for each of {heads} num_heads"
    )
    unit = vision.patch_size * vision.spatial_merge_size
    vision.require("window_size", vision.window_size % unit == 0, f"a multiple of {unit}, the side of a merged patch")
    vision.require("out_hidden_size", vision.out_hidden_size == text.hidden_size, text.hidden_size)
    return QwenVL(
        width=text.hidden_size,
        depth=text.num_hidden_layers,
        heads=text.num_attention_heads,
        mlp_width=text.intermediate_size,
        vocab_size=text.vocab_size,
        kv_heads=text.num_key_value_heads,
        mrope_section=rope.mrope_section,
        rope_theta=rope_theta,
        rms_norm_eps=text.rms_norm_eps,
        tie_embeddings=whole.tie_word_embeddings or text.tie_word_embeddings,
        vision=QwenVision(
            width=vision.hidden_size,
            depth=vision.depth,
            heads=vision.num_heads,
            mlp_width=vision.intermediate_size,
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            full_attention_blocks=vision.fullatt_block_indexes,
        ),
    )


def write_config(c: QwenVL, dtype: str) -> dict[str, Any]:
    """As the published files have it, which every release reads."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "intermediate_size": c.mlp_width,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": 128000,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(c.mrope_section)},
        "tie_word_embeddings": c.tie_embeddings,
        "use_sliding_window": False,
        **_TOKENS,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "hidden_size": c.vision.width,
            "depth": c.vision.depth,
            "num_heads": c.vision.heads,
            "intermediate_size": c.vision.mlp_width,
            "in_channels": 3,
            "out_hidden_size": c.width,
            "patch_size": c.vision.patch_size,
            "temporal_patch_size": network.TEMPORAL_PATCH,
            "spatial_merge_size": c.vision.merge_size,
            "window_size": c.vision.window_size,
            "fullatt_block_indexes": list(c.vision.full_attention_blocks),
            "tokens_per_second": 2,
        },
    }


# --- Table ------------------------------------------------------------------------------------------------------------


def rename(c: QwenVL, name: str) -> str | None:
    """The published name; None for a copy of tied embeddings."""
    if c.tie_embeddings and name == "lm_head.weight":
        return None
    return re.sub(r"^model\.(language_model|visual)\.", lambda prefix: _PREFIXES[prefix[0]], name)


def entries(c: QwenVL) -> list[Entry]:
    """The key table."""
    return [*_decoder(c), *_tower(c)]


def _decoder(c: QwenVL) -> Iterator[Entry]:
    yield Entry("model.embed_tokens.weight", ("embedding",), SAME)
    yield from rms_norm("model.norm", "decoder/norm")
    if not c.tie_embeddings:
        yield Entry("lm_head.weight", ("head",), TRANSPOSED)
    theirs, ours = "model.layers.{}", "decoder/blocks"
    for name, layer in _LINEAR.items():
        yield from linear(f"{theirs}.{layer}", f"{ours}/{name}", layers=c.depth, bias=name in "qkv")
    yield from rms_norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm", c.depth)
    yield from rms_norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm", c.depth)


def _tower(c: QwenVL) -> Iterator[Entry]:
    patches = video_patch_kernel(network.TEMPORAL_PATCH, c.vision.patch_size, 3)
    yield Entry("visual.patch_embed.proj.weight", ("vision/patch_embed/kernel",), patches)
    theirs, ours, depth = "visual.blocks.{}", "vision/blocks", c.vision.depth
    yield from linear(f"{theirs}.attn.qkv", *(f"{ours}/{name}" for name in "qkv"), layers=depth)
    yield from linear(f"{theirs}.attn.proj", f"{ours}/out", layers=depth)
    for name in ("gate", "up", "down"):
        yield from linear(f"{theirs}.mlp.{name}_proj", f"{ours}/{name}", layers=depth)
    yield from rms_norm(f"{theirs}.norm1", f"{ours}/attention_norm", depth)
    yield from rms_norm(f"{theirs}.norm2", f"{ours}/mlp_norm", depth)
    yield from rms_norm("visual.merger.ln_q", "vision/merger/norm")
    yield from linear("visual.merger.mlp.0", "vision/merger/up")
    yield from linear("visual.merger.mlp.2", "vision/merger/down")


def lora_entries(c: QwenVL) -> list[Entry]:
    """The key table of an adapter, which PEFT names by the modules of transformers 5."""
    names = [(f"base_model.model.model.language_model.layers.{{}}.{_LINEAR[name]}", name) for name in c.lora.targets]
    return [
        Entry(f"{theirs}.lora_{letter.upper()}.weight", (f"decoder/blocks/{name}/lora_{letter}",), TRANSPOSED, c.depth)
        for theirs, name in names
        for letter in "ab"
    ]


def lora_modules(c: QwenVL) -> str:
    """The layers of the decoder only: those of the tower have the same last names."""
    names = "|".join(_LINEAR[name].replace(".", r"\.") for name in c.lora.targets)
    return rf".*language_model\.layers\.\d+\.({names})"


# --- Network ----------------------------------------------------------------------------------------------------------


def init(model: nn.Module, key: jax.Array) -> Any:
    """Variables, from an image of one merged patch."""
    vision, image = model.config.vision, np.zeros((1, 1), np.int32)
    patches = np.zeros((vision.merge_size**2, 3 * network.TEMPORAL_PATCH * vision.patch_size**2), np.float32)
    grid = np.array([[1, vision.merge_size, vision.merge_size]])
    return model.init(key, network.prepare(model.config, image, image + 1, patches, grid, image_token=0))


def forward(model: nn.Module, params: Any, settings: Settings, **arrays: Any) -> jax.Array:
    """`input_ids, attention_mask, pixel_values, image_grid_thw` to logits `[B, L, V]`."""
    return network.forward(model, params, **arrays, image_token=settings["image_token_id"])


def comparisons(loaded: Any, directory: pathlib.Path) -> Iterator[tuple[str, jax.Array, np.ndarray]]:
    """Logits of two rows, one with an image between texts and one shorter and padded."""
    import torch
    import transformers

    c, image_token, rng = loaded.config, loaded.settings["image_token_id"], np.random.default_rng(0)
    side = 4 * c.vision.merge_size
    # Published ids end with special tokens, some of them of videos; those of a tokenizer trained here begin with them.
    ids = rng.integers(0, image_token, (2, 64)) if 2 * image_token > c.vocab_size else 64 + rng.integers(0, 64, (2, 64))
    ids[0, 16:32] = image_token
    mask = np.arange(64) < np.array([[64], [40]])
    patches = rng.normal(size=(side**2, 3 * network.TEMPORAL_PATCH * c.vision.patch_size**2)).astype(np.float32)
    arrays = dict(input_ids=ids, attention_mask=mask.astype(np.int64), pixel_values=patches)
    arrays["image_grid_thw"] = np.array([[1, side, side]])
    original = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    ).eval()
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    tensors["mm_token_type_ids"] = torch.from_numpy((ids == image_token).astype(np.int64))
    with torch.no_grad():
        theirs = original(**tensors).logits.numpy()
    yield "logits", loaded(**arrays)[mask], theirs[mask]


FAMILY = Family(
    name="Qwen2.5-VL",
    part="vlm",
    component="text_encoder",
    kinds=("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    stem="model",
    read_config=read_config,
    write_config=write_config,
    config=QwenVL,
    entries=entries,
    model=network.QwenVLModel,
    init=init,
    forward=forward,
    comparisons=comparisons,
    rename=rename,
    beside=("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"),
    lora_entries=lora_entries,
    lora_modules=lora_modules,
)
