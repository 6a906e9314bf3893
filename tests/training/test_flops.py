"""Analytic FLOPs: against the compiler's count of the same programs, numbers by hand, and what freezing saves."""

import copy
import dataclasses
import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from mmcore_jax import config as config_lib
from mmcore_jax import sharding
from mmcore_jax.bridge.conditioning import Condition, Drop
from mmcore_jax.config import Tuning
from mmcore_jax.data import features, geometry, layout, packing
from mmcore_jax.data.example import image, text
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.models import mmdit, qwen_vl
from mmcore_jax.nn import rotary
from mmcore_jax.nn.masks import PAD, TokenMeta
from mmcore_jax.training import flops
from mmcore_jax.training.optimizer import assign
from mmcore_jax.training.state import Constants, abstract_state, make_plan
from mmcore_jax.training.step import make_step
from tests import rows

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
FROZEN, TRAINED = Tuning(".*", frozen=True), Tuning(".*")
ROWS, WORDS = 4, 12


class WordTokenizer:
    """One token a word: what `ChatFormat` needs of a tokenizer."""

    chat_template = None

    @property
    def backend_tokenizer(self):
        return self

    def encode(self, words, add_special_tokens):
        return types.SimpleNamespace(ids=[5] * len(words.split()))


def document(words=WORDS):
    """Two generated images, the second of which looks back at the first: every part has work."""
    prompt = text("word " * words)
    drawing = image(rows.png(0, 32), True)
    return {"id": "", "task": "", "segments": [prompt, drawing, prompt, drawing]}


def wide(config, dual_layers, connector_depth):
    """The stage with networks wide enough for their matrix products to dominate, and no pictures to read."""
    model = config.model
    model = dataclasses.replace(
        model,
        vlm=dataclasses.replace(
            model.vlm,
            width=256,
            depth=2,
            heads=4,
            mrope_section=(8, 12, 12),
            mlp_width=768,
            vocab_size=512,
            vision=dataclasses.replace(model.vlm.vision, width=192, depth=2, mlp_width=512),
        ),
        connector=connector_of_depth(connector_depth),
        vision_target=model.vision_target and siglip_of_width(256, text=False),
        dit=model.dit
        and dataclasses.replace(model.dit, width=256, heads=4, depth=2, dual_layers=dual_layers, context_width=256),
    )
    return dataclasses.replace(config, model=model, batch_size=ROWS)


def connector_of_depth(depth):
    if not depth:
        return config_lib.LinearConnector("linear", 256)
    return config_lib.TransformerConnector("transformer", 256, config_lib.Tower(384, depth, 4, 1024))


def siglip_of_width(width, text):
    vision = config_lib.SiglipVision(width, 2, 4, 4 * width, 32, 4)
    return config_lib.Siglip(vision, config_lib.SiglipText(width, 2, 4, 4 * width, 512, 16) if text else None)


class Case:
    """A stage, all of it frozen: its config, its plan, and a batch with `padding` in each budget."""

    def __init__(self, stage, padding=0, dual_layers=0, connector_depth=0):
        config = config_lib.load(str(CONFIGS / f"{stage}.py"))
        if config.data.layout == "pairs":
            model = dataclasses.replace(config.model, vision_target=siglip_of_width(256, text=True))
            config = dataclasses.replace(config, model=model, batch_size=ROWS)
            pixels = np.zeros((32, 32, 3), np.uint8)
            self.batch = packing.assemble_pairs([(pixels, [1] * 16)] * ROWS, 0, pixels.shape[0], 16)
        else:
            config = wide(config, dual_layers, connector_depth)
            self.batch = self.interleaved(config, padding)
        optimizer = dataclasses.replace(config.optimizer, ema_decay=0.0)
        self.config = dataclasses.replace(config, tuning=(FROZEN,), optimizer=optimizer)
        self.model = MMCORE(self.config.model, self.config.execution)
        self.mesh = sharding.make_mesh(self.config.mesh, jax.devices()[:1])
        self.plan = make_plan(self.config, self.model, self.mesh, self.batch)

    @property
    def flops(self):
        return flops.step_flops(self.config, self.plan, self.batch)

    def tuned(self, *table):
        """The same under another table, with plain gradient descent: the compiler counts little beside products."""
        case = copy.copy(self)
        case.config = dataclasses.replace(self.config, tuning=table)
        case.plan = self.plan._replace(tuning=assign(list(self.plan.shapes), table), optimizer=optax.sgd(0.1))
        return case

    def interleaved(self, config, padding):
        sizes = geometry.derive(config.model, config.data)
        item = layout.make_item(document(), layout.ChatFormat(WordTokenizer()), sizes)
        budgets = config_lib.Budgets(*(length + padding for length in layout.lengths(item, sizes)))
        pictures = [layout.picture(frame, sizes) for frame in item.frames]
        return packing.assemble([[(item, pictures)]] * ROWS, 0, budgets, sizes)

    def counted_by_compiler(self, function, *inputs):
        """FLOPs of the optimised program of `function(bound model, batch, *inputs)`, forward."""
        params = {"params": unflatten_dict(self.plan.shapes, sep="/")}

        def program(params, batch, *inputs):
            return function(self.model.bind(params), batch, *inputs)

        return counted(jax.jit(program).lower(params, self.batch, *inputs))


