"""The SD3 family, by the names of diffusers (`SD3Transformer2DModel`)."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.config import Count, Index, MMDiT, UserError
from mmcore_jax.models.mmdit import MMDiTModel, Slots, sincos_axis, sincos_table
from mmcore_jax.nn import masks
from mmcore_jax.nn.masks import NOISED, TEXT, TokenMeta
from mmcore_jax.nn.patches import patchify, unpatchify
from mmcore_jax.pretrained.family import Family
from mmcore_jax.pretrained.files import Section, Settings
from mmcore_jax.pretrained.table import SAME, Entry, layer_range, linear, patch_kernel, rms_norm, swapped_linear

_CLASS = "SD3Transformer2DModel"
_POSITIONS = "pos_embed.pos_embed"
_IMAGE = dict(q="to_q", k="to_k", v="to_v", out="to_out.0", q_norm="norm_q", k_norm="norm_k")
_CONTEXT = dict(
    q="add_q_proj", k="add_k_proj", v="add_v_proj", out="to_add_out", q_norm="norm_added_q", k_norm="norm_added_k"
)

# --- Config -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Transformer(Section):
    """Defaults are what diffusers assumes."""

    sample_size: Count = 128
    patch_size: Count = 2
    in_channels: Count = 16
    out_channels: Count = 16
    num_layers: Count = 18
    attention_head_dim: Count = 64
    num_attention_heads: Count = 18
    joint_attention_dim: Count = 4096
    caption_projection_dim: Count = 1152
    pooled_projection_dim: Index = 2048
    pos_embed_max_size: Count = 96
    dual_attention_layers: tuple[Index, ...] = ()
    qk_norm: Literal["rms_norm"] | None = None


def read_config(settings: Settings) -> MMDiT:
    """From the config.json of the transformer."""
    c = settings.read(_Transformer)
    width, dual = c.num_attention_heads * c.attention_head_dim, len(c.dual_attention_layers)
    c.require("out_channels", c.out_channels == c.in_channels, f"in_channels {c.in_channels}")
    c.require("attention_head_dim", width % 4 == 0, "heads whose channels are a multiple of 4 together")
    c.require("caption_projection_dim", c.caption_projection_dim == width, f"{width}, the channels of all heads")
    c.require("dual_attention_layers", c.dual_attention_layers == tuple(range(dual)), "the first layers only")
    c.require("dual_attention_layers", dual < c.num_layers, f"fewer than num_layers {c.num_layers}")
    c.require("pos_embed_max_size", c.pos_embed_max_size % 2 == 0, "an even size, as all published tables have")
    c.require("sample_size", c.sample_size >= c.patch_size, f"at least patch_size {c.patch_size}")
    return MMDiT(
        width=width,
        depth=c.num_layers,
        heads=c.num_attention_heads,
        dual_layers=dual,
        qk_norm=c.qk_norm is not None,
        patch_size=c.patch_size,
        latent_channels=c.in_channels,
        context_width=c.joint_attention_dim,
        pooled_width=c.pooled_projection_dim,
        position="sincos",
        position_grid=c.pos_embed_max_size,
        position_base=c.sample_size // c.patch_size,
        query_gain=1.0,
        prediction="velocity",
    )


def write_config(c: MMDiT, dtype: str) -> dict[str, Any]:
    """All settings, as diffusers writes them."""
    return {
        "_class_name": _CLASS,
        "sample_size": c.position_base * c.patch_size,
        "patch_size": c.patch_size,
        "in_channels": c.latent_channels,
        "out_channels": c.latent_channels,
        "num_layers": c.depth,
        "attention_head_dim": c.width // c.heads,
        "num_attention_heads": c.heads,
        "joint_attention_dim": c.context_width,
        "caption_projection_dim": c.width,
        "pooled_projection_dim": c.pooled_width,
        "pos_embed_max_size": c.position_grid,
        "dual_attention_layers": list(range(c.dual_layers)),
        "qk_norm": "rms_norm" if c.qk_norm else None,
    }


# --- Table ------------------------------------------------------------------------------------------------------------


def buffers(c: MMDiT) -> dict[str, np.ndarray]:
    """The table of positions."""
    return {_POSITIONS: sincos_table(c)}


def settle(c: MMDiT, stored: Mapping[str, np.ndarray]) -> MMDiT:
    """With the origin of the positions whose table is stored; config.json does not tell."""
    if _POSITIONS not in stored or stored[_POSITIONS].shape != (1, c.position_grid**2, c.width):
        return c
    choices = [dataclasses.replace(c, position_origin=origin) for origin in ("corner", "centre")]
    first_row = stored[_POSITIONS][0, : c.position_grid, : c.width // 2].astype(np.float32)
    return min(choices, key=lambda choice: np.abs(first_row - sincos_axis(choice)).max())


def entries(c: MMDiT) -> list[Entry]:
    """The key table. Their `AdaLayerNormContinuous` has scale before shift; all else the reverse."""
    return [*_ends(c), *_blocks(c)]


def _ends(c: MMDiT) -> Iterator[Entry]:
    yield Entry("pos_embed.proj.weight", ("patch_embed/kernel",), patch_kernel(c.patch_size, c.latent_channels))
    yield Entry("pos_embed.proj.bias", ("patch_embed/bias",), SAME)
    yield from linear("context_embedder", "context_embed")
    for theirs, ours in (("timestep", "timestep"), ("text", "pooled"))[: 2 if c.pooled_width else 1]:
        yield from linear(f"time_text_embed.{theirs}_embedder.linear_1", f"{ours}_embed/up")
        yield from linear(f"time_text_embed.{theirs}_embedder.linear_2", f"{ours}_embed/down")
    yield from swapped_linear("norm_out.linear", "norm_out/dense")
    yield from linear("proj_out", "out")


def _blocks(c: MMDiT) -> Iterator[Entry]:
    theirs, plain = "transformer_blocks.{}", c.depth - 1 - c.dual_layers
    if c.dual_layers:
        yield from _block(c, theirs, "dual_blocks", c.dual_layers, dual=True)
    if plain:
        yield from layer_range(c.dual_layers, _block(c, theirs, "blocks", plain))
    yield from _block(c, theirs.format(c.depth - 1), "last_block", 0, last=True)


def _block(c: MMDiT, theirs: str, ours: str, layers: int, dual: bool = False, last: bool = False) -> Iterator[Entry]:
    yield from linear(f"{theirs}.norm1.linear", f"{ours}/x_modulation/dense", layers=layers)
    context_modulation = swapped_linear if last else linear
    yield from context_modulation(f"{theirs}.norm1_context.linear", f"{ours}/y_modulation/dense", layers=layers)
    yield from _attention(c, f"{theirs}.attn", f"{ours}/x", _IMAGE, layers)
    yield from _attention(c, f"{theirs}.attn", f"{ours}/y", _CONTEXT, layers, out=not last)
    if dual:
        yield from _attention(c, f"{theirs}.attn2", f"{ours}/dual", _IMAGE, layers)
    yield from _mlp(f"{theirs}.ff", f"{ours}/x", layers)
    if not last:
        yield from _mlp(f"{theirs}.ff_context", f"{ours}/y", layers)


def _attention(
    c: MMDiT, theirs: str, ours: str, names: dict[str, str], layers: int, out: bool = True
) -> Iterator[Entry]:
    for name in ("q", "k", "v", "out")[: 4 if out else 3]:
        yield from linear(f"{theirs}.{names[name]}", f"{ours}_{name}", layers=layers)
    for name in ("q_norm", "k_norm") if c.qk_norm else ():
        yield from rms_norm(f"{theirs}.{names[name]}", f"{ours}_{name}", layers)


def _mlp(theirs: str, ours: str, layers: int) -> Iterator[Entry]:
    yield from linear(f"{theirs}.net.0.proj", f"{ours}_up", layers=layers)
    yield from linear(f"{theirs}.net.2", f"{ours}_down", layers=layers)


# --- Network ----------------------------------------------------------------------------------------------------------


def init(model: nn.Module, key: jax.Array) -> Any:
    """Variables, from one patch."""
    c = model.config
    latents = jnp.zeros((1, c.latent_channels, c.patch_size, c.patch_size))
    context, pooled = jnp.zeros((1, 1, c.context_width)), jnp.zeros((1, c.pooled_width))
    return model.init(key, *_arguments(c, latents, context, pooled, jnp.zeros(1)))


def forward(
    model: nn.Module,
    params: Any,
    settings: Settings,
    *,
    hidden_states: Any,
    encoder_hidden_states: Any,
    pooled_projections: Any,
    timestep: Any,
) -> jax.Array:
    """Latents `[B, C, H, W]` to the sample of the same shape, float32; `timestep` `[B]` goes from 0 to 1000."""
    c, (height, width) = model.config, hidden_states.shape[2:]
    for side in (height, width):
        if side % c.patch_size or side > c.position_grid * c.patch_size:
            raise UserError(
                f"hidden_states are {height} x {width} latents: make each side a multiple of {c.patch_size}, and at "
                f"most {c.position_grid * c.patch_size}."
            )
    return _forward(model, params, hidden_states, encoder_hidden_states, pooled_projections, timestep)


@functools.partial(jax.jit, static_argnames="model")
def _forward(
    model: nn.Module, params: Any, latents: jax.Array, context: jax.Array, pooled: jax.Array, timestep: jax.Array
) -> jax.Array:
    patches = model.apply({"params": params}, *_arguments(model.config, latents, context, pooled, timestep))
    images = unpatchify(patches, model.config.patch_size, *latents.shape[2:])
    return images.transpose(0, 3, 1, 2)


def _arguments(c: MMDiT, latents: jax.Array, context: jax.Array, pooled: jax.Array, timestep: jax.Array) -> tuple:
    """One frame a row, in which everything sees everything, under one timestep."""
    batch, _, height, width = latents.shape
    rows, cols = height // c.patch_size, width // c.patch_size
    row, col = np.indices((rows, cols)).reshape(2, -1)
    length, patches = context.shape[1], row.size
    slots = Slots(np.zeros((batch, length), np.int32), np.zeros((batch, patches), np.int32))
    return (
        patchify(latents.transpose(0, 2, 3, 1), c.patch_size),
        context,
        timestep.astype(jnp.float32)[:, None] / 1000,
        slots,
        _meta(batch, NOISED, row - (rows + 1) // 2, col - (cols + 1) // 2),
        _meta(batch, TEXT, np.zeros(length, np.int32), np.zeros(length, np.int32)),
        masks.same_document,
        pooled[:, None],
    )


def _meta(batch: int, kind: int, row: np.ndarray, col: np.ndarray) -> TokenMeta:
    fields = np.broadcast_arrays(0, 0, kind, row, col, np.arange(row.size))
    return TokenMeta(*(np.broadcast_to(field, (batch, row.size)).astype(np.int32) for field in fields))


def comparisons(loaded: Any, directory: pathlib.Path) -> Iterator[tuple[str, jax.Array, np.ndarray]]:
    """The sample of two noisy latents."""
    import diffusers
    import torch

    c, rng = loaded.config, np.random.default_rng(0)
    shapes = dict(
        hidden_states=(2, c.latent_channels, 8 * c.patch_size, 6 * c.patch_size),
        encoder_hidden_states=(2, 77, c.context_width),
        pooled_projections=(2, c.pooled_width),
    )
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["timestep"] = np.array([978.0, 100.0], np.float32)
    original = diffusers.SD3Transformer2DModel.from_pretrained(
        directory, torch_dtype=torch.float32, local_files_only=True
    ).eval()
    with torch.no_grad():
        theirs = original(**{name: torch.from_numpy(x) for name, x in arrays.items()}).sample.numpy()
    yield "sample", loaded(**arrays), theirs


FAMILY = Family(
    name="SD3",
    part="dit",
    component="transformer",
    kinds=(_CLASS,),
    stem="diffusion_pytorch_model",
    read_config=read_config,
    write_config=write_config,
    config=MMDiT,
    entries=entries,
    model=MMDiTModel,
    init=init,
    forward=forward,
    comparisons=comparisons,
    buffers=buffers,
    settle=settle,
)
