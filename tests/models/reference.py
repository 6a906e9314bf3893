"""Published checkpoints and ours: one table a family, of (their name, our path, transform), used in both directions.

`{}` in a name counts the layers that our stack keeps on a leading axis. Several of our paths beside one of their names
mean that theirs is the concatenation along the output axis.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from mmcore_jax.config import MMDiT, QwenVL, Siglip
from mmcore_jax.models.mmdit import sincos_table
from mmcore_jax.models.qwen_vl import TEMPORAL_PATCH

# --- Transforms ------------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    """Their array to ours, and back."""

    load: Callable[[np.ndarray], np.ndarray]
    export: Callable[[np.ndarray], np.ndarray]


def _swap_halves(x: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(x, 2, axis=-1)[::-1], axis=-1)


SAME = Transform(lambda x: x, lambda x: x)
TRANSPOSED = Transform(lambda x: x.T, lambda x: x.T)
FIRST = Transform(lambda x: x[0], lambda x: x[None])
SWAPPED = Transform(_swap_halves, _swap_halves)
TRANSPOSED_SWAPPED = Transform(lambda x: _swap_halves(x.T), lambda x: _swap_halves(x).T)


def patch_kernel(size: int, channels: int) -> Transform:
    """A convolution `[D, channel, row, column]` over whole patches, as a matrix over (row, column, channel)."""
    return Transform(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(size, size, channels, -1).transpose(3, 2, 0, 1),
    )


def video_patch_kernel(size: int, channels: int) -> Transform:
    """A convolution `[D, channel, time, row, column]`, as a matrix over (time, row, column, channel)."""
    return Transform(
        lambda x: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(TEMPORAL_PATCH, size, size, channels, -1).transpose(4, 3, 0, 1, 2),
    )


# --- Tables ----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A line of a table; `layers` is how many `{}` counts, from `first` on, 0 without."""

    theirs: str
    ours: tuple[str, ...]
    transform: Transform
    layers: int = 0
    first: int = 0

    @property
    def names(self) -> list[str]:
        return [self.theirs.format(self.first + i) for i in range(max(self.layers, 1))]


def _linear(theirs: str, *ours: str, layers: int = 0, bias: bool = True) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", tuple(f"{path}/kernel" for path in ours), TRANSPOSED, layers)
    if bias:
        yield Entry(f"{theirs}.bias", tuple(f"{path}/bias" for path in ours), SAME, layers)


def _rms_norm(theirs: str, ours: str, layers: int = 0) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", (f"{ours}/scale",), SAME, layers)


def _layer_norm(theirs: str, ours: str, layers: int = 0) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", (f"{ours}/scale",), SAME, layers)
    yield Entry(f"{theirs}.bias", (f"{ours}/bias",), SAME, layers)


def qwen_vl(c: QwenVL) -> list[Entry]:
    """Qwen2.5-VL, by the names of its published files."""

    def entries() -> Iterator[Entry]:
        yield Entry("model.embed_tokens.weight", ("embedding",), SAME)
        yield from _rms_norm("model.norm", "decoder/norm")
        if not c.tie_embeddings:
            yield Entry("lm_head.weight", ("head",), TRANSPOSED)
        theirs, ours = "model.layers.{}", "decoder/blocks"
        for name in "qkv":
            yield from _linear(f"{theirs}.self_attn.{name}_proj", f"{ours}/{name}", layers=c.depth)
        yield from _linear(f"{theirs}.self_attn.o_proj", f"{ours}/out", layers=c.depth, bias=False)
        for name in ("gate", "up", "down"):
            yield from _linear(f"{theirs}.mlp.{name}_proj", f"{ours}/{name}", layers=c.depth, bias=False)
        yield from _rms_norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm", c.depth)
        yield from _rms_norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm", c.depth)

        patches = video_patch_kernel(c.vision.patch_size, 3)
        yield Entry("visual.patch_embed.proj.weight", ("vision/patch_embed/kernel",), patches)
        theirs, ours, depth = "visual.blocks.{}", "vision/blocks", c.vision.depth
        yield from _linear(f"{theirs}.attn.qkv", *(f"{ours}/{name}" for name in "qkv"), layers=depth)
        yield from _linear(f"{theirs}.attn.proj", f"{ours}/out", layers=depth)
        for name in ("gate", "up", "down"):
            yield from _linear(f"{theirs}.mlp.{name}_proj", f"{ours}/{name}", layers=depth)
        yield from _rms_norm(f"{theirs}.norm1", f"{ours}/attention_norm", depth)
        yield from _rms_norm(f"{theirs}.norm2", f"{ours}/mlp_norm", depth)
        yield from _rms_norm("visual.merger.ln_q", "vision/merger/norm")
        yield from _linear("visual.merger.mlp.0", "vision/merger/up")
        yield from _linear("visual.merger.mlp.2", "vision/merger/down")

    return list(entries())


