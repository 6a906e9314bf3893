"""Stage 2: the diffusion transformer learns to draw from text and predicted visual embeddings (MMCORE section 3.2).

    python -m mmcore_jax.train --config=configs/stage2.py

The VLM, its queries and the connector are frozen. Text dropout starts high and anneals.
`openmoji`: after stage 1; 7.5 minutes on 2 CPU cores; draws what it trained on, recolours held-out shapes (see README).
`openmoji_long`: after stage 1 of that name; all drawings at 64 pixels, every kind of edit, compositions and sequences.
Sized for hours on 2 CPU cores. Not trained to the end here.
`qwen25vl3b_sd35m`, `qwen25vl7b_sd35l`: after stage 1 of that name, from published weights in `checkpoints/`, at 1024
pixels, on accelerators; compiled and counted, never trained yet. The paper gives no rates of dropout and learning, no
batch and no shares here: those are ours. Timesteps are Stable Diffusion 3's, whose shift of 3 is of 1024 pixels and
less for smaller images (its section 5.3.2; its published scheduler keeps 3). Solver and steps are its scheduler's, the
guidance scale is what Stability draws with 3.5-large at. Condition images alone are dropped from 5% of edits, as in
InstructPix2Pix (arXiv:2211.09800, section 3.2.1), but independently of the rest. `joint` comes on top of both rates of
dropout. The average of the weights reaches back about a tenth of the steps so far, which its decay would take 90,000
steps to exceed.
A row holds three images of 1024 pixels, and a generated one that is looked back at counts twice. For longer documents,
such as an input and two outputs, which stage 1 takes, raise `config.data.budgets`: what does not fit counts as bad.
`qwen25vl3b_sd35m_v5e_64` and so on: the same runs on the mesh of a pod (`published.FITTING` lists them).
"""

import openmoji
import published
from ml_collections import ConfigDict


def get_config(recipe: str) -> ConfigDict:
    """Returns the settings of a recipe."""
    return RECIPES[recipe]()


def _openmoji() -> ConfigDict:
    sources = dict(text_to_image_core=17.0, edit_tone=4.5, edit_gender=1.0, edit_colour=1.75, edit_recolour=1.75)
    return ConfigDict(
        dict(
            stage="stage2",
            recipe="openmoji",
            seed=0,
            total_steps=2050,
            batch_size=10,
            model=dict(
                vlm=openmoji.vlm(),
                queries=openmoji.queries(),
                connector=openmoji.connector(),
                vision_target=None,
                dit=dict(
                    width=192,
                    depth=4,
                    heads=3,
                    dual_layers=0,
                    qk_norm=True,
                    patch_size=4,
                    latent_channels=3,
                    context_width=192,
                    pooled_width=192,
                    position="sincos+rotary",
                    position_grid=8,
                    position_base=8,
                    query_gain=2.0,
                    prediction="x0",
                    visibility="block_causal",
                    clean_visual=False,
                ),
                autoencoder=dict(kind="pixel"),
                frames=None,
            ),
            init=dict(
                vlm="runs/stage1-openmoji",
                queries="runs/stage1-openmoji",
                connector="runs/stage1-openmoji",
                conditioning="random",
                dit="random",
            ),
            data=dict(
                layout="interleaved",
                sources={task: openmoji.source(task, weight) for task, weight in sources.items()},
                tokenizer=openmoji.TOKENIZER,
                image_size=openmoji.IMAGE_SIZE,
                aspect_ratios=(1.0,),
                vlm_pixels=openmoji.VLM_PIXELS,
                budgets=dict(vlm_tokens=80, vision_patches=64, context_tokens=36, latent_tokens=192, images=3),
                window=1024,
                index=openmoji.INDEX,
                features=(),
                workers=0,
                threads=2,
                bad_record_limit=0.01,
            ),
            objectives=dict(
                sigmoid_contrastive=None,
                next_token=None,
                alignment=None,
                flow_matching=dict(
                    weight=1.0,
                    timestep_floor=0.3,
                    logit_mean=1.0,
                    logit_std=1.0,
                    shift=1.0,
                    dropout=dict(
                        text=dict(start=0.2, end=0.1, steps=600),
                        visual=dict(start=0.1, end=0.1, steps=1),
                        joint=0.1,
                        images=dict(start=0.0, end=0.0, steps=1),
                    ),
                ),
            ),
            tuning=(dict(pattern="(vlm|queries|connector)/.*", frozen=True), dict(pattern=".*")),
            optimizer=openmoji.optimizer(warmup_steps=60, decay="linear", flat=0.6, ema_decay=0.996),
            sampling=dict(
                solver="euler",
                steps=5,
                text_scale=2.0,
                visual_scale=2.0,
                image_scale=1.0,
                guidance_interval=(0.0, 1.0),
                renormalisation=0.0,
                timestep_shift=3.0,
                timestep_spacing="trailing",
            ),
            checkpoint=dict(every=500, keep=2, keep_period=0, local_every=0, local=""),
            telemetry=dict(log_every=10, sample_every=2050),
            mesh=openmoji.mesh(),
            execution=openmoji.execution(),
            gauges=openmoji.gauges(0, "text_to_image", "edit_tone", "edit_colour"),
        )
    )


