"""Every setting, as frozen dataclasses, and the strict way into them.

A config file holds `RECIPES`, by name, and `get_config(recipe)`, which returns an `ml_collections.ConfigDict`. `load`
runs it, applies overrides such as `--config.optimizer.learning_rate=1e-4`, and converts the result into a `Config`: an
unknown, missing or mistyped key stops with its path, the file and the nearest valid name. After that no code reads a
ConfigDict.
"""

import argparse
import ast
import dataclasses
import difflib
import errno
import functools
import json
import math
import pathlib
import runpy
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import ml_collections

DEFAULT_RECIPE = "openmoji"

# --- Errors -----------------------------------------------------------------------------------------------------------


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a quota, a file


class UserError(ValueError):
    """A mistake that we foresaw. Its message is one sentence: what is wrong, where, and what to do."""

    exit_code = 2


class TryAgain(UserError):
    """Nobody's mistake, which the same command may not meet again: what launches it does so once more."""

    exit_code = 75  # EX_TEMPFAIL


def door(main: Callable[[Sequence[str]], int | None]) -> Callable[[], None]:
    """Turns `main(argv)` into a console entry: a `UserError`, or a full disk, becomes one sentence and an exit code."""

    @functools.wraps(main)
    def enter() -> None:
        try:
            sys.exit(main(sys.argv[1:]) or 0)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except OSError as error:
            if error.errno not in FULL:
                raise
            what = error.filename or "a file"
            print(
                f"error: cannot write {what}: {error.strerror}; make room, and run the command again.", file=sys.stderr
            )
            sys.exit(2)

    return enter


# --- Bounds -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The least and most value of a setting of the type `Annotated[..., Bounds(least, most)]`."""

    least: float
    most: float = math.inf


Count = Annotated[int, Bounds(1)]
Index = Annotated[int, Bounds(0)]
NotNegative = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
AspectRatio = Annotated[float, Bounds(0.05, 20)]


# --- The parts --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tower:
    """A plain transformer stack."""

    width: int
    depth: int
    heads: int
    mlp_width: int