load = functools.cache(Case)


def counted(lowered):
    """FLOPs of the optimised program; machine code of the lowest quality is enough to count them."""
    compiled = lowered.compile({"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
    return compiled.cost_analysis()["flops"]


@pytest.fixture
def every_pair(monkeypatch):
    """Counts hidden pairs as well, as dense attention computes them, but not the product by which rotary turns."""
    monkeypatch.setattr(flops, "attention_pairs", lambda q, k, rule: q.kind.size * k.kind.shape[1])
    monkeypatch.setattr(rotary, "rotate", lambda x, cos, sin: x * cos[:, :, None] + x * sin[:, :, None])


# --- Against the compiler ---------------------------------------------------------------------------------------------


def hidden(case):
    return jnp.zeros((*case.batch.tokens.ids.shape, 256))


def no_drop(batch):
    nothing = jnp.zeros(batch.images.generated.shape, bool)
    return Drop(nothing, nothing)


def condition(model, batch, context):
    return Condition(context, jnp.zeros((*batch.images.generated.shape, model.config.dit.pooled_width)))


PARTS = {
    "vlm/vision": ("stage1", lambda m, b: m.vlm.vision(qwen_vl.normalize(b.patches.values), b.patches.meta), ()),
    "vlm/decoder": ("stage1", lambda m, b, x: m.vlm.decode(x, b.tokens.meta, b.tokens.positions), (hidden,)),
    "connector": ("stage1", lambda m, b, x: m.visual_embeddings(x, b), (hidden,)),
    "vision_target": ("stage1", lambda m, b: m.target_embeddings(b.images.targets), ()),
    "conditioning": (
        "stage2",
        lambda m, b, x, visual: m.condition(m.text_embeddings(x, b), visual, b, no_drop(b)),
        (hidden, lambda case: jnp.zeros((ROWS, 2, 4, 256))),
    ),
    "dit": (
        "stage2",
        lambda m, b, tokens, context: m.velocity(
            tokens, condition(m, b, context), jnp.zeros(b.images.generated.shape), b
        ),
        (
            lambda case: jnp.zeros((*case.batch.diffusion.latent_source.shape, 48)),
            lambda case: jnp.zeros((*case.batch.diffusion.context_source.shape, 256)),
        ),
    ),
}


@pytest.mark.usefixtures("every_pair")
@pytest.mark.parametrize(
    ("part", "sizes"),
    [*((part, {}) for part in PARTS), ("dit", {"dual_layers": 1}), ("connector", {"connector_depth": 2})],
)
def test_forward_of_a_part_is_what_the_compiler_counts(part, sizes):
    stage, function, inputs = PARTS[part]
    case = load(stage, **sizes)
    measured = case.counted_by_compiler(function, *(make(case) for make in inputs))
    if part == "conditioning":
        measured /= 2  # the program sends every context token through both pathways
    assert case.flops[part] == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize(
    ("stage", "kind", "spared"),
    [("stage1", "targets", {"vision_target"}), ("stage2", "conditioning", {"vlm/vision", "vlm/decoder", "connector"})],
)
def test_parts_whose_features_a_batch_brings_are_spared(stage, kind, spared):
    case = load(stage)
    given = features.empty(ROWS, case.config, geometry.derive(case.config.model, case.config.data), [kind])
    found = flops.step_flops(case.config, case.plan, case.batch._replace(features=given))
    kept = {part: count for part, count in case.flops.items() if part not in {*spared, "total"}}
    assert spared < set(case.flops)
    assert found == {**kept, "total": sum(kept.values())}


@pytest.mark.usefixtures("every_pair")
def test_head_is_what_the_compiler_counts_where_every_token_has_a_target():
    case = load("stage1")
    batch = case.batch._replace(tokens=case.batch.tokens._replace(targets=np.ones_like(case.batch.tokens.targets)))
    head = flops.step_flops(case.config, case.plan, batch)["vlm/head"]
    assert head == pytest.approx(case.counted_by_compiler(lambda m, b, x: m.logits(x), hidden(case)), rel=0.01)


def test_contrast_is_what_the_compiler_counts():
    case = load("stage0")
    assert case.flops["total"] == pytest.approx(case.counted_by_compiler(lambda m, b: m.contrast(b)), rel=0.04)


TABLES = {
    "everything trains": ("stage1", (Tuning("vision_target/.*", frozen=True), TRAINED)),
    "queries and connector train": ("stage1", (Tuning("(vlm|vision_target)/.*", frozen=True), TRAINED)),
    "diffusion trains": ("stage2", (Tuning("(vlm|queries|connector)/.*", frozen=True), TRAINED)),
    "all of stage 0 trains": ("stage0", (TRAINED,)),
}


@pytest.mark.usefixtures("every_pair")
@pytest.mark.parametrize("name", TABLES)
def test_whole_step_is_what_the_compiler_counts(name):
    stage, table = TABLES[name]
    case = load(stage).tuned(*table)
    step = make_step(case.config, case.model, case.plan)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), abstract_state(case.config, case.plan, case.mesh)
    )
    frozen = {path: case.plan.shapes[path] for path in case.plan.frozen}
    statistics = {"target_mean": jax.ShapeDtypeStruct((4, 256), jnp.float32)}
    lowered = jax.jit(step).lower(abstract, Constants(frozen, statistics), case.batch)
    assert case.flops["total"] == pytest.approx(counted(lowered), rel=0.06)