def _smoke() -> ConfigDict:
    """A few steps, to see that everything works."""
    config = _openmoji()
    config.update(recipe="smoke", total_steps=20, batch_size=4)
    config.telemetry.sample_every = 0
    config.init.update(dict.fromkeys(("vlm", "queries", "connector"), "runs/stage1-smoke"))
    return config


def _openmoji_long() -> ConfigDict:
    config = openmoji.lengthen(_openmoji())
    config.update(total_steps=10_000, batch_size=16)
    config.init.update(dict.fromkeys(("vlm", "queries", "connector"), "runs/stage1-openmoji_long"))
    sources = dict(text_to_image=12.0, edit_tone=4.0, edit_gender=3.0, edit_colour=2.0, compose=1.0)
    sources |= dict(
        sequence_clock=1.5, sequence_moon=0.3, sequence_tone=2.0, text_to_image_recolour=2.0, edit_recolour=2.0
    )
    config.data.sources = {task: openmoji.source(task, weight) for task, weight in sources.items()}
    config.objectives.flow_matching.dropout.text.steps = 3000
    config.optimizer.update(learning_rate=1e-3, warmup_steps=300, ema_decay=0.999)
    config.sampling.steps = 20
    config.checkpoint.every, config.telemetry.sample_every = 250, 2500
    return config


def _published(recipe: str, vlm: ConfigDict, vlm_checkpoint: str, dit: ConfigDict, checkpoint: str) -> ConfigDict:
    """Full tuning of a published diffusion transformer; a row holds an edit of 1024 pixels, or three drawings."""
    sources, stage1 = dict(text_to_image=2.0, edit=1.0, interleaved=1.0), f"runs/stage1-{recipe}"
    return ConfigDict(
        dict(
            stage="stage2",
            recipe=recipe,
            seed=0,
            total_steps=50_000,
            batch_size=256,
            model=dict(
                vlm=vlm,
                queries=dict(grid=8),
                connector=dict(kind="linear", width=published.SIGLIP_WIDTH),
                vision_target=None,
                dit=dit,
                autoencoder=published.sd3_autoencoder(),
                frames=dict(count=16),
            ),
            init=dict(
                vlm=stage1,
                queries=stage1,
                connector=stage1,
                conditioning="random",
                frames="random",
                dit=checkpoint,
                autoencoder=checkpoint,
            ),
            data=dict(
                layout="interleaved",
                sources={task: published.source(task, weight) for task, weight in sources.items()},
                tokenizer=vlm_checkpoint,
                image_size=1024,
                aspect_ratios=(1.0,),
                vlm_pixels=published.VLM_PIXELS,
                budgets=dict(
                    vlm_tokens=2048,
                    vision_patches=4 * published.VLM_PATCHES,
                    context_tokens=1024,
                    latent_tokens=3 * (1024 // 16) ** 2,
                    images=3,
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
                next_token=None,
                alignment=None,
                flow_matching=dict(
                    weight=1.0,
                    timestep_floor=0.0,
                    logit_mean=0.0,
                    logit_std=1.0,
                    shift=3.0,
                    shift_tokens=(1024 // 16) ** 2,
                    dropout=dict(
                        text=dict(start=0.5, end=0.1, steps=20_000),
                        visual=dict(start=0.1, end=0.1, steps=1),
                        joint=0.1,
                        images=dict(start=0.05, end=0.05, steps=1),
                    ),
                ),
            ),
            tuning=(
                dict(pattern="(vlm|queries|connector|autoencoder)/.*", frozen=True),
                dict(pattern="dit/.*", learning_rate=0.5),
                dict(pattern=".*"),
            ),
            optimizer=published.optimizer(ema_decay=0.9999),
            sampling=dict(
                solver="euler",
                steps=28,
                text_scale=4.5,
                visual_scale=4.5,
                image_scale=1.0,
                guidance_interval=(0.0, 1.0),
                renormalisation=0.0,
                timestep_shift=3.0,
                timestep_shift_tokens=(1024 // 16) ** 2,
                timestep_spacing="linspace",
            ),
            checkpoint=dict(every=500, keep=3, keep_period=10_000, local_every=0, local=""),
            telemetry=dict(log_every=10, sample_every=1000),
            mesh=published.mesh(),
            execution=published.execution("attention"),
            gauges=published.gauges("text_to_image", "edit"),
        )
    )


def _qwen25vl3b_sd35m() -> ConfigDict:
    dit = published.sd35_medium(), published.SD35_MEDIUM
    return _published("qwen25vl3b_sd35m", published.qwen_3b(), published.QWEN_3B, *dit)


def _qwen25vl7b_sd35l() -> ConfigDict:
    dit = published.sd35_large(), published.SD35_LARGE
    return _published("qwen25vl7b_sd35l", published.qwen_7b(), published.QWEN_7B, *dit)


RECIPES = published.on_pods(
    {
        "openmoji": _openmoji,
        "smoke": _smoke,
        "openmoji_long": _openmoji_long,
        "qwen25vl3b_sd35m": _qwen25vl3b_sd35m,
        "qwen25vl7b_sd35l": _qwen25vl7b_sd35l,
    }
)
