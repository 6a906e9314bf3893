"""AutoencoderKL of Stable Diffusion and FLUX, by the names of diffusers."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.config import AutoencoderKL, Count
from mmcore_jax.models.autoencoder import AutoencoderKLModel
from mmcore_jax.pretrained.family import Family
from mmcore_jax.pretrained.files import Section, Settings
from mmcore_jax.pretrained.table import SAME, Entry, Transform, layer_norm, linear

_CLASS = "AutoencoderKL"
_CONVOLUTION = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# Linear layers of the attention in older files.
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

# --- Config -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Autoencoder(Section):
    """Defaults are what diffusers assumes; those of the types of blocks would not fit their number."""

    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...]
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...]
    block_out_channels: tuple[Count, ...] = (64,)
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    layers_per_block: Count = 1
    act_fn: Literal["silu"] = "silu"
    latent_channels: Count = 4
    norm_num_groups: Count = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: Literal[None] = None
    latents_std: Literal[None] = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


def read_config(settings: Settings) -> AutoencoderKL:
    """From the config.json of the autoencoder."""
    c = settings.read(_Autoencoder)
    levels, groups = len(c.block_out_channels), c.norm_num_groups
    c.require("block_out_channels", levels > 0, "at least one")
    for key in ("down_block_types", "up_block_types"):
        c.require(key, len(getattr(c, key)) == levels, f"{levels}, as many as block_out_channels")
    fits = all(channels % groups == 0 for channels in c.block_out_channels)
    c.require("block_out_channels", fits, f"multiples of norm_num_groups {groups}")
    c.require("scaling_factor", c.scaling_factor > 0, "more than 0")
    c.require("use_post_quant_conv", c.use_post_quant_conv == c.use_quant_conv, f"use_quant_conv {c.use_quant_conv}")
    return AutoencoderKL(
        kind="kl",
        block_channels=c.block_out_channels,
        layers_per_block=c.layers_per_block,
        latent_channels=c.latent_channels,
        norm_groups=groups,
        quant_convs=c.use_quant_conv,
        mid_attention=c.mid_block_add_attention,
        scaling_factor=c.scaling_factor,
        shift_factor=c.shift_factor or 0.0,
        tile=0,
    )


def write_config(c: AutoencoderKL, dtype: str) -> dict[str, Any]:
    """All settings, as diffusers writes them."""
    levels = len(c.block_channels)
    return {
        "_class_name": _CLASS,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(c.block_channels),
        "layers_per_block": c.layers_per_block,
        "act_fn": "silu",
        "latent_channels": c.latent_channels,
        "norm_num_groups": c.norm_groups,
        "scaling_factor": c.scaling_factor,
        "shift_factor": c.shift_factor,
        "use_quant_conv": c.quant_convs,
        "use_post_quant_conv": c.quant_convs,
        "mid_block_add_attention": c.mid_attention,
        "sample_size": 1024,  # by which diffusers tiles, where it is told to
        "force_upcast": True,
    }


# --- Table ------------------------------------------------------------------------------------------------------------


def rename(config: AutoencoderKL, name: str) -> str:
    """Their name as the table has it: older files call the layers of the attention otherwise."""
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def entries(c: AutoencoderKL) -> list[Entry]:
    """The key table."""

    def table() -> Iterator[Entry]:
        yield from _ends(c, "encoder")
        yield from _blocks("encoder", "down", c.layers_per_block, c.block_channels)
        yield from _ends(c, "decoder")
        yield from _blocks("decoder", "up", c.layers_per_block + 1, c.block_channels[::-1])
        if c.quant_convs:
            yield from _convolution("quant_conv", "quant_conv")
            yield from _convolution("post_quant_conv", "post_quant_conv")

    return list(table())


def _ends(c: AutoencoderKL, part: str) -> Iterator[Entry]:
    yield from _convolution(f"{part}.conv_in", f"{part}/conv_in")
    for i in range(2):
        yield from _resnet(f"{part}.mid_block.resnets.{i}", f"{part}/mid/resnet_{i}", False)
    if c.mid_attention:
        theirs, ours = f"{part}.mid_block.attentions.0", f"{part}/mid/attention"
        yield from layer_norm(f"{theirs}.group_norm", f"{ours}/norm")
        for name in "qkv":
            yield from linear(f"{theirs}.to_{name}", f"{ours}/{name}")
        yield from linear(f"{theirs}.to_out.0", f"{ours}/out")
    yield from layer_norm(f"{part}.conv_norm_out", f"{part}/norm_out")
    yield from _convolution(f"{part}.conv_out", f"{part}/conv_out")


def _blocks(part: str, direction: str, resnets: int, channels: tuple[int, ...]) -> Iterator[Entry]:
    for level in range(len(channels)):
        theirs, ours = f"{part}.{direction}_blocks.{level}", f"{part}/{direction}_{level}"
        for i in range(resnets):
            widens = i == 0 and level > 0 and channels[level] != channels[level - 1]
            yield from _resnet(f"{theirs}.resnets.{i}", f"{ours}/resnet_{i}", widens)
        if level < len(channels) - 1:
            yield from _convolution(f"{theirs}.{direction}samplers.0.conv", f"{ours}/{direction}sample")


def _resnet(theirs: str, ours: str, widens: bool) -> Iterator[Entry]:
    for i in (1, 2):
        yield from layer_norm(f"{theirs}.norm{i}", f"{ours}/norm_{i}")
        yield from _convolution(f"{theirs}.conv{i}", f"{ours}/conv_{i}")
    if widens:
        yield from _convolution(f"{theirs}.conv_shortcut", f"{ours}/shortcut")


def _convolution(theirs: str, ours: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", (f"{ours}/kernel",), _CONVOLUTION)
    yield Entry(f"{theirs}.bias", (f"{ours}/bias",), SAME)


# --- Network ----------------------------------------------------------------------------------------------------------


def init(model: nn.Module, key: jax.Array) -> Any:
    """Variables, from the smallest image."""
    side = model.config.downsampling
    return model.init(key, jnp.zeros((1, side, side, 3), jnp.uint8))


def forward(model: nn.Module, params: Any, settings: Settings, *, sample: Any) -> jax.Array:
    """Images `[B, 3, H, W]` in [-1, 1] to their reconstructions from the mean latents, float32."""
    return decode(model, params, encode(model, params, sample)[0])


@functools.partial(jax.jit, static_argnames="model")
def encode(model: nn.Module, params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images `[B, 3, H, W]` in [-1, 1] to mean and log-variance of their latents, float32 `[B, C, h, w]`."""
    moments = model.apply({"params": params}, x.transpose(0, 2, 3, 1), method="moments")
    return tuple(moment.transpose(0, 3, 1, 2) for moment in moments)


