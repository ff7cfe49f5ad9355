"""The panels of the report.

A colour is a role, not a value: the page gives each role a light and a dark colour (Okabe and Ito's
colour-blind-safe palette), and the SVG only names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["first", "second"]


@dataclass(frozen=True, slots=True)
class Line:
    """A metric as a curve; steps within one pixel are reduced to their mean or maximum."""

    key: str
    label: str
    role: Role = "first"
    reduce: Literal["mean", "max"] = "mean"


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart.

    Attributes:
        title: one or two words.
        hint: meaning of the number.
        kind: of its stages, "sft" or "rl".
        unit: label of the y axis.
        scale: "share" is fixed to 0..100 %.
        eval_key: metric of the evaluation records to draw beside the curve.
    """

    title: str
    hint: str
    kind: Literal["sft", "rl"]
    lines: tuple[Line, ...]
    unit: str
    scale: Literal["share", "linear", "log"] = "linear"
    eval_key: str | None = None


PANELS = (
    Panel(
        "Loss of SFT",
        "cross-entropy on the tokens that carry loss",
        "sft",
        (Line("loss", "loss"),),
        "nats per token",
    ),
    Panel("Reward", "mean over the sampled traces", "rl", (Line("reward", "reward"),), "reward"),
    Panel(
        "Accuracy",
        "right final answers among the traces sampled for training",
        "rl",
        (Line("accuracy", "training"),),
        "share right",
        "share",
        "accuracy",
    ),
    Panel(
        "Parallel ratio",
        "traces with at least one parallel block",
        "rl",
        (Line("parallel_ratio", "training"),),
        "share of traces",
        "share",
        "parallel_ratio",
    ),
    Panel(
        "Well-formed",
        "blocks with two closed paths or more and a closed summary",
        "rl",
        (Line("well_formed", "training"),),
        "share of blocks",
        "share",
        "well_formed_blocks",
    ),
    Panel(
        "Place of the first block",
        "where in the trace parallel thinking starts: 0 is its beginning, 1 its end",
        "rl",
        (Line("first_block", "first block"),),
        "relative place",
    ),
    Panel(
        "Mismatch",
        "difference between a token's log-probability at rollout and as the trainer recomputes it",
        "rl",
        (
            Line("mismatch_max", "largest", "first", "max"),
            Line("mismatch_mean", "mean", "second"),
        ),
        "|Δ log p|",
        "log",
    ),
    Panel("Entropy", "of the policy, mean over its tokens", "rl", (Line("entropy", "entropy"),), "nats"),
    Panel(
        "Length",
        "all tokens of a response, and those on its critical path",
        "rl",
        (
            Line("length", "response"),
            Line("critical_length", "critical path", "second"),
        ),
        "tokens",
    ),
)
