"""Stage 1, supervised fine-tuning: a short run on a smaller, curated mixture (MMCORE section 3.1.2).

    python -m mmcore_jax.train --config=configs/stage1_sft.py

What trains, and by which losses, is what it was in stage 1, whose weights it starts from.
`openmoji`: after stage 1, on the drawings that stage 2 learns to draw, edits and captions; 2 CPU cores.
`openmoji_documents`: after stage 1, on all it knows and on documents of three images: parts of two drawings in one,
clock faces, phases of the moon, scales of skin tones.
`qwen25vl3b_sd35m`, `qwen25vl7b_sd35l`: after stage 1 of that name, on your curated shards in `data/sft/`; compiled and
counted, never trained yet. About 2,000 steps are the paper's, which gives nothing else: the learning rate is that which
stage 1 ends at, the shares are ours.
`qwen25vl3b_sd35m_v5e_64` and so on: the same runs on the mesh of a pod (`published.FITTING` lists them).
"""

import openmoji
import published
import stage1
from ml_collections import ConfigDict

TRAINED = ("vlm", "queries", "connector")


def get_config(recipe: str) -> ConfigDict:
    """Returns the settings of a recipe."""
    return RECIPES[recipe]()


def _after_stage1(recipe: str, rate: float) -> ConfigDict:
    """At a share of the learning rate."""
    config = stage1.get_config(recipe)
    config.stage = "stage1_sft"
    config.init.update(dict.fromkeys(TRAINED, f"runs/stage1-{recipe}"))
    config.optimizer.learning_rate *= rate
    return config


def _openmoji() -> ConfigDict:
    config = _after_stage1("openmoji", 0.2)
    sources = dict(text_to_image_core=4.0, edit_tone=1.0, edit_colour=1.0, caption=1.0)
    config.data.sources = {task: openmoji.source(task, weight) for task, weight in sources.items()}
    config.total_steps, config.checkpoint.every, config.optimizer.warmup_steps = 100, 50, 10
    config.gauges.every = 50
    return config


def _openmoji_documents() -> ConfigDict:
    config = openmoji.documents(_after_stage1("openmoji", 0.2))
    sources = dict(text_to_image=2.0, text_to_image_core=1.0, edit_tone=1.5, edit_gender=0.4, edit_colour=0.6)
    sources |= dict(
        edit_recolour=0.6,
        compose=0.3,
        compose_parts=2.0,
        sequence_clock=2.5,
        sequence_moon=0.3,
        sequence_tone=1.0,
        caption=0.3,
    )
    config.data.sources = {task: openmoji.source(task, weight) for task, weight in sources.items()}
    config.update(total_steps=450, batch_size=24)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=20)
    config.checkpoint.every = 150
    return config


def _published(recipe: str) -> ConfigDict:
    config = _after_stage1(recipe, 0.1)
    sources = dict(understanding=1.0, text_to_image=2.0, edit=1.0, interleaved=0.5)
    config.data.sources = {task: published.source(f"sft/{task}", weight) for task, weight in sources.items()}
    config.total_steps, config.optimizer.warmup_steps, config.gauges.every = 2000, 100, 250
    return config


RECIPES = published.on_pods(
    {
        "openmoji": _openmoji,
        "openmoji_documents": _openmoji_documents,
        "qwen25vl3b_sd35m": lambda: _published("qwen25vl3b_sd35m"),
        "qwen25vl7b_sd35l": lambda: _published("qwen25vl7b_sd35l"),
    }
)
