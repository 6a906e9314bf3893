"""Stage 0: a small SigLIP, trained with the sigmoid loss on the same drawings. It is the vision target of stage 1.

    python -m mmcore_jax.train --config=configs/stage0.py

Only for recipes that have no pretrained vision encoder. `openmoji`: 2 CPU cores.
`openmoji_long`: the same drawings at 64 pixels. Not trained to the end here.
"""

import openmoji
from ml_collections import ConfigDict


def get_config(recipe: str) -> ConfigDict:
    """Returns the settings of a recipe."""
    return RECIPES[recipe]()


def _openmoji() -> ConfigDict:
    sources = dict(text_to_image=4.0, text_to_image_recolour=1.0)
    return ConfigDict(
        dict(
            stage="stage0",
            recipe="openmoji",
            seed=0,
            total_steps=400,
            batch_size=128,
            model=dict(
                vlm=None,
                queries=None,
                connector=None,
                vision_target=openmoji.siglip(text=True),
                dit=None,
                autoencoder=None,
            ),
            init=dict(vision_target="random"),
            data=dict(
                layout="pairs",
                sources={task: openmoji.source(task, weight) for task, weight in sources.items()},
                tokenizer=openmoji.TOKENIZER,
                image_size=None,
                aspect_ratios=(1.0,),
                vlm_pixels=None,
                budgets=dict(vlm_tokens=0, vision_patches=0, context_tokens=0, latent_tokens=0, images=1),
                window=1024,
                index=openmoji.INDEX,
                features=(),
                workers=0,
                threads=2,
                bad_record_limit=0.01,
            ),
            objectives=dict(sigmoid_contrastive=dict(weight=1.0), next_token=None, alignment=None, flow_matching=None),
            tuning=(dict(pattern=".*"),),
            optimizer=openmoji.optimizer(),
            sampling=None,
            checkpoint=dict(every=200, keep=2, keep_period=0, local_every=0, local=""),
            telemetry=dict(log_every=10, sample_every=0),
            mesh=openmoji.mesh(),
            execution=openmoji.execution(),
        )
    )


def _smoke() -> ConfigDict:
    """A few steps, to see that everything works."""
    config = _openmoji()
    config.update(recipe="smoke", total_steps=20, batch_size=16)
    return config


def _openmoji_long() -> ConfigDict:
    config = openmoji.lengthen(_openmoji())
    config.update(total_steps=1500, batch_size=256)
    config.model.vision_target.initial_bias = -5.54  # minus the logarithm of 255
    config.checkpoint.every = 250
    return config


RECIPES = {"openmoji": _openmoji, "smoke": _smoke, "openmoji_long": _openmoji_long}
