"""Stage 1: the VLM learns to predict visual embeddings at its query tokens (MMCORE equations 1 and 2).

    python -m mmcore_jax.train --config=configs/stage1.py

Everything but the vision target trains: lambda_t next-token + lambda_a alignment, no flow loss. Unlike equation 1,
cosines are of what differs from the mean of each place (`--config.objectives.alignment.center=False` for the paper's).
`openmoji`: after stage 0; 3 minutes on 2 CPU cores; centred cosine 0.8 on trained captions, 0.3 on held-out ones.
`openmoji_long`: after stage 0 of that name; 64 pixels, all edits, compositions, sequences. Not trained to the end here.
`lora`: after `openmoji`, whose VLM it keeps and adapts to captions with low-rank matrices in every layer.
`query_only`: after `openmoji`, whose VLM it freezes; new queries and a new connector learn to read it (MetaQueries).
`qwen25vl3b_sd35m`, `qwen25vl7b_sd35l`: published weights in `checkpoints/` and your shards in `data/` (see README), on
accelerators; compiled and counted, never trained yet. 64 queries as in the paper, whose score is flat by 50,000 steps;
it gives no learning rates, weights of the losses, batch or shares: those are ours.
`qwen25vl3b_frozen`: the VLM frozen under a transformer connector; compiled and counted, never trained yet.
`qwen25vl3b_sd35m_v5e_64` and so on: the same runs on the mesh of a pod (`published.FITTING` lists them).
"""

import openmoji
import published
from ml_collections import ConfigDict


def get_config(recipe: str) -> ConfigDict:
    """Returns the settings of a recipe."""
    return RECIPES[recipe]()


def _openmoji() -> ConfigDict:
    sources = dict(text_to_image=3.0, text_to_image_core=1.5, edit_tone=2.5, edit_gender=0.8, edit_colour=1.0)
    sources |= dict(compose=0.3, caption=0.5, text_to_image_recolour=0.5, edit_recolour=1.0)
    return ConfigDict(
        dict(
            stage="stage1",
            recipe="openmoji",
            seed=0,
            total_steps=450,
            batch_size=32,
            model=dict(
                vlm=openmoji.vlm(),
                queries=openmoji.queries(),
                connector=openmoji.connector(),
                vision_target=openmoji.siglip(text=False),
                dit=None,
                autoencoder=None,
            ),
            init=dict(vlm="random", queries="random", connector="random", vision_target="runs/stage0-openmoji"),
            data=dict(
                layout="interleaved",
                sources={task: openmoji.source(task, weight) for task, weight in sources.items()},
                tokenizer=openmoji.TOKENIZER,
                image_size=None,
                aspect_ratios=(1.0,),
                vlm_pixels=openmoji.VLM_PIXELS,
                budgets=dict(vlm_tokens=80, vision_patches=128, context_tokens=0, latent_tokens=0, images=3),
                window=1024,
                index=openmoji.INDEX,
                features=("targets",),
                workers=0,
                threads=2,
                bad_record_limit=0.01,
            ),
            objectives=dict(
                sigmoid_contrastive=None,
                next_token=dict(weight=0.3, user_text=True),
                alignment=dict(weight=1.0, center=True),
                flow_matching=None,
            ),
            tuning=(dict(pattern="vision_target/.*", frozen=True), dict(pattern=".*")),
            optimizer=openmoji.optimizer(),
            sampling=None,
            checkpoint=dict(every=225, keep=2, keep_period=0, local_every=0, local=""),
            telemetry=dict(log_every=10, sample_every=0),
            mesh=openmoji.mesh(),
            execution=openmoji.execution(),
            gauges=openmoji.gauges(0, "caption", "text_to_image", "edit_tone"),
        )
    )


def _smoke() -> ConfigDict:
    """A few steps, to see that everything works."""
    config = _openmoji()
    config.update(recipe="smoke", total_steps=20, batch_size=4)
    config.init.vision_target = "runs/stage0-smoke"
    return config


def _openmoji_long() -> ConfigDict:
    config = openmoji.lengthen(_openmoji())
    config.update(total_steps=4000)
    config.init.vision_target = "runs/stage0-openmoji_long"
    sources = dict(text_to_image=3.0, edit_tone=2.0, edit_gender=1.0, edit_colour=0.7, compose=0.3, caption=0.5)
    sources |= dict(
        sequence_clock=0.5, sequence_moon=0.1, sequence_tone=1.0, text_to_image_recolour=0.5, edit_recolour=0.7
    )
    config.data.sources = {task: openmoji.source(task, weight) for task, weight in sources.items()}
    config.optimizer.warmup_steps = 200
    config.checkpoint.every = 250
    config.gauges = openmoji.gauges(1000, "caption", "text_to_image", "edit_tone", "edit_gender", "compose")
    return config


