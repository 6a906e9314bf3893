"""The variants, and what is compared: two plain tables. Sections and tables are those of MMCORE (arXiv:2604.19902)."""

import dataclasses
from typing import Any, Literal, NamedTuple

from mmcore_jax.config import UserError

CONTROL = "control"
LOWEST_TIMESTEP = 0.3  # `timestep_floor` of the recipes, which neither train nor draw below it
STAGES = ("stage0", "language", "stage1", "stage2", "documents", "stage2_sft")  # recipes of configs/ablation.py

Changes = dict[str, dict[str, Any]]
"""Stage -> key of its config -> value."""


class Variant(NamedTuple):
    """What a variant changes, from the first of these stages on; the stages before are the control's.

    `pathways` are those that it draws by.
    """

    changes: Changes
    pathways: Literal["both", "text", "visual"] = "both"


class Metric(NamedTuple):
    """A number that a finished run has: `gauge/...` of its last gauges, else suite/set/column/name of its evaluation.

    Of a loss by timestep the mean is meant, without the timesteps below `LOWEST_TIMESTEP`: of velocities from predicted
    images, those would be nine tenths of it. `{pathways}` and `{dropped}` are what a variant draws by and what it does
    without.
    """

    label: str
    key: str
    more_is_better: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`variant` against `against`, both at the end of `stage`.

    The first of `metrics` decides; `curve` is the gauge to plot. `paper` is what the paper says of the variant.
    """

    question: str
    variant: str
    against: str
    stage: str
    metrics: tuple[Metric, ...]
    curve: Metric
    paper: Literal["better", "worse", "not reported"]
    where: str

    @property
    def sides(self) -> tuple[str, str]:
        return self.variant, self.against

    @property
    def title(self) -> str:
        return f"{self.variant} against {self.against}"


# --- Variants ---------------------------------------------------------------------------------------------------------


def _tuning(*frozen: str) -> tuple[dict, ...]:
    return (*(dict(pattern=pattern, frozen=True) for pattern in frozen), dict(pattern=".*"))


def _connector(depth: int) -> dict:
    return dict(kind="transformer", width=128, encoder=dict(width=192, depth=depth, heads=6, mlp_width=512))


def _frozen(depth: int) -> Variant:
    """Nothing but the queries and a transformer connector trains: no next-token loss is left to take."""
    return Variant(
        {
            "stage1": {
                "model.connector": _connector(depth),
                "data.sources.caption.weight": 0.0,
                "objectives.next_token": None,
                "tuning": _tuning("(vlm|vision_target)/.*"),
            },
            "stage2": {"model.connector": _connector(depth)},
        }
    )


def _queries(grid: int) -> Variant:
    """Rows keep room for as many examples, of which each generated image takes N - 4 more tokens than the control's."""
    more = max(grid**2 - 4, 0)
    return Variant(
        {
            "stage1": {"model.queries.grid": grid, "data.budgets.vlm_tokens": 112 + 3 * more},
            "stage2": {
                "model.queries.grid": grid,
                "data.budgets.vlm_tokens": 80 + 3 * more,
                "data.budgets.context_tokens": 36 + 3 * more,
            },
        }
    )


_TARGETS = ("q", "k", "v", "out", "gate", "up", "down")
_LORA = {
    "model.vlm.lora": dict(rank=8, alpha=16.0, targets=_TARGETS),
    "tuning": (dict(pattern="vlm/.*/lora_[ab]"), *_tuning("(vlm|vision_target)/.*")),
}
_ALWAYS, _NEVER = dict(start=1.0, end=1.0, steps=1), dict(start=0.0, end=0.0, steps=1)
_DROPOUT = "objectives.flow_matching.dropout"

VARIANTS = {
    CONTROL: Variant({}),
    "frozen_2": _frozen(2),
    "frozen_3": _frozen(3),
    "frozen_6": _frozen(6),
    "lora": Variant({"stage1": _LORA}),
    "queries_1": _queries(1),
    "queries_16": _queries(4),
    "queries_64": _queries(8),
    # Where the paper began: under a frozen VLM, the flow loss alone teaches the queries and the connector of frozen_2.
    "no_alignment": Variant(
        {
            "stage2": {
                "model.connector": _connector(2),
                "init.vlm": "language",
                "init.queries": "random",
                "init.connector": "random",
                "tuning": _tuning("vlm/.*"),
            }
        }
    ),
    "queries_only": Variant({"stage2": {f"{_DROPOUT}.text": _ALWAYS}}, "visual"),
    "text_only": Variant({"stage2": {f"{_DROPOUT}.visual": _ALWAYS, f"{_DROPOUT}.text": _NEVER}}, "text"),
    "constant_dropout": Variant({"stage2": {f"{_DROPOUT}.text.start": 0.1}}),
    "history_visual": Variant({"documents": {"model.dit.visibility": "history_visual"}}),
    # The paper adds visual embeddings, and finds that harmful. Given images have no queries here: their patches get the
    # mean of what the VLM makes of them.
    "clean_visual": Variant({"stage2": {"model.dit.clean_visual": True}}),
    "full_attention": Variant({"stage2": {"model.dit.visibility": "full"}}),
    "sft": Variant(
        {
            "stage2_sft": {
                "optimizer.learning_rate": 4e-4,
                "data.sources.text_to_image_core.weight": 2.0,
                "data.sources.edit_tone.weight": 1.0,
                "data.sources.edit_colour.weight": 1.0,
            }
        }
    ),
}

