"""Stage 2, supervised fine-tuning: a short run on a smaller, curated mixture (MMCORE section 3.2).

    python -m mmcore_jax.train --config=configs/stage2_sft.py

Dropout is what stage 2 ended with; the VLM, its queries and the connector stay frozen, and are those of stage 2.
`openmoji`: after stage 2, on drawings and edits in equal parts; 2 CPU cores.
`openmoji_documents`: after stage 2, and stage 1's fine-tuning of that name, on documents of three images, too; what
tells their images apart is new.
`qwen25vl3b_sd35m`, `qwen25vl7b_sd35l`: after stage 2 of that name, on your curated shards in `data/sft/`; compiled and
counted, never trained yet. "The same dropout settings" is the paper's; it gives neither length nor learning rate here:
2,000 steps are those of its stage 1, the rate is that which stage 2 ends at.
`qwen25vl3b_sd35m_v5e_64` and so on: the same runs on the mesh of a pod (`published.FITTING` lists them).
"""

import openmoji
import published
import stage2
from ml_collections import ConfigDict

KEPT = ("vlm", "queries", "connector", "conditioning", "frames", "dit")


def get_config(recipe: str) -> ConfigDict:
    """Returns the settings of a recipe."""
    return RECIPES[recipe]()


def _after_stage2(recipe: str, rate: float) -> ConfigDict:
    """At a share of the learning rate."""
    config = stage2.get_config(recipe)
    config.stage = "stage2_sft"
    config.init.update({part: f"runs/stage2-{recipe}" for part in KEPT if part in config.init})
    config.optimizer.learning_rate *= rate
    dropout = config.objectives.flow_matching.dropout
    for dropped in (dropout.text, dropout.visual, dropout.images):
        dropped.start = dropped.end
    return config


def _openmoji() -> ConfigDict:
    config = _after_stage2("openmoji", 0.2)
    sources = dict(text_to_image_core=2.0, edit_tone=1.0, edit_colour=1.0)
    config.data.sources = {task: openmoji.source(task, weight) for task, weight in sources.items()}
    config.total_steps, config.checkpoint.every, config.optimizer.warmup_steps = 200, 100, 10
    config.telemetry.sample_every, config.gauges.every = 200, 200
    return config


def _openmoji_documents() -> ConfigDict:
    config = openmoji.documents(_after_stage2("openmoji", 0.2))
    config.init.update(dict.fromkeys(("vlm", "queries", "connector"), "runs/stage1_sft-openmoji_documents"))
    sources = dict(text_to_image_core=5.0, edit_tone=2.0, edit_gender=0.5, edit_colour=0.8, edit_recolour=0.8)
    sources |= dict(compose=0.3, compose_parts=2.0, sequence_clock=6.0, sequence_moon=0.3, sequence_tone=1.2)
    config.data.sources = {task: openmoji.source(task, weight) for task, weight in sources.items()}
    config.total_steps = config.telemetry.sample_every = 1500
    config.optimizer.update(learning_rate=1e-3, warmup_steps=30, flat=0.5)
    config.tuning = (dict(pattern="frames/.*", learning_rate=10.0), *config.tuning)  # from zero, in a short run
    config.checkpoint.every = 500
    return config


def _published(recipe: str) -> ConfigDict:
    config = _after_stage2(recipe, 0.1)
    sources = dict(text_to_image=2.0, edit=1.0, interleaved=1.0)
    config.data.sources = {task: published.source(f"sft/{task}", weight) for task, weight in sources.items()}
    config.total_steps, config.optimizer.warmup_steps = 2000, 100
    config.telemetry.sample_every, config.gauges.every = 250, 250
    return config


RECIPES = published.on_pods(
    {
        "openmoji": _openmoji,
        "openmoji_documents": _openmoji_documents,
        "qwen25vl3b_sd35m": lambda: _published("qwen25vl3b_sd35m"),
        "qwen25vl7b_sd35l": lambda: _published("qwen25vl7b_sd35l"),
    }
)