def _lora() -> ConfigDict:
    """The VLM frozen but for LoRA, on a mixture of mostly captions, of which the assistant's words count."""
    config = _openmoji()
    config.update(recipe="lora", total_steps=150)
    config.model.vlm.lora = dict(rank=8, alpha=16.0, targets=("q", "k", "v", "out", "gate", "up", "down"))
    config.init.update(dict.fromkeys(("vlm", "queries", "connector"), "runs/stage1-openmoji"))
    config.data.sources = dict(
        caption=openmoji.source("caption", 3.0),
        text_to_image=openmoji.source("text_to_image", 1.0),
    )
    config.objectives.next_token = dict(weight=1.0, user_text=False)
    config.tuning = (
        dict(pattern="vlm/.*/lora_[ab]"),
        dict(pattern="(vlm|vision_target)/.*", frozen=True),
        dict(pattern=".*"),
    )
    config.checkpoint.every = 75
    config.gauges.every = 50
    return config


def _query_only() -> ConfigDict:
    """The VLM as it is: what it knows is neither lost nor added to, so only the alignment is a loss."""
    config = _openmoji()
    config.update(recipe="query_only", total_steps=150)
    config.init.vlm = "runs/stage1-openmoji"
    del config.data.sources["caption"]
    config.objectives.next_token = None
    config.tuning = (dict(pattern="(vlm|vision_target)/.*", frozen=True), dict(pattern="(queries|connector)/.*"))
    config.checkpoint.every = 75
    config.gauges = openmoji.gauges(50, "text_to_image", "edit_tone")
    return config


def _published(recipe: str, vlm: ConfigDict, checkpoint: str) -> ConfigDict:
    """Full tuning of a published VLM towards SigLIP so400m, with understanding data beside it (lambda_t)."""
    sources = dict(understanding=1.0, text_to_image=2.0, edit=1.0, interleaved=0.5)
    return ConfigDict(
        dict(
            stage="stage1",
            recipe=recipe,
            seed=0,
            total_steps=50_000,
            batch_size=256,
            model=dict(
                vlm=vlm,
                queries=dict(grid=8),
                connector=dict(kind="linear", width=published.SIGLIP_WIDTH),
                vision_target=published.siglip(),
                dit=None,
                autoencoder=None,
            ),
            init=dict(vlm=checkpoint, queries="random", connector="random", vision_target=published.SIGLIP),
            data=dict(
                layout="interleaved",
                sources={task: published.source(task, weight) for task, weight in sources.items()},
                tokenizer=checkpoint,
                image_size=None,
                aspect_ratios=(1.0,),
                vlm_pixels=published.VLM_PIXELS,
                budgets=dict(
                    vlm_tokens=4096,
                    vision_patches=8 * published.VLM_PATCHES,
                    context_tokens=0,
                    latent_tokens=0,
                    images=16,
                ),
                window=4096,
                index=published.INDEX,
                features=(),
                workers=16,
                threads=2,
                bad_record_limit=0.01,
            ),
            objectives=dict(
                sigmoid_contrastive=None,
                next_token=dict(weight=1.0, user_text=False),
                alignment=dict(weight=1.0, center=True),
                flow_matching=None,
            ),
            tuning=(
                dict(pattern="vision_target/.*", frozen=True),
                dict(pattern="vlm/.*", learning_rate=0.2),
                dict(pattern=".*"),
            ),
            optimizer=published.optimizer(),
            sampling=None,
            checkpoint=dict(every=500, keep=3, keep_period=10_000, local_every=0, local=""),
            telemetry=dict(log_every=10, sample_every=0),
            mesh=published.mesh(),
            execution=published.execution("qkv"),
            gauges=published.gauges("understanding", "text_to_image", "edit"),
        )
    )


def _qwen25vl3b_frozen() -> ConfigDict:
    """The paper's Table 1 with a connector of 6 layers: nothing but it and the queries trains."""
    config = _published("qwen25vl3b_frozen", published.qwen_3b(), published.QWEN_3B)
    config.model.connector = published.transformer_connector(config.model.vlm.width, depth=6)
    del config.data.sources["understanding"]
    config.objectives.next_token = None
    config.tuning = (dict(pattern="(vlm|vision_target)/.*", frozen=True), dict(pattern=".*"))
    return config


RECIPES = published.on_pods(
    {
        "openmoji": _openmoji,
        "smoke": _smoke,
        "openmoji_long": _openmoji_long,
        "lora": _lora,
        "query_only": _query_only,
        "qwen25vl3b_sd35m": lambda: _published("qwen25vl3b_sd35m", published.qwen_3b(), published.QWEN_3B),
        "qwen25vl7b_sd35l": lambda: _published("qwen25vl7b_sd35l", published.qwen_7b(), published.QWEN_7B),
        "qwen25vl3b_frozen": _qwen25vl3b_frozen,
    }
)