@dataclasses.dataclass(frozen=True)
class QwenVision(Tower):
    """Vision tower of Qwen2.5-VL. `window_size` is in pixels; `full_attention_blocks` ignore the windows."""

    patch_size: int
    merge_size: int
    window_size: int
    full_attention_blocks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (arXiv:2106.09685): each of `targets` adds `alpha / rank` times a product of two matrices.

    They are the parameters `lora_a` and `lora_b` beside a kernel; `config.tuning` says whether that trains too.
    """

    rank: int
    alpha: float
    targets: tuple[Literal["q", "k", "v", "out", "gate", "up", "down"], ...]

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.targets:
            raise UserError(
                f"LoRA of rank {self.rank} on {len(self.targets)} targets changes nothing: give it a rank of at least "
                "1 and a target, or set config.model.vlm.lora to None."
            )


@dataclasses.dataclass(frozen=True)
class QwenVL(Tower):
    """Qwen2.5-VL. `mrope_section` counts rotary frequencies for (time, row, column) and sums to half a head.

    `lora` is of the decoder's layers; published checkpoints have none.
    """

    vocab_size: int
    kv_heads: int
    mrope_section: tuple[int, int, int]
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    vision: QwenVision
    lora: Lora | None = dataclasses.field(default=None, metadata={"of_weights": False})


@dataclasses.dataclass(frozen=True)
class SiglipText(Tower):
    """Text tower of SigLIP."""

    vocab_size: int
    max_length: int


@dataclasses.dataclass(frozen=True)
class SiglipVision(Tower):
    """Vision tower of SigLIP. `image_size // patch_size` is the side of its table of positions.

    `naflex`: published as SigLIP2 NaFlex, which reads images of any grid of patches.
    """

    image_size: int
    patch_size: int
    naflex: bool = False


@dataclasses.dataclass(frozen=True)
class Siglip:
    """SigLIP. `text` is None where only the vision tower is used, as an alignment target.

    The sigmoid loss begins with `initial_scale` times the cosine plus `initial_bias`. The published -10 is for batches
    of 32,768 (arXiv:2303.15343, section 3.2); minus the logarithm of the batch size says that nothing is known.
    """

    vision: SiglipVision
    text: SiglipText | None = None
    layer_norm_eps: float = 1e-6
    initial_scale: float = dataclasses.field(default=10.0, metadata={"of_weights": False})
    initial_bias: float = dataclasses.field(default=-10.0, metadata={"of_weights": False})


@dataclasses.dataclass(frozen=True)
class Queries:
    """`grid * grid` learnable query tokens for each generated image."""

    grid: int


@dataclasses.dataclass(frozen=True)
class LinearConnector:
    """From the VLM's hidden states at the queries to visual embeddings, `width` being the vision target's."""

    kind: Literal["linear"]
    width: int


@dataclasses.dataclass(frozen=True)
class TransformerConnector:
    """The same behind a transformer encoder over the queries of each image, which may be as wide as the VLM or not."""

    kind: Literal["transformer"]
    width: int
    encoder: Tower

    def __post_init__(self) -> None:
        heads, width = self.encoder.heads, self.encoder.width
        if heads < 1 or width % (4 * heads):
            raise UserError(
                f"config.model.connector.encoder.width {width} must be a multiple of 4 times its {heads} heads, for "
                "rotary positions of rows and columns."
            )
        if self.encoder.depth < 1:
            raise UserError(
                f"config.model.connector.encoder.depth is {self.encoder.depth}: give it at least 1 block, or take "
                "config.model.connector of the kind 'linear'."
            )


@dataclasses.dataclass(frozen=True)
class MMDiT:
    """The SD3 family. `position` is SD3's additive "sincos" table, "rotary" over (row, column), or both.

    The first `dual_layers` blocks also attend among the latents alone (SD3.5-medium). `qk_norm` puts an RMSNorm on
    queries and keys, whose initial scale of the queries is `query_gain`. `pooled_width` 0 means no pooled conditioning.
    The table has `position_grid` patches a side. From the `position_origin` "corner" they are numbered from 0 in steps
    of `position_base / position_grid`, as diffusers begins; from the "centre", as published files are, 0 to 16 over the
    middle `position_base` patches.
    `visibility` is the attention rule between the images of a document (`nn/masks.py`). `clean_visual` adds to the
    clean copy of an image what it looks like to the VLM, its mean hidden state over it. `query_positions` adds a
    learned embedding, zero at first, to each visual embedding by its place among the queries: attention sees a set
    otherwise, where positions are not "rotary".
    """

    width: int
    depth: int
    heads: int
    dual_layers: int
    qk_norm: bool
    patch_size: int
    latent_channels: int
    context_width: int
    pooled_width: int
    position: Literal["sincos", "rotary", "sincos+rotary"]
    position_grid: int
    position_base: int
    query_gain: float
    prediction: Literal["velocity", "x0"]
    position_origin: Literal["corner", "centre"] = "corner"
    visibility: Literal["block_causal", "history_visual", "full"] = dataclasses.field(
        default="block_causal", metadata={"of_weights": False}
    )
    clean_visual: bool = dataclasses.field(default=False, metadata={"of_weights": False})
    query_positions: bool = dataclasses.field(default=False, metadata={"of_weights": False})


@dataclasses.dataclass(frozen=True)
class Frames:
    """Learned embeddings of the second image of a document and of those that follow, of `count` images at most."""

    count: Count


@dataclasses.dataclass(frozen=True)
class Pixels:
    """No autoencoder: images are diffused as they are, scaled to [-1, 1]."""

    kind: Literal["pixel"]
    latent_channels: ClassVar[int] = 3
    downsampling: ClassVar[int] = 1


@dataclasses.dataclass(frozen=True)
class AutoencoderKL:
    """The variational autoencoder of Stable Diffusion and FLUX; each of `block_channels` has half the side of the last.

    The diffusion transformer sees (latents - `shift_factor`) * `scaling_factor`. Images with a side of more than `tile`
    latents are encoded and decoded in tiles, of which neighbours share a quarter; 0 never tiles.
    """

    kind: Literal["kl"]
    block_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_groups: int
    quant_convs: bool
    mid_attention: bool
    scaling_factor: float
    shift_factor: float
    tile: int = dataclasses.field(metadata={"of_weights": False})

    @property
    def downsampling(self) -> int:
        """Pixels along a side of a latent."""
        return 2 ** (len(self.block_channels) - 1)


@dataclasses.dataclass(frozen=True)
class Model:
    """The parts of a stage; None where the stage does not use one."""

    vlm: QwenVL | None
    queries: Queries | None
    connector: LinearConnector | TransformerConnector | None
    vision_target: Siglip | None
    dit: MMDiT | None
    autoencoder: Pixels | AutoencoderKL | None
    frames: Frames | None = None


# --- Objectives -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A value that goes linearly from `start` to `end` over `steps` steps, then stays."""

    start: float
    end: float
    steps: int


