"""SigLIP and SigLIP2, whole or the vision tower alone, by the names of their published files.

In transformers `SiglipModel`, and for NaFlex `Siglip2Model`; SigLIP2 of fixed resolution is published as SigLIP.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.config import Count, NotNegative, Siglip, SiglipText, SiglipVision, Tower, UserError
from mmcore_jax.models.siglip import SiglipModel
from mmcore_jax.pretrained.family import Family
from mmcore_jax.pretrained.files import Section, Settings
from mmcore_jax.pretrained.table import FIRST, SAME, TRANSPOSED, Entry, layer_norm, linear, patch_kernel

_VISION_ONLY = {False: "siglip_vision_model", True: "siglip2_vision_model"}  # by whether it is NaFlex

# --- Config -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tower(Section):
    """Defaults are what transformers assumes."""

    hidden_size: Count = 768
    intermediate_size: Count = 3072
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    layer_norm_eps: NotNegative = 1e-6


@dataclasses.dataclass(frozen=True)
class _Text(_Tower):
    vocab_size: Count = 32000
    max_position_embeddings: Count = 64
    projection_size: Count | None = None


@dataclasses.dataclass(frozen=True)
class _Vision(_Tower):
    """`num_patches` is of NaFlex, `image_size` of fixed resolution."""

    num_channels: Literal[3] = 3
    patch_size: Count = 16
    image_size: Count = 224
    num_patches: Count = 256
    vision_use_head: Literal[True] = True


def read_config(settings: Settings) -> Siglip:
    """From the config.json of both towers, or of the vision tower."""
    alone, naflex = settings["model_type"] in _VISION_ONLY.values(), settings["model_type"].startswith("siglip2")
    vision = (settings if alone else settings.section("vision_config")).read(_Vision)
    patch = vision.patch_size
    vision.require("image_size", vision.image_size >= patch or naflex, f"at least patch_size {patch}")
    image_size = math.isqrt(vision.num_patches) * patch if naflex else vision.image_size
    tower = SiglipVision(**_sizes(vision), image_size=image_size, patch_size=patch, naflex=naflex)
    text = None if alone else _read_text(settings.section("text_config").read(_Text), vision)
    return Siglip(tower, text, vision.layer_norm_eps)


def _read_text(text: _Text, vision: _Vision) -> SiglipText:
    projected = text.projection_size or text.hidden_size
    text.require("projection_size", projected == vision.hidden_size, f"the hidden_size {vision.hidden_size} of images")
    text.require("layer_norm_eps", text.layer_norm_eps == vision.layer_norm_eps, f"{vision.layer_norm_eps} of images")
    return SiglipText(**_sizes(text), vocab_size=text.vocab_size, max_length=text.max_position_embeddings)


def _sizes(tower: _Tower) -> dict[str, int]:
    tower.require_multiple("hidden_size", "num_attention_heads")
    return dict(
        width=tower.hidden_size,
        depth=tower.num_hidden_layers,
        heads=tower.num_attention_heads,
        mlp_width=tower.intermediate_size,
    )


def write_config(c: Siglip, dtype: str) -> dict[str, Any]:
    """Without a text tower, the config.json of the vision tower."""
    naflex, side = c.vision.naflex, c.vision.image_size // c.vision.patch_size
    name, kind = ("Siglip2", "siglip2") if naflex else ("Siglip", "siglip")
    size = {"num_patches": side**2} if naflex else {"image_size": c.vision.image_size}
    vision = _write_tower(c.vision, c.layer_norm_eps) | dict(
        model_type=_VISION_ONLY[naflex], num_channels=3, patch_size=c.vision.patch_size, **size
    )
    if c.text is None:
        return {"architectures": [f"{name}VisionModel"], "torch_dtype": dtype, **vision}
    text = _write_tower(c.text, c.layer_norm_eps) | dict(
        model_type=f"{kind}_text_model",
        vocab_size=c.text.vocab_size,
        max_position_embeddings=c.text.max_length,
        projection_size=c.vision.width,
    )
    return {
        "architectures": [f"{name}Model"],
        "model_type": kind,
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": vision,
    }


def _write_tower(c: Tower, eps: float) -> dict[str, Any]:
    return {
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": eps,
    }


# --- Table ------------------------------------------------------------------------------------------------------------


def rename(c: Siglip, name: str) -> str | None:
    """A vision tower alone may be stored without its prefix, and does without the text tower and the loss."""
    if c.text is not None:
        return name
    if name.startswith(("text_model.", "logit_")):
        return None
    return name if name.startswith("vision_model.") else f"vision_model.{name}"


def entries(c: Siglip) -> list[Entry]:
    """The key table; without `c.text`, of the vision tower. NaFlex files keep the patch kernel as a matrix."""
    return [*_vision(c.vision), *(_text(c.text) if c.text else ())]


def _vision(c: SiglipVision) -> Iterator[Entry]:
    embeddings = "vision_model.embeddings"
    patches = TRANSPOSED if c.naflex else patch_kernel(c.patch_size, 3)
    yield Entry(f"{embeddings}.patch_embedding.weight", ("vision/patch_embed/kernel",), patches)
    yield Entry(f"{embeddings}.patch_embedding.bias", ("vision/patch_embed/bias",), SAME)
    yield Entry(f"{embeddings}.position_embedding.weight", ("vision/positions",), SAME)
    yield from _tower("vision_model", "vision", c.depth)
    yield from layer_norm("vision_model.post_layernorm", "vision/norm")
    theirs, ours = "vision_model.head", "vision/head"
    yield Entry(f"{theirs}.probe", (f"{ours}/probe",), FIRST)
    yield Entry(f"{theirs}.attention.in_proj_weight", tuple(f"{ours}/{name}/kernel" for name in "qkv"), TRANSPOSED)
    yield Entry(f"{theirs}.attention.in_proj_bias", tuple(f"{ours}/{name}/bias" for name in "qkv"), SAME)
    yield from linear(f"{theirs}.attention.out_proj", f"{ours}/out")
    yield from layer_norm(f"{theirs}.layernorm", f"{ours}/norm")
    yield from _mlp(f"{theirs}.mlp", f"{ours}/mlp")


def _text(c: SiglipText) -> Iterator[Entry]:
    yield Entry("text_model.embeddings.token_embedding.weight", ("text/embedding",), SAME)
    yield Entry("text_model.embeddings.position_embedding.weight", ("text/positions",), SAME)
    yield from _tower("text_model", "text", c.depth)
    yield from layer_norm("text_model.final_layer_norm", "text/norm")
    yield from linear("text_model.head", "text/head")
    yield Entry("logit_scale", ("logit_scale",), FIRST)
    yield Entry("logit_bias", ("logit_bias",), FIRST)


def _tower(theirs: str, ours: str, depth: int) -> Iterator[Entry]:
    theirs, ours = f"{theirs}.encoder.layers.{{}}", f"{ours}/blocks"
    for name in "qkv":
        yield from linear(f"{theirs}.self_attn.{name}_proj", f"{ours}/{name}", layers=depth)
    yield from linear(f"{theirs}.self_attn.out_proj", f"{ours}/out", layers=depth)
    yield from layer_norm(f"{theirs}.layer_norm1", f"{ours}/attention_norm", depth)
    yield from layer_norm(f"{theirs}.layer_norm2", f"{ours}/mlp_norm", depth)
    yield from _mlp(f"{theirs}.mlp", f"{ours}/mlp", depth)


def _mlp(theirs: str, ours: str, layers: int = 0) -> Iterator[Entry]:
    yield from linear(f"{theirs}.fc1", f"{ours}/up", layers=layers)
    yield from linear(f"{theirs}.fc2", f"{ours}/down", layers=layers)


# --- Network ----------------------------------------------------------------------------------------------------------


def init(model: nn.Module, key: jax.Array) -> Any:
    """Variables, from one image and, where there is a text tower, one token."""
    vision = model.config.vision
    side = vision.image_size // vision.patch_size * vision.patch_size
    image = jnp.zeros((1, side, side, 3), jnp.uint8)
    if model.config.text is None:
        return model.init(key, image, method="patch_features")
    return model.init(key, image, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))


def forward(
    model: nn.Module,
    params: Any,
    settings: Settings,
    *,
    pixel_values: Any = None,
    spatial_shapes: Any = None,
    pixel_attention_mask: Any = None,
    input_ids: Any = None,
) -> jax.Array:
    """Images to the last hidden states `[B, S, D]`, or `input_ids` `[B, L]` to pooled `[B, D]`.

    `pixel_values` are images `[B, 3, H, W]`; for NaFlex patches `[B, S, P]` of grids `spatial_shapes` `[B, 2]`, from
    which `pixel_attention_mask` follows. The text tower sees padding like any token, and pools the last one, as the
    published one does.
    """
    if (pixel_values is None) == (input_ids is None):
        raise UserError("SigLIP takes pixel_values for its vision tower, or input_ids for its text tower: give one.")
    if pixel_values is None:
        if model.config.text is None:
            raise UserError(f"{settings.file.parent} has no text tower: give pixel_values.")
        return _pooled_text(model, params, jnp.asarray(input_ids))
    if (spatial_shapes is not None) != model.config.vision.naflex:
        raise UserError(f"{settings.file.parent} takes spatial_shapes if and only if it is SigLIP2 NaFlex.")
    if spatial_shapes is None:
        return _patch_features(model, params, jnp.asarray(pixel_values))
    return _naflex_features(model, params, jnp.asarray(pixel_values), jnp.asarray(spatial_shapes, jnp.int32))


@functools.partial(jax.jit, static_argnames="model")
def _patch_features(model: nn.Module, params: Any, pixels: jax.Array) -> jax.Array:
    return model.apply({"params": params}, pixels.transpose(0, 2, 3, 1), method="signed_features")[0]


@functools.partial(jax.jit, static_argnames="model")
def _naflex_features(model: nn.Module, params: Any, patches: jax.Array, grids: jax.Array) -> jax.Array:
    return model.apply({"params": params}, patches, grids, method="naflex_features")[0]


@functools.partial(jax.jit, static_argnames="model")
def _pooled_text(model: nn.Module, params: Any, ids: jax.Array) -> jax.Array:
    valid = jnp.ones(ids.shape, bool)
    return model.apply({"params": params}, ids, valid, method=lambda siglip, *arrays: siglip.text(*arrays))


def comparisons(loaded: Any, directory: pathlib.Path) -> Iterator[tuple[str, jax.Array, np.ndarray]]:
    """The last hidden states of two images, and pooled texts."""
    import torch
    import transformers

    c, rng, options = loaded.config, np.random.default_rng(0), dict(dtype=torch.float32, local_files_only=True)
    name = "Siglip2" if c.vision.naflex else "Siglip"
    arrays = _images(c.vision, rng)
    vision = getattr(transformers, f"{name}VisionModel").from_pretrained(directory, **options).eval()
    with torch.no_grad():
        theirs = vision(**{name: torch.from_numpy(x) for name, x in arrays.items()}).last_hidden_state.numpy()
    yield "last_hidden_state", loaded(**arrays), theirs
    if c.text is None:
        return
    ids = rng.integers(0, c.text.vocab_size, (2, c.text.max_length))
    text = getattr(transformers, f"{name}TextModel").from_pretrained(directory, **options).eval()
    with torch.no_grad():
        theirs = text(torch.from_numpy(ids)).pooler_output.numpy()
    yield "pooler_output", loaded(input_ids=ids), theirs


def _images(c: SiglipVision, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if not c.naflex:
        return {"pixel_values": rng.uniform(-1, 1, (2, 3, c.image_size, c.image_size)).astype(np.float32)}
    patches = rng.uniform(-1, 1, (2, 24, 3 * c.patch_size**2)).astype(np.float32)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": np.ones((2, 24), np.int64),
        "spatial_shapes": np.array([[4, 6], [3, 8]]),
    }


FAMILY = Family(
    name="SigLIP",
    part="vision_target",
    component="image_encoder",
    kinds=("siglip", "siglip2", *_VISION_ONLY.values()),
    stem="model",
    read_config=read_config,
    write_config=write_config,
    config=Siglip,
    entries=entries,
    model=SiglipModel,
    init=init,
    forward=forward,
    comparisons=comparisons,
    rename=rename,
)