# --- Metrics ----------------------------------------------------------------------------------------------------------

COSINE = Metric("cosine, held-out captions", "alignment/held_out/predicted/cosine", True)
IN_FAMILY = Metric("right of six tones, held-out edits", "alignment/edit_tone/predicted/retrieval_in_family", True)
LANGUAGE = Metric("next-token loss, held-out captions", "gauge/caption/next_token", False)
COSINE_CURVE = Metric("cosine of held-out captions", "gauge/text_to_image/cosine", True)

FLOW = Metric("flow loss, held-out tone edits", "gauge/edit_tone/flow/drop_{dropped}", False)
FLOW_SEQUENCE = Metric("flow loss, held-out sequences", "gauge/sequence_tone/flow/drop_{dropped}", False)
EDIT_ACCURACY_VISUAL = Metric("right of six tones, drawn without text", "edits/edit_tone/visual/accuracy", True)
EDIT_ERROR = Metric("error of tone edits / copying", "edits/edit_tone/{pathways}/error_ratio", False)
EDIT_ACCURACY = Metric("right of six tones, drawn", "edits/edit_tone/{pathways}/accuracy", True)
SEQUENCE_ERROR = Metric("error of sequences / copying", "edits/sequence_tone/{pathways}/error_ratio", False)
DRAWN_PIXELS = Metric("drawings, nearest of 100 in pixels", "text_to_image/trained/{pathways}/top1_pixels", True)

# --- Comparisons ------------------------------------------------------------------------------------------------------

Direction = Literal["better", "worse", "not reported"]


def _tuning_of(variant: str, against: str, where: str) -> Comparison:
    metrics = (COSINE, IN_FAMILY, LANGUAGE)
    return Comparison("tuning of the VLM", variant, against, "stage1", metrics, COSINE_CURVE, "better", where)


def _drawing(
    question: str, variant: str, against: str, paper: Direction, where: str, *metrics: Metric, stage: str = "stage2"
) -> Comparison:
    return Comparison(question, variant, against, stage, metrics, FLOW, paper, where)


# The first measure of each is one that runs of this length are not at the floor of: drawings by features are.
_DRAWN = (EDIT_ACCURACY, DRAWN_PIXELS, EDIT_ERROR, FLOW)
COMPARISONS = (
    _drawing("alignment", "frozen_2", "no_alignment", "better", "section 4.3", *_DRAWN),
    _tuning_of("frozen_3", "frozen_2", "Table 1"),
    _tuning_of("frozen_6", "frozen_2", "Table 1"),
    _tuning_of("lora", "frozen_2", "section 4.3"),
    _tuning_of(CONTROL, "lora", "section 4.3"),
    _tuning_of(CONTROL, "frozen_2", "Table 1"),
    _drawing("queries", "queries_1", CONTROL, "worse", "section 3.1", *_DRAWN),
    _drawing("queries", "queries_16", CONTROL, "better", "section 3.1", *_DRAWN),
    _drawing("queries", "queries_64", CONTROL, "better", "section 3.1", *_DRAWN),
    _drawing("pathways", "queries_only", CONTROL, "worse", "section 3.1", *_DRAWN),
    _drawing("pathways", "text_only", CONTROL, "not reported", "section 4.1", *_DRAWN),
    _drawing("text dropout", "constant_dropout", CONTROL, "not reported", "section 3.2", EDIT_ACCURACY_VISUAL, *_DRAWN),
    Comparison(
        "history",
        "history_visual",
        CONTROL,
        "documents",
        (SEQUENCE_ERROR, FLOW_SEQUENCE, EDIT_ERROR),
        FLOW_SEQUENCE,
        "worse",
        "section 3.2",
    ),
    _drawing("clean frames", "clean_visual", CONTROL, "not reported", "section 4.3", *_DRAWN),
    _drawing("attention", "full_attention", CONTROL, "not reported", "section 3.2", *_DRAWN),
    _drawing("fine-tuning", "sft", CONTROL, "better", "Table 1", DRAWN_PIXELS, EDIT_ERROR, FLOW, stage="stage2_sft"),
)


def choose(names: list[str] | None) -> list[Comparison]:
    """The comparisons among the control and the variants `names`, or all of them.

    Raises:
      UserError: for an unknown name, or one that nothing is compared with.
    """
    if names is None:
        return list(COMPARISONS)
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--variants: there is no variant {name!r}; there are {', '.join(VARIANTS)}.")
    chosen = [one for one in COMPARISONS if {*one.sides} <= {*names, CONTROL}]
    for name in names:
        if name not in {side for one in chosen for side in one.sides}:
            others = sorted({one.against for one in COMPARISONS if one.variant == name})
            raise UserError(f"--variants: {name} is compared with {' and '.join(others)} alone: name that too.")
    return chosen