@functools.partial(jax.jit, static_argnames="model")
def decode(model: nn.Module, params: Any, z: jax.Array) -> jax.Array:
    """Latents `[B, C, h, w]`, neither shifted nor scaled, to images `[B, 3, H, W]` about [-1, 1], float32."""
    return model.apply({"params": params}, z.transpose(0, 2, 3, 1), method="reconstruct").transpose(0, 3, 1, 2)


def comparisons(loaded: Any, directory: pathlib.Path) -> Iterator[tuple[str, jax.Array, np.ndarray]]:
    """Moments of two noisy images, and images of their mean latents."""
    import diffusers
    import torch

    side = 6 * loaded.config.downsampling
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, side, side)).astype(np.float32)
    original = diffusers.AutoencoderKL.from_pretrained(
        directory, torch_dtype=torch.float32, local_files_only=True
    ).eval()
    with torch.no_grad():
        posterior = original.encode(torch.from_numpy(images)).latent_dist
        theirs = original.decode(posterior.mean).sample.numpy()
    mean, log_variance = loaded.encode(images)
    yield "mean", mean, posterior.mean.numpy()
    yield "log-variance", log_variance, posterior.logvar.numpy()
    yield "sample", loaded.decode(posterior.mean.numpy()), theirs


FAMILY = Family(
    name=_CLASS,
    part="autoencoder",
    component="vae",
    kinds=(_CLASS,),
    stem="diffusion_pytorch_model",
    read_config=read_config,
    write_config=write_config,
    config=AutoencoderKL,
    entries=entries,
    model=AutoencoderKLModel,
    init=init,
    forward=forward,
    comparisons=comparisons,
    rename=rename,
    encode=encode,
    decode=decode,
)