@dataclasses.dataclass(frozen=True)
class SigmoidContrastive:
    """SigLIP's pairwise sigmoid loss."""

    weight: float


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross entropy on assistant text; `user_text` adds the user's, for a VLM that has seen no text before."""

    weight: float
    user_text: bool


@dataclasses.dataclass(frozen=True)
class Alignment:
    """1 - cosine to the vision target, centred by its dataset mean unless `center` is off (the paper's plain form)."""

    weight: float
    center: bool


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Rates at which a generated frame loses its text, its visual embeddings, or (`joint`) both.

    `images`: the rate, independent of those, at which it loses all its condition images.
    """

    text: Ramp
    visual: Ramp
    joint: float
    images: Ramp = Ramp(0.0, 0.0, 1)


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """Flow matching with logit-normal timesteps, shifted towards noise by `shift`.

    With `shift_tokens`, `shift` is that of an image of so many latent tokens, and goes with the root of their number
    (SD3, arXiv:2403.03206, section 5.3.2); 0 gives all images the same.
    Below `timestep_floor` the squared error of the velocity counts (t / floor)^2 only: a network that predicts x_0 has
    one that grows as 1 / t^2. 0 is the plain loss.
    """

    weight: float
    timestep_floor: float
    logit_mean: float
    logit_std: float
    shift: float
    dropout: Dropout
    shift_tokens: Index = 0


@dataclasses.dataclass(frozen=True)
class Objectives:
    """The weighted losses of a stage; None where unused."""

    sigmoid_contrastive: SigmoidContrastive | None
    next_token: NextToken | None
    alignment: Alignment | None
    flow_matching: FlowMatching | None


# --- Data -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Column:
    """Which column of a record becomes the next segment of the example; a list in it becomes several.

    `column` is a column or key, dotted where nested: of a tar the extension of a member, or a key inside a JSON member
    ("json.caption"); of several, "jpg;jpeg;png", the first that the record has. `speaker` is of text, `generate` of
    images.
    """

    type: Literal["text", "image"]
    column: str
    speaker: Literal["user", "assistant"] = "user"
    generate: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """What all sources have: their share of the examples.

    `schedule`: (step, weight) where the weight changes. `required`: every batch is to hold an example of it.
    `too_long`: what happens to an example that no row has room for; its texts can be cut, or its images seen smaller.
    """

    weight: float
    schedule: tuple[tuple[int, float], ...] = ()
    required: bool = False
    too_long: Literal["drop", "truncate", "downscale"] = "drop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shards(_Source):
    """Shards: paths, globs and ranges such as {00000..00999}, several of them separated by commas or in a tuple."""

    shards: str | tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mapped(_Source):
    """Records whose columns become `segments` in that order; None where each record already is an example.

    `task` is of the records that do not name theirs.
    """

    task: str | None = None
    segments: tuple[Column, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecord(_Shards):
    """Native shards."""

    kind: Literal["array_record"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebDataset(_Shards, _Mapped):
    """Tar files in which the members KEY.* are one record."""

    kind: Literal["webdataset"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parquet(_Shards, _Mapped):
    """Parquet files; images are bytes, or structs of bytes and path as Hugging Face writes them."""

    kind: Literal["parquet"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines(_Shards, _Mapped):
    """Files of one JSON object a line, which names images by their path in the folder `images`."""

    kind: Literal["json_lines"]
    images: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds(_Mapped):
    """A prepared TensorFlow dataset in its ArrayRecord format; `data_dir` None is where that library keeps them."""

    kind: Literal["tfds"]
    name: str
    split: str
    data_dir: str | None = None


Source = ArrayRecord | WebDataset | Parquet | JsonLines | Tfds


@dataclasses.dataclass(frozen=True)
class Budgets:
    """What one row holds at most. 0 where a stage has no such tokens."""

    vlm_tokens: int
    vision_patches: int
    context_tokens: int
    latent_tokens: int
    images: int


@dataclasses.dataclass(frozen=True)
class Data:
    """`window` examples at a time are drawn from the mixture and packed into rows.

    An example that generates images is cropped to the nearest of `aspect_ratios`, width / height; (1.0,) is squares
    only. What the diffusion transformer draws has the area of a square of side `image_size`, at most; `vlm_pixels`
    bounds that of the images that the VLM sees; None where a stage has no such part. The vision target sees images of
    its own size.

    What the sources hold is kept in `index`, and beside it `features`, which frozen parts make once and for all:
    "latents" of the autoencoder, "targets" of the vision target, "conditioning" of the VLM and what follows it. Batches
    are prepared ahead by `workers` processes of `threads` threads each, or, where that is 0, in this process.
    """

    layout: Literal["pairs", "interleaved"]
    sources: dict[str, Source]
    tokenizer: str
    image_size: int | None
    aspect_ratios: tuple[AspectRatio, ...]
    vlm_pixels: tuple[int, int] | None
    budgets: Budgets
    window: int
    index: str
    features: tuple[Literal["latents", "targets", "conditioning"], ...]
    workers: int
    threads: int
    bad_record_limit: float


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tuning:
    """One line of the ordered table that says what trains: the first pattern that matches a parameter's path wins.

    `learning_rate` scales the optimizer's; `weight_decay` None means the optimizer's.
    """

    pattern: str
    frozen: bool = False
    learning_rate: float = 1.0
    weight_decay: float | None = None


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW: `warmup_steps` up, flat until `flat` of the run, then down to `final` of `learning_rate` by `decay`.

    The gradient of all that trains is clipped to `clip_norm`; 0 never clips.
    """

    learning_rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: NotNegative
    warmup_steps: int
    decay: Literal["constant", "linear", "cosine"]
    flat: float
    final: float
    ema_decay: float
    accumulation: int


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Saved every `every` steps; the last `keep` stay, and each at a multiple of `keep_period` (0: none).

    Those saved every `local_every` steps (0: none) go into the directory `local`, on a disk of each host; two stay.
    """

    every: Count
    keep: Count
    keep_period: Index
    local_every: Index = 0
    local: str = ""

    def __post_init__(self) -> None:
        if self.local_every and not self.local:
            raise UserError(
                f"config.checkpoint.local_every is {self.local_every}, but config.checkpoint.local names no directory: "
                "give it one on a disk of each host."
            )


@dataclasses.dataclass(frozen=True)
class BadSteps:
    """Which steps change nothing, and when the run goes back: see `training/bad_steps.py`.

    Bad is what is not finite and, once `warmup` steps were good, a loss or gradient norm of which the logarithm is more
    than `deviations` standard deviations above its mean, both over about `window` steps. After `in_a_row` bad steps the
    run goes back to its last checkpoint, up to `rollbacks` times to the same one.
    """

    window: Count = 128
    warmup: Count = 64
    deviations: NotNegative = 6.0
    in_a_row: Count = 10
    rollbacks: Index = 3


@dataclasses.dataclass(frozen=True)
class Watchdog:
    """A run that hangs ends: after `minutes` without a step (0: never), or, in anything else, after `patience` minutes.

    Anything else is compiling, measuring, drawing or saving.
    """

    minutes: NotNegative = 10.0
    patience: NotNegative = 60.0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pictures are made: `steps` of the solver, whose timesteps `timestep_shift` moves towards noise.

    `timestep_shift_tokens` is to it what `FlowMatching.shift_tokens` is to the shift of training.
    "euler" and "dpm_solver_2m" (DPM-Solver++) evaluate the network once a step, "heun" twice but in the last.

    Before the shift, "trailing" timesteps are `steps` equal intervals from 1 to 0; "linspace" ones are equally spaced
    from 1 to the last timestep of SD3's discrete schedule, and 0 comes after them.

    Guidance is by text, visual embeddings and condition images, at timesteps within `guidance_interval`; a scale of 1
    is none. `renormalisation` takes the norm of what is guided back to that of what is not: 0 leaves it, 1 does all of
    it.
    """

    solver: Literal["euler", "heun", "dpm_solver_2m"]
    steps: int
    text_scale: float
    visual_scale: float
    guidance_interval: tuple[Share, Share]
    renormalisation: Share
    timestep_shift: float
    timestep_spacing: Literal["trailing", "linspace"]
    image_scale: float = 1.0
    timestep_shift_tokens: Index = 0