# --- Attention pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "module", "part", "dual_layers"),
    [("stage1", qwen_vl, "vlm", 0), ("stage2", mmdit, "dit", 0), ("stage2", mmdit, "dit", 1)],
)
def test_pairs_are_those_that_the_network_itself_lets_through(monkeypatch, stage, module, part, dual_layers):
    seen = []
    real = module.attention

    def spy(q, k, v, q_meta, k_meta, rule, implementation):
        visible = rule(
            TokenMeta(*(field[:, :, None] for field in q_meta)), TokenMeta(*(field[:, None, :] for field in k_meta))
        )
        pairs = jnp.sum(visible & (q_meta.kind != PAD)[..., None])
        pairs += 0 * q[0, 0, 0, 0]  # else Flax's scan calls back once more while it traces, as metadata is known then
        jax.debug.callback(lambda pairs: seen.append(4.0 * q.shape[-1] * q.shape[-2] * float(pairs)), pairs)
        return real(q, k, v, q_meta, k_meta, rule, implementation)

    monkeypatch.setattr(module, "attention", spy)
    case = load(stage, padding=16, dual_layers=dual_layers)
    zeros = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in case.plan.shapes.items()}
    jax.block_until_ready(jax.jit(case.model.apply)({"params": unflatten_dict(zeros, sep="/")}, case.batch))
    jax.effects_barrier()
    forwards = [forward for name, forward in flops._count(case.config, case.batch)[1] if name.startswith(part)]
    assert sum(forwards) == pytest.approx(sum(seen), rel=1e-6)
    assert all(forwards)


def test_pairs_of_a_long_row_are_counted_in_blocks(monkeypatch):
    meta = load("stage2").batch.tokens.meta
    length = meta.kind.shape[1]
    assert flops.attention_pairs(meta, meta, flops.masks.causal) == ROWS * length * (length + 1) // 2
    monkeypatch.setattr(flops, "QUERY_BLOCK", 7)
    assert flops.attention_pairs(meta, meta, flops.masks.causal) == ROWS * length * (length + 1) // 2


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_numbers_by_hand():
    case = load("stage1")
    length = case.batch.tokens.ids.shape[1]
    matrices = 256 * 256 + 2 * 256 * 128 + 256 * 256 + 3 * 256 * 768  # q, k and v of two heads, out, SwiGLU
    assert case.flops["vlm/decoder"] == ROWS * 2 * (2 * length * matrices + 4 * 256 * length * (length + 1) / 2)
    # The VLM sees one of the two images: 64 patches of 2 * 48 values; windows of 4 x 4 in one of two blocks.
    block = 2 * 64 * (4 * 192 * 192 + 3 * 192 * 512)
    merger = 2 * 16 * (768 * 768 + 768 * 256)
    scores = 4 * 192 * (64 * 64 + 4 * 16 * 16)
    assert case.flops["vlm/vision"] == ROWS * (2 * 64 * 96 * 192 + 2 * block + scores + merger)
    assert case.flops["connector"] == ROWS * 2 * (2 * 4) * 256 * 256
    # Two images of 64 patches.
    target = 2 * 128 * (48 * 256 + 2 * 12 * 256 * 256) + 2 * 4 * 256 * 2 * 64 * 64
    assert case.flops["vision_target"] == ROWS * target
    assert case.flops["total"] == sum(count for part, count in case.flops.items() if part != "total")


def test_dual_attention_by_hand():
    """A row holds two noised copies of 64 patches and a clean one of the first, which both clean and second see."""
    extra = load("stage2", dual_layers=1).flops["dit"] - load("stage2").flops["dit"]
    kernels = 2 * (3 * 64 * 4 * 256 * 256 + 3 * 256 * 3 * 256)  # q, k, v, out; shift, scale, gate at 3 timesteps
    assert extra == ROWS * (kernels + 4 * 256 * 4 * 64 * 64)


