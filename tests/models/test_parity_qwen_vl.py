"""Qwen2.5-VL equals transformers on small random weights, through the key table."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmcore_jax import config
from mmcore_jax.data import image as image_lib
from mmcore_jax.models import qwen_vl
from mmcore_jax.nn import attention as attention_lib
from mmcore_jax.nn.masks import IMAGE, PAD, TEXT, TokenMeta
from tests.models import reference

TOLERANCE = 1e-4
PATCH, MERGE, WINDOW = 4, 2, 16  # windows of 4 x 4 patches, 2 x 2 merged tokens
IMAGE_ID, START_ID, END_ID = 290, 291, 292


def make_config(tied):
    vision = config.QwenVision(
        width=32,
        depth=3,
        heads=2,
        mlp_width=48,
        patch_size=PATCH,
        merge_size=MERGE,
        window_size=WINDOW,
        full_attention_blocks=(1,),
    )
    return config.QwenVL(
        width=64,
        depth=2,
        heads=4,
        mlp_width=96,
        vocab_size=300,
        kv_heads=2,
        mrope_section=(2, 3, 3),
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_embeddings=tied,
        vision=vision,
    )


def make_reference(c):
    """The published implementation with every parameter random, and its state by the names of published files."""
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=dict(
                hidden_size=c.width,
                num_hidden_layers=c.depth,
                num_attention_heads=c.heads,
                num_key_value_heads=c.kv_heads,
                intermediate_size=c.mlp_width,
                vocab_size=c.vocab_size,
                rms_norm_eps=c.rms_norm_eps,
                rope_parameters=dict(rope_type="default", mrope_section=list(c.mrope_section), rope_theta=c.rope_theta),
                bos_token_id=0,
                eos_token_id=1,
                tie_word_embeddings=c.tie_embeddings,
            ),
            vision_config=dict(
                depth=c.vision.depth,
                hidden_size=c.vision.width,
                num_heads=c.vision.heads,
                intermediate_size=c.vision.mlp_width,
                patch_size=PATCH,
                spatial_merge_size=MERGE,
                temporal_patch_size=2,
                window_size=WINDOW,
                fullatt_block_indexes=list(c.vision.full_attention_blocks),
                out_hidden_size=c.width,
                tokens_per_second=2,
            ),
            tie_word_embeddings=c.tie_embeddings,
            image_token_id=IMAGE_ID,
            vision_start_token_id=START_ID,
            vision_end_token_id=END_ID,
            video_token_id=293,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + ("norm" in name or "ln_q" in name))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    state = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): state[name]
        for name in state
    }
    if c.tie_embeddings:
        del state["lm_head.weight"]
    return model, state


def picture(seed, rows, cols):
    """A random uint8 image of rows x cols patches."""
    return np.random.default_rng(seed).integers(0, 256, (rows * PATCH, cols * PATCH, 3), np.uint8)


def merge_order(rows, cols):
    order = np.arange(rows * cols).reshape(rows // MERGE, MERGE, cols // MERGE, MERGE).transpose(0, 2, 1, 3).reshape(-1)
    return order // cols, order % cols


def our_patches(image):
    """`[patches, P]` in merge order, with rows and columns."""
    height, width = (side // PATCH for side in image.shape[:2])
    rows, cols = merge_order(height, width)
    tiles = image.reshape(height, PATCH, width, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(height, width, -1)
    return tiles[rows, cols], rows, cols


def their_patches(image):
    """The published processor, written out: normalised, two equal frames, ordered (channel, time, row, column)."""
    x = ((image / 255.0 - qwen_vl.IMAGE_MEAN) / qwen_vl.IMAGE_STD).astype(np.float32)
    height, width = (side // PATCH for side in image.shape[:2])
    x = np.stack([x, x]).reshape(2, height // MERGE, MERGE, PATCH, width // MERGE, MERGE, PATCH, 3)
    x = x.transpose(1, 4, 2, 5, 7, 0, 3, 6)
    return torch.from_numpy(np.ascontiguousarray(x.reshape(height * width, -1)))


class Prompts:
    """Rows of text (lists of ids) and images, right-padded, in both forms."""

    def __init__(self, rows):
        self.ids, kinds, source, values, patch_meta = [], [], [], [], []
        self.positions, self.their_pixels, self.their_grids = [], [], []
        length = 0
        for row in rows:
            ids, kind, position, frame, origin, tiles, meta = [], [], [], 0, [], [], []
            at = 0
            for part in row:
                if isinstance(part, list):
                    ids += part
                    kind += [TEXT] * len(part)
                    position += [(at + i,) * 3 for i in range(len(part))]
                    origin += [0] * len(part)
                    at += len(part)
                    continue
                patches, patch_rows, patch_cols = our_patches(part)
                height, width = (side // PATCH // MERGE for side in part.shape[:2])
                ids += [IMAGE_ID] * (height * width)
                kind += [IMAGE] * (height * width)
                position += [(at, at + i // width, at + i % width) for i in range(height * width)]
                origin += list(
                    range(sum(map(len, tiles)) // MERGE**2, (sum(map(len, tiles)) + len(patches)) // MERGE**2)
                )
                at += max(height, width)
                tiles.append(patches)
                meta += [(0, frame, IMAGE, r, c) for r, c in zip(patch_rows, patch_cols)]
                frame += 1
                self.their_pixels.append(their_patches(part))
                self.their_grids.append((1, height * MERGE, width * MERGE))
            self.ids.append(ids)
            kinds.append(kind)
            source.append(origin)
            self.positions.append(position)
            values.append(np.concatenate(tiles) if tiles else np.zeros((0, PATCH**2 * 3), np.uint8))
            patch_meta.append(np.array(meta, np.int32).reshape(-1, 5))
            length = max(length, len(ids))
        patches = max(map(len, values))
        self.ids = _pad(self.ids, length)
        kinds = _pad(kinds, length, PAD)
        zeros, index = np.zeros_like(kinds), np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
        self.valid = kinds != PAD
        self.meta = TokenMeta(zeros, zeros, kinds, zeros, zeros, index)
        self.source, self.positions = _pad(source, length), _pad(self.positions, length, (0, 0, 0))
        self.patches = np.stack([np.pad(x, ((0, patches - len(x)), (0, 0))) for x in values])
        fields = np.stack([np.pad(x, ((0, patches - len(x)), (0, 0))) for x in patch_meta])
        self.patch_meta = TokenMeta(
            *np.moveaxis(fields, -1, 0), np.tile(np.arange(patches, dtype=np.int32), (len(rows), 1))
        )


def _pad(rows, length, fill=0):
    return np.array([list(row) + [fill] * (length - len(row)) for row in rows], np.int32)


def run_ours(model, prompts):
    queries = jnp.zeros((1, model.config.width))
    p = prompts
    x = model.embed(p.ids, p.meta, p.source, p.patches, p.patch_meta, queries)
    hidden = model.decode(x, p.meta, p.positions)
    return hidden, model.logits(hidden)


def run_theirs(model, prompts):
    ids = torch.from_numpy(prompts.ids).long()
    arguments = dict(input_ids=ids, attention_mask=torch.from_numpy(prompts.valid).long())
    if prompts.their_pixels:
        arguments["pixel_values"] = torch.cat(prompts.their_pixels)
        arguments["image_grid_thw"] = torch.tensor(prompts.their_grids)
        arguments["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    with torch.no_grad():
        out = model(**arguments, output_hidden_states=True)
    return out.hidden_states[-1].numpy(), out.logits.numpy()


def text(seed, length):
    return np.random.default_rng(seed).integers(0, 280, length).tolist()


START, END = [START_ID], [END_ID]
# 600 tokens and more; three images of different sizes: windows that divide them or not, and one inside a window.
LONG = [
    [*text(0, 20), *START],
    picture(1, 6, 10),
    [*END, *text(1, 300), *START],
    picture(2, 8, 4),
    [*END, *text(2, 250), *START],
    picture(3, 2, 2),
    [*END, *text(3, 30)],
]
SHORT = [[*text(4, 5), *START], picture(4, 4, 6), [*END, *text(5, 40)]]
PLAIN = [text(6, 77)]


def difference(ours, theirs, valid):
    return max(float(np.abs((np.asarray(a) - b)[valid]).max()) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("scan", "implementation"), [(True, "blockwise"), (False, "dense")])
def test_prompts(tied, scan, implementation, monkeypatch, record_property):
    monkeypatch.setattr(attention_lib, "BLOCK", 64)
    c = make_config(tied)
    theirs, state = make_reference(c)
    model = qwen_vl.QwenVLModel(c, config.Execution("float32", "float32", implementation, scan, "none"))
    prompts = Prompts([LONG, SHORT, PLAIN])
    assert prompts.ids.shape[1] > 600
    like = _unboxed(jax.eval_shape(lambda key: model.init(key, prompts, method=run_ours), jax.random.key(0)))["params"]
    params = reference.load(reference.qwen_vl(c), state, like)
    ours = jax.jit(lambda params: model.apply({"params": params}, prompts, method=run_ours))(params)
    expected = run_theirs(theirs, prompts)
    assert np.abs(expected[0]).mean() > 0.1
    found = difference(ours, expected, prompts.valid)
    record_property("max_difference", found)
    assert found < TOLERANCE


def test_vision_tower(record_property):
    """The tower alone: window attention, rotary code and merger, over several images that are packed with padding."""
    c = make_config(False)
    theirs, state = make_reference(c)
    prompts = Prompts([LONG, SHORT])
    tower = qwen_vl.VisionTower(c.vision, c.width, config.Execution("float32", "float32", "dense", True, "none"))
    table = [entry for entry in reference.qwen_vl(c) if entry.theirs.startswith("visual")]
    table = [entry._replace(ours=tuple(path.removeprefix("vision/") for path in entry.ours)) for entry in table]
    like = _unboxed(jax.eval_shape(tower.init, jax.random.key(0), prompts.patches, prompts.patch_meta))["params"]
    params = reference.load(table, {name: x for name, x in state.items() if name.startswith("visual")}, like)
    ours = jax.jit(tower.apply)({"params": params}, prompts.patches, prompts.patch_meta)
    with torch.no_grad():
        out = theirs.model.visual(torch.cat(prompts.their_pixels), torch.tensor(prompts.their_grids))
    expected = out.pooler_output.numpy()
    merged = prompts.patch_meta.kind[:, :: MERGE**2] == IMAGE
    found = float(np.abs(np.asarray(ours)[merged] - expected).max())
    record_property("max_difference", found)
    assert expected.shape[0] == merged.sum()
    assert found < TOLERANCE

    without_windows = qwen_vl.VisionTower(dataclasses.replace(c.vision, window_size=1024), c.width, tower.execution)
    other = jax.jit(without_windows.apply)({"params": params}, prompts.patches, prompts.patch_meta)
    assert np.abs(np.asarray(other)[merged] - expected).max() > 0.01


def test_positions_are_those_of_the_published_code():
    theirs, _ = make_reference(make_config(True))
    prompts = Prompts([LONG, SHORT, PLAIN])
    ids = torch.from_numpy(prompts.ids).long()
    positions, _ = theirs.model.get_rope_index(
        ids,
        (ids == IMAGE_ID).int(),
        torch.tensor(prompts.their_grids),
        attention_mask=torch.from_numpy(prompts.valid).long(),
    )
    np.testing.assert_array_equal(positions.permute(1, 2, 0).numpy()[prompts.valid], prompts.positions[prompts.valid])


def test_patches_of_the_layout_are_in_the_same_order():
    image = picture(7, 8, 8)
    patches, rows, cols = our_patches(image)
    np.testing.assert_array_equal(image_lib.patches(image, PATCH, MERGE), patches)
    chex.assert_trees_all_equal(image_lib.merge_order(8, MERGE), (rows, cols))


def test_round_trip_of_the_table():
    c = make_config(False)
    _, state = make_reference(c)
    model = qwen_vl.QwenVLModel(c, config.Execution("float32", "float32", "dense", True, "none"))
    prompts = Prompts([SHORT])
    like = _unboxed(jax.eval_shape(lambda key: model.init(key, prompts, method=run_ours), jax.random.key(0)))["params"]
    table = reference.qwen_vl(c)
    chex.assert_trees_all_equal(reference.export(table, reference.load(table, state, like)), state)
    with pytest.raises(ValueError, match=r"left over: theirs .'extra'"):
        reference.load(table, state | {"extra": state["model.norm.weight"]}, like)
    with pytest.raises(ValueError, match="decoder/norm/scale"):
        reference.load([entry for entry in table if entry.theirs != "model.norm.weight"], state, like)


def _unboxed(tree):
    return jax.tree.map(lambda leaf: leaf.unbox(), tree, is_leaf=lambda leaf: hasattr(leaf, "unbox"))