def siglip(c: Siglip) -> list[Entry]:
    """SigLIP; without `c.text`, its vision tower."""

    def tower(theirs: str, ours: str, depth: int) -> Iterator[Entry]:
        theirs, ours = f"{theirs}.encoder.layers.{{}}", f"{ours}/blocks"
        for name in "qkv":
            yield from _linear(f"{theirs}.self_attn.{name}_proj", f"{ours}/{name}", layers=depth)
        yield from _linear(f"{theirs}.self_attn.out_proj", f"{ours}/out", layers=depth)
        yield from _layer_norm(f"{theirs}.layer_norm1", f"{ours}/attention_norm", depth)
        yield from _layer_norm(f"{theirs}.layer_norm2", f"{ours}/mlp_norm", depth)
        yield from mlp(f"{theirs}.mlp", f"{ours}/mlp", depth)

    def mlp(theirs: str, ours: str, layers: int = 0) -> Iterator[Entry]:
        yield from _linear(f"{theirs}.fc1", f"{ours}/up", layers=layers)
        yield from _linear(f"{theirs}.fc2", f"{ours}/down", layers=layers)

    def entries() -> Iterator[Entry]:
        embeddings = "vision_model.embeddings"
        yield Entry(
            f"{embeddings}.patch_embedding.weight", ("vision/patch_embed/kernel",), patch_kernel(c.vision.patch_size, 3)
        )
        yield Entry(f"{embeddings}.patch_embedding.bias", ("vision/patch_embed/bias",), SAME)
        yield Entry(f"{embeddings}.position_embedding.weight", ("vision/positions",), SAME)
        yield from tower("vision_model", "vision", c.vision.depth)
        yield from _layer_norm("vision_model.post_layernorm", "vision/norm")
        theirs, ours = "vision_model.head", "vision/head"
        yield Entry(f"{theirs}.probe", (f"{ours}/probe",), FIRST)
        yield Entry(f"{theirs}.attention.in_proj_weight", tuple(f"{ours}/{name}/kernel" for name in "qkv"), TRANSPOSED)
        yield Entry(f"{theirs}.attention.in_proj_bias", tuple(f"{ours}/{name}/bias" for name in "qkv"), SAME)
        yield from _linear(f"{theirs}.attention.out_proj", f"{ours}/out")
        yield from _layer_norm(f"{theirs}.layernorm", f"{ours}/norm")
        yield from mlp(f"{theirs}.mlp", f"{ours}/mlp")
        if c.text is None:
            return
        yield Entry("text_model.embeddings.token_embedding.weight", ("text/embedding",), SAME)
        yield Entry("text_model.embeddings.position_embedding.weight", ("text/positions",), SAME)
        yield from tower("text_model", "text", c.text.depth)
        yield from _layer_norm("text_model.final_layer_norm", "text/norm")
        yield from _linear("text_model.head", "text/head")
        yield Entry("logit_scale", ("logit_scale",), FIRST)
        yield Entry("logit_bias", ("logit_bias",), FIRST)

    return list(entries())


def mmdit_buffers(c: MMDiT) -> dict[str, np.ndarray]:
    """What they store and we compute."""
    return {"pos_embed.pos_embed": sincos_table(c)}