def test_a_transformer_connector_by_hand():
    """Two images of 4 queries in a row, 256 -> 384 channels, two blocks, 384 -> 256; attention within an image."""
    forward = 2 * 8 * (256 * 384 + 2 * (4 * 384 * 384 + 3 * 384 * 1024) + 384 * 256) + 4 * 384 * 2 * 2 * 4 * 4
    case = load("stage1", connector_depth=2)
    assert case.flops["connector"] == ROWS * forward
    assert case.tuned(Tuning("connector/.*"), FROZEN).flops["connector"] == 3 * ROWS * forward
    assert case.tuned(Tuning("vision_target/.*"), FROZEN).flops["connector"] == ROWS * forward


def test_the_head_costs_only_where_a_token_is_learned():
    case = load("stage1")
    targets = np.full_like(case.batch.tokens.targets, -1)
    targets[0, :3] = 5
    batch = case.batch._replace(tokens=case.batch.tokens._replace(targets=targets))
    assert "vlm/head" not in case.flops
    assert flops.step_flops(case.config, case.plan, batch)["vlm/head"] == 2 * 3 * 256 * 512


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_padding_is_free(stage):
    assert load(stage, padding=16).flops == load(stage).flops


# --- What freezing saves ----------------------------------------------------------------------------------------------

FACTORS = {
    # What trains: (stage, forwards that the kernels of each part cost).
    "vlm/.*": ("stage1", {"vlm/vision": 3, "vlm/decoder": 3, "connector": 2, "vision_target": 1}),
    "vlm/vision/.*": ("stage1", {"vlm/vision": 3, "vlm/decoder": 2, "connector": 2, "vision_target": 1}),
    "vlm/decoder/.*": ("stage1", {"vlm/vision": 1, "vlm/decoder": 3, "connector": 2, "vision_target": 1}),
    "queries/.*": ("stage1", {"vlm/vision": 1, "vlm/decoder": 2, "connector": 2, "vision_target": 1}),
    "connector/.*": ("stage2", {"vlm/vision": 1, "vlm/decoder": 1, "connector": 3, "conditioning": 2, "dit": 2}),
    "conditioning/.*": ("stage2", {"vlm/vision": 1, "vlm/decoder": 1, "connector": 1, "conditioning": 3, "dit": 2}),
    "dit/.*": ("stage2", {"vlm/vision": 1, "vlm/decoder": 1, "connector": 1, "conditioning": 1, "dit": 3}),
    "vision_target/.*": ("stage1", {"vlm/decoder": 1, "connector": 1, "vision_target": 3}),
}


@pytest.mark.parametrize("pattern", FACTORS)
def test_frozen_parts_cost_what_they_need(pattern):
    stage, factors = FACTORS[pattern]
    frozen = load(stage)
    case = frozen.tuned(Tuning(pattern), FROZEN)
    attention = dict.fromkeys(factors, 0.0)
    for part, forward in flops._count(case.config, case.batch)[1]:
        attention[part] = attention.get(part, 0.0) + forward
    for part, factor in factors.items():
        kernels = frozen.flops[part] - attention[part]
        passes = 3 if factor > 1 else 1
        assert case.flops[part] == pytest.approx(factor * kernels + passes * attention[part]), part


def test_half_a_part_that_trains_is_counted_by_kernel():
    frozen = load("stage2")
    case = frozen.tuned(Tuning("dit/.*_up/.*"), FROZEN)
    attention = dict(flops._count(case.config, case.batch)[1])["dit"]
    latents, context = (
        meta.kind.size for meta in (case.batch.diffusion.latent_meta, case.batch.diffusion.context_meta)
    )
    trained = 2 * 256 * 1024 * (2 * latents + context)  # the last of the two blocks has no MLP for the context
    assert case.flops["dit"] == 2 * (frozen.flops["dit"] - attention) + trained + 3 * attention


# --- Mistakes and devices ---------------------------------------------------------------------------------------------


def test_an_unknown_kernel_is_named():
    case = load("stage2")
    plan = case.plan._replace(shapes=case.plan.shapes | {"adapter/kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)})
    with pytest.raises(ValueError, match="adapter/kernel"):
        flops.step_flops(case.config, plan, case.batch)


def test_every_line_of_the_table_counts_for_some_kernel():
    paths = {path for stage in ("stage0", "stage1", "stage2") for path in load(stage).plan.shapes}
    used = {flops._line(path) for path in paths if path.endswith(("/kernel", "vlm/embedding"))}
    assert used == {(part, counted_by) for _, part, counted_by in flops._KERNELS}


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert flops.peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
