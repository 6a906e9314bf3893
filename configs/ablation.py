"""Short stages of which `python -m mmcore_jax.ablate` trains variants; `mmcore_jax/ablation/table.py` says which.

    python -m mmcore_jax.ablate --workdir=runs/ablation --seeds=0,1,2 --minutes=240

A recipe is a stage. Where `init` names one, `ablate` puts the run of it that belongs to the variant and the seed.
`language`: a VLM that has only read and captioned, which is to the small recipes what a published one is to the large.
`documents`: a stage 2 on documents that generate two images.
`stage2_sft`: after stage 2, whose control goes on as before, against a curated mixture at a lower rate.
"""

import openmoji
import stage0
import stage1
import stage2
from ml_collections import ConfigDict

PARTS = ("vlm", "queries", "connector")


def get_config(recipe: str) -> ConfigDict:
    """Returns the settings of a stage."""
    return RECIPES[recipe]()


def _reading(config: ConfigDict) -> ConfigDict:
    """The mixture of what has a VLM to train; rows have room for a document of three images."""
    sources = dict(text_to_image=3.0, text_to_image_core=1.5, edit_tone=2.5, edit_colour=1.0)
    sources |= dict(sequence_tone=1.0, caption=0.5)
    config.data.sources = {task: openmoji.source(task, weight) for task, weight in sources.items()}
    config.data.budgets.vlm_tokens = 112
    config.batch_size = 24
    return config


def _stage0() -> ConfigDict:
    config = stage0.get_config("openmoji")
    config.update(recipe="ablation", total_steps=300)
    config.checkpoint.every = 150
    return config


def _language() -> ConfigDict:
    config = _reading(stage1.get_config("openmoji"))
    config.update(stage="language", recipe="ablation", total_steps=200)
    config.model.vision_target = None
    config.init = dict.fromkeys(PARTS, "random")
    config.data.features = ()
    config.objectives.alignment = None
    config.objectives.next_token.weight = 1.0
    config.tuning = (dict(pattern="(queries|connector)/.*", frozen=True), dict(pattern=".*"))
    config.checkpoint.every = 100
    config.gauges = openmoji.gauges(0, "caption")
    return config


def _stage1() -> ConfigDict:
    config = _reading(stage1.get_config("openmoji"))
    config.update(recipe="ablation", total_steps=200)
    config.init.update(vlm="language", vision_target="stage0")
    config.checkpoint.every = 100
    config.gauges.update(every=50, examples=100)
    return config


def _stage2() -> ConfigDict:
    config = stage2.get_config("openmoji")
    config.update(recipe="ablation", total_steps=500)
    config.init.update(dict.fromkeys(PARTS, "stage1"))
    sources = dict(text_to_image_core=16.0, edit_tone=5.0, edit_colour=4.0)
    config.data.sources = {task: openmoji.source(task, weight) for task, weight in sources.items()}
    config.objectives.flow_matching.dropout.text = dict(start=0.5, end=0.1, steps=250)
    config.checkpoint.every = 250
    config.telemetry.sample_every = 0
    config.gauges = openmoji.gauges(125, "edit_tone")
    return config


def _documents() -> ConfigDict:
    """Of a document of three images two are generated, and two are looked back at."""
    config = _stage2()
    config.recipe = "documents"
    config.data.sources.update(sequence_tone=openmoji.source("sequence_tone", 10.0))
    config.data.budgets.update(vlm_tokens=112, latent_tokens=256)
    config.gauges = openmoji.gauges(125, "edit_tone", "sequence_tone")
    return config


def _stage2_sft() -> ConfigDict:
    config = _stage2()
    config.update(stage="stage2_sft", total_steps=150)
    config.init.update(dict.fromkeys((*PARTS, "conditioning", "dit"), "stage2"))
    config.objectives.flow_matching.dropout.text.start = config.objectives.flow_matching.dropout.text.end
    config.optimizer.warmup_steps = 10
    config.checkpoint.every = config.gauges.every = 75
    return config


RECIPES = {
    "stage0": _stage0,
    "language": _language,
    "stage1": _stage1,
    "stage2": _stage2,
    "documents": _documents,
    "stage2_sft": _stage2_sft,
}