@dataclasses.dataclass(frozen=True)
class Telemetry:
    """Intervals in steps; `sample_every` 0 means no pictures during training."""

    log_every: Count
    sample_every: int


@dataclasses.dataclass(frozen=True)
class Gauges:
    """Measures on held-out `sources`, before the first step, every `every` steps (0: never) and after the last.

    Of each source one example is taken from each of `examples` equal parts; its weight counts for nothing.
    """

    every: Index
    examples: Count
    sources: dict[str, Source]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one of them may be -1: the rest."""

    data: int
    fsdp: int
    context: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the program runs.

    Matrix products run in `compute_dtype`, frozen parameters are kept in `frozen_dtype`; `scan_layers` compiles one
    layer and loops over it, `remat` names what the backward pass recomputes ("attention": all but what `flash` gave;
    "qkv": nor what it took; "dots": all but what `flash` and matrix products gave). Compiled programs are kept for the
    next start in the directory `compilation_cache`, in the workdir unless it is absolute.
    """

    compute_dtype: Literal["float32", "bfloat16"]
    frozen_dtype: Literal["float32", "bfloat16"]
    attention: Literal["dense", "blockwise", "flash"]
    scan_layers: bool
    remat: Literal["none", "dots", "qkv", "attention", "full"]
    compilation_cache: str | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """A run.

    `init` maps each part to "random", the workdir of the stage that made it, WORKDIR@STEP, or a published checkpoint.
    """

    stage: str
    recipe: str
    seed: int
    total_steps: int
    batch_size: int
    model: Model
    init: dict[str, str]
    data: Data
    objectives: Objectives
    tuning: tuple[Tuning, ...]
    optimizer: Optimizer
    sampling: Sampling | None
    checkpoint: Checkpoint
    telemetry: Telemetry
    mesh: Mesh
    execution: Execution
    gauges: Gauges | None = None
    bad_steps: BadSteps = BadSteps()
    watchdog: Watchdog = Watchdog()

    def to_json(self) -> str:
        """Returns the config as indented JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


# --- The way in -------------------------------------------------------------------------------------------------------


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Reads `FILE.py` or `FILE.py:RECIPE` and applies overrides of the form `--config.a.b=value`.

    Raises:
      UserError: naming the key's path, the file and the nearest valid name.
    """
    file, _, recipe = spec.partition(":")
    if not pathlib.Path(file).is_file():
        raise UserError(f"config file {file} does not exist (looked in {pathlib.Path.cwd()}).")
    settings = _run(file, recipe or DEFAULT_RECIPE)
    _fill(settings, Config, "config", file)
    for override in overrides:
        _apply_override(settings, override, file)
    return _convert(Config, settings.to_dict(), "config", file)