def mmdit(c: MMDiT) -> list[Entry]:
    """SD3, by the names of diffusers. Its `AdaLayerNormContinuous` has scale before shift; all else the reverse."""
    image = dict(q="to_q", k="to_k", v="to_v", out="to_out.0", norm_q="norm_q", norm_k="norm_k")
    context = dict(
        q="add_q_proj",
        k="add_k_proj",
        v="add_v_proj",
        out="to_add_out",
        norm_q="norm_added_q",
        norm_k="norm_added_k",
    )

    def attention(theirs: str, ours: str, names: dict[str, str], layers: int, out: bool = True) -> Iterator[Entry]:
        for name in "qkv":
            yield from _linear(f"{theirs}.{names[name]}", f"{ours}_{name}", layers=layers)
        for name in "qk" if c.qk_norm else "":
            yield from _rms_norm(f"{theirs}.{names[f'norm_{name}']}", f"{ours}_{name}_norm", layers)
        if out:
            yield from _linear(f"{theirs}.{names['out']}", f"{ours}_out", layers=layers)

    def mlp(theirs: str, ours: str, layers: int) -> Iterator[Entry]:
        yield from _linear(f"{theirs}.net.0.proj", f"{ours}_up", layers=layers)
        yield from _linear(f"{theirs}.net.2", f"{ours}_down", layers=layers)

    def block(theirs: str, ours: str, layers: int, dual: bool = False, last: bool = False) -> Iterator[Entry]:
        yield from _linear(f"{theirs}.norm1.linear", f"{ours}/x_modulation/dense", layers=layers)
        yield from (_swapped_linear if last else _linear)(
            f"{theirs}.norm1_context.linear", f"{ours}/y_modulation/dense", layers=layers
        )
        yield from attention(f"{theirs}.attn", f"{ours}/x", image, layers)
        yield from attention(f"{theirs}.attn", f"{ours}/y", context, layers, out=not last)
        if dual:
            yield from attention(f"{theirs}.attn2", f"{ours}/dual", image, layers)
        yield from mlp(f"{theirs}.ff", f"{ours}/x", layers)
        if not last:
            yield from mlp(f"{theirs}.ff_context", f"{ours}/y", layers)

    def entries() -> Iterator[Entry]:
        yield Entry("pos_embed.proj.weight", ("patch_embed/kernel",), patch_kernel(c.patch_size, c.latent_channels))
        yield Entry("pos_embed.proj.bias", ("patch_embed/bias",), SAME)
        yield from _linear("context_embedder", "context_embed")
        for theirs, ours in (("timestep", "timestep"), ("text", "pooled"))[: 2 if c.pooled_width else 1]:
            yield from _linear(f"time_text_embed.{theirs}_embedder.linear_1", f"{ours}_embed/up")
            yield from _linear(f"time_text_embed.{theirs}_embedder.linear_2", f"{ours}_embed/down")
        if c.dual_layers:
            yield from block("transformer_blocks.{}", "dual_blocks", c.dual_layers, dual=True)
        if plain := c.depth - 1 - c.dual_layers:
            for entry in block("transformer_blocks.{}", "blocks", plain):
                yield entry._replace(first=c.dual_layers)
        yield from block(f"transformer_blocks.{c.depth - 1}", "last_block", 0, last=True)
        yield from _swapped_linear("norm_out.linear", "norm_out/dense")
        yield from _linear("proj_out", "out")

    return list(entries())


def _swapped_linear(theirs: str, ours: str, layers: int = 0) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", (f"{ours}/kernel",), TRANSPOSED_SWAPPED, layers)
    yield Entry(f"{theirs}.bias", (f"{ours}/bias",), SWAPPED, layers)


# --- Both directions -------------------------------------------------------------------------------------------------


def load(table: list[Entry], state: Mapping[str, np.ndarray], like: Any) -> Any:
    """Their state as a parameter tree of the structure and shapes of `like`.

    Raises:
      ValueError: naming what is left over on either side, or has another shape.
    """
    expected = flax.traverse_util.flatten_dict(like, sep="/")
    unread, tree = set(state), {}
    for entry in table:
        unread -= set(entry.names)
        parts = [
            np.split(state[name], len(entry.ours)) if len(entry.ours) > 1 else [state[name]] for name in entry.names
        ]
        for path, layers in zip(entry.ours, zip(*parts)):
            layers = [entry.transform.load(part) for part in layers]
            tree[path] = np.stack(layers) if entry.layers else layers[0]
    if unread or set(tree) != set(expected):
        raise ValueError(f"left over: theirs {sorted(unread)}, ours {sorted(set(tree) ^ set(expected))}")
    wrong = {path: (x.shape, expected[path].shape) for path, x in tree.items() if x.shape != expected[path].shape}
    if wrong:
        raise ValueError(f"shapes differ: {wrong}")
    return flax.traverse_util.unflatten_dict(tree, sep="/")


def export(table: list[Entry], params: Any) -> dict[str, np.ndarray]:
    """Inverse of `load`."""
    ours, state = flax.traverse_util.flatten_dict(params, sep="/"), {}
    for entry in table:
        for i, name in enumerate(entry.names):
            parts = [entry.transform.export(ours[path][i] if entry.layers else ours[path]) for path in entry.ours]
            state[name] = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return state