def split_step(source: str | pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """Of `WORKDIR@STEP`, which names a checkpoint of a run, both; else the path, and None."""
    directory, _, step = str(pathlib.Path(source)).rpartition("@")
    if directory and step.isdecimal() and not pathlib.Path(source).exists():
        return pathlib.Path(directory), int(step)
    return pathlib.Path(source), None


def from_json(path: str | pathlib.Path) -> Config:
    """Reads the `config.json` that a run has written."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: {path.parent} is not the workdir of a run.")
    return _convert(Config, json.loads(path.read_text()), "config", str(path))


def from_dict(expected: Any, value: Any, path: str, file: str | pathlib.Path) -> Any:
    """Converts plain settings, which `file` keeps under `path`, into the type `expected`."""
    return _convert(expected, value, path, str(file))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` to a door; the overrides are what `parse_known_args` leaves over."""
    parser.add_argument("--config", required=True, metavar="FILE[:RECIPE]", help="for example configs/stage2.py")


def _run(file: str, recipe: str) -> ml_collections.ConfigDict:
    """Executes a config file, which may import its neighbours, and returns the settings of a recipe."""
    sys.path.insert(0, str(pathlib.Path(file).parent.absolute()))
    try:
        module = runpy.run_path(file)
    except ModuleNotFoundError as error:
        raise UserError(f"{file} imports {error.name}, which is neither installed nor beside it.") from error
    finally:
        sys.path.pop(0)
    if not {"RECIPES", "get_config"} <= module.keys():
        raise UserError(f"{file} is no config: it needs RECIPES, by name, and get_config(recipe).")
    recipes = module["RECIPES"]
    if recipe not in recipes:
        raise UserError(f"{file} has no recipe {recipe!r}{_nearest(recipe, recipes)}; it has {', '.join(recipes)}.")
    return module["get_config"](recipe)


def _fill(settings: Any, expected: Any, path: str, file: str) -> None:
    """Writes the defaults that a recipe leaves out of the parts that it has, so that overrides find them."""
    if not isinstance(settings, ml_collections.ConfigDict):
        return
    if typing.get_origin(expected) in (types.UnionType, typing.Union):
        expected = _member(typing.get_args(expected), settings.to_dict(), path, file)
    if typing.get_origin(expected) is dict:
        for name in settings:
            _fill(settings[name], typing.get_args(expected)[1], f"{path}.{name}", file)
    if not dataclasses.is_dataclass(expected):
        return
    for field in dataclasses.fields(expected):
        if field.name not in settings and field.default is not dataclasses.MISSING:
            default = field.default
            is_nested = dataclasses.is_dataclass(default)
            settings[field.name] = ml_collections.ConfigDict(dataclasses.asdict(default)) if is_nested else default
        elif field.name in settings:
            _fill(settings[field.name], field.type, f"{path}.{field.name}", file)


def _apply_override(settings: ml_collections.ConfigDict, override: str, file: str) -> None:
    path, equals, text = override.removeprefix("--").partition("=")
    if not override.startswith("--config.") or not equals:
        raise UserError(f"cannot read the argument {override!r}: overrides are written --config.KEY=VALUE.")
    *parents, leaf = path.split(".")[1:]
    node = settings
    for index, name in enumerate([*parents, leaf]):
        if not isinstance(node, ml_collections.ConfigDict) or name not in node:
            known = list(node) if isinstance(node, ml_collections.ConfigDict) else []
            where = ".".join(["config", *parents[:index]])
            raise UserError(f"unknown key {where}.{name} in an override of {file}{_nearest(name, known)}.")
        parent, node = node, node[name]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    with parent.ignore_type():
        parent[leaf] = value


def _convert(expected: Any, value: Any, path: str, file: str) -> Any:
    """Returns `value` as the type `expected`, checking every key on the way."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        return _convert_dataclass(expected, value, path, file)
    if origin is Annotated:
        kind, bounds = arguments
        return _within(bounds, _convert(kind, value, path, file), path, file)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(_member(arguments, value, path, file), value, path, file)
    if origin is Literal:
        if value not in arguments:
            known, nearest = ", ".join(map(repr, arguments)), _nearest(str(value), map(str, arguments))
            raise UserError(f"{path} in {file} is {value!r}, expected one of {known}{nearest}.")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise UserError(f"{path} in {file} has {len(value)} values, expected {len(kinds)}.")
        return tuple(_convert(kind, item, f"{path}[{i}]", file) for i, (kind, item) in enumerate(zip(kinds, value)))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{path}.{key}", file) for key, item in value.items()}
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not (origin or expected):
        name = getattr(origin or expected, "__name__", expected)
        raise UserError(f"{path} in {file} is {value!r} of type {type(value).__name__}, expected {name}.")
    return value


def _within(bounds: Bounds, value: Any, path: str, file: str) -> Any:
    if not bounds.least <= value <= bounds.most:
        expected = f"at least {bounds.least}" if bounds.most == math.inf else f"{bounds.least} to {bounds.most}"
        raise UserError(f"{path} in {file} is {value!r}, expected {expected}.")
    return value


def _member(members: tuple, value: Any, path: str, file: str) -> Any:
    """The member of a union that a value is converted to: of several dataclasses, the one of its `kind`."""
    members = tuple(member for member in members if member is not types.NoneType)
    if len(members) == 1:
        return members[0]
    if isinstance(value, (list, tuple)):
        return next((member for member in members if typing.get_origin(member) is tuple), members[0])
    if not isinstance(value, dict):
        return members[0]
    kinds = {typing.get_args(typing.get_type_hints(member)["kind"])[0]: member for member in members}
    return kinds[_convert(Literal[tuple(kinds)], value.get("kind"), f"{path}.kind", file)]


def _convert_dataclass(expected: Any, value: Any, path: str, file: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{path} in {file} is {value!r}, expected the settings of {expected.__name__}.")
    fields = {field.name: field for field in dataclasses.fields(expected)}
    hints = typing.get_type_hints(expected, include_extras=True)
    for key in value:
        if key not in fields:
            raise UserError(f"unknown key {path}.{key} in {file}{_nearest(key, fields)}.")
    for name, field in fields.items():
        if name not in value and field.default is dataclasses.MISSING:
            raise UserError(f"missing key {path}.{name} in {file}.")
    return expected(**{key: _convert(hints[key], item, f"{path}.{key}", file) for key, item in value.items()})


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f", did you mean {matches[0]!r}" if matches else ""
