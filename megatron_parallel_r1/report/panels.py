"""The charts of a report: which metrics each one shows, in what unit, in what order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["sft", "distill", "rl", "evaluation"]


@dataclass(frozen=True, slots=True)
class Line:
    """A metric as a curve; steps within one pixel are reduced to their mean or maximum.

    Attributes:
        per: metric of the same step that the value is divided by.
        smooth: whether a moving average is drawn over a long curve.
    """

    key: str
    label: str
    reduce: Literal["mean", "max"] = "mean"
    per: str | None = None
    smooth: bool = True


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart.

    Attributes:
        title: one to four words, unique on the page.
        hint: meaning of the number.
        kind: of its stages; "evaluation": evaluations inside stages, a line for each set and mode.
        unit: of the y axis.
        scale: "share" is fixed to 0..100 %.
        eval_key: metric of the evaluation records to draw beside the curve.
        prefix: also a line for each metric with this prefix.
    """

    title: str
    hint: str
    kind: Kind
    lines: tuple[Line, ...]
    unit: str
    scale: Literal["share", "linear", "log"] = "linear"
    eval_key: str | None = None
    prefix: str | None = None

    def with_prefixed(self, keys: frozenset[str]) -> Panel:
        """The panel with a line for each of `keys` that has its prefix."""
        if self.prefix is None:
            return self
        found = sorted(key for key in keys if key.startswith(self.prefix))
        more = tuple(Line(key, key.removeprefix(self.prefix).replace("_", " ")) for key in found)
        return replace(self, lines=self.lines + more)


@dataclass(frozen=True, slots=True)
class Group:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


def _learning_rate(title: str, kind: Kind) -> Panel:
    lines = (Line("lr", "learning rate", smooth=False),)
    return Panel(title, "of the step, after warm-up and decay", kind, lines, "per step")


GROUPS = (
    Group(
        "Evaluations in stages",
        (
            Panel(
                "Accuracy of evaluations",
                "on each evaluation set; the band is the 95 % interval",
                "evaluation",
                (Line("accuracy", "accuracy"),),
                "share right",
                "share",
                "accuracy",
            ),
            Panel(
                "Critical path of evaluations",
                "tokens on the longest chain of a response",
                "evaluation",
                (Line("critical_length", "critical path"),),
                "tokens",
            ),
        ),
    ),
    Group(
        "Supervised stages",
        (
            Panel(
                "Loss of SFT",
                "cross-entropy on the tokens that carry loss",
                "sft",
                (
                    Line("loss", "all targets"),
                    Line("tag_loss", "tags"),
                    Line("held_out_loss", "held out", smooth=False),
                ),
                "nats per token",
            ),
            Panel(
                "Gradient norm of SFT",
                "before clipping",
                "sft",
                (Line("grad_norm", "gradient norm"),),
                "norm",
            ),
            _learning_rate("Learning rate of SFT", "sft"),
            Panel(
                "Speed of SFT",
                "tokens of the batch over the seconds of the step",
                "sft",
                (Line("tokens", "training", per="time_s"),),
                "tokens/s",
            ),
        ),
    ),
    Group(
        "Distillation of own traces",
        (
            Panel(
                "Yield",
                "traces that pass the checks, and those with a right answer or a block",
                "distill",
                (Line("kept", "kept"), Line("accuracy", "right"), Line("parallel_ratio", "with a block")),
                "share of traces",
                "share",
            ),
            Panel(
                "Length of own traces",
                "all tokens of a response, and those on its critical path",
                "distill",
                (Line("length", "response"), Line("critical_length", "critical path")),
                "tokens",
            ),
        ),
    ),
    Group(
        "RL: results",
        (
            Panel("Reward", "mean over the sampled traces", "rl", (Line("reward", "reward"),), "reward"),
            Panel(
                "Reward components",
                "means over the sampled traces, which add up to the reward",
                "rl",
                (),
                "reward",
                prefix="reward_",
            ),
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
                "Accuracy by source",
                "the same by the problems' source",
                "rl",
                (),
                "share right",
                "share",
                prefix="accuracy/",
            ),
            Panel(
                "Groups",
                "with a right trace, and with all traces right, which teach nothing",
                "rl",
                (Line("group_pass", "some right"), Line("group_solved", "all right")),
                "share of groups",
                "share",
            ),
            Panel(
                "Unfinished",
                "traces that reached their token limit, and those without a final answer",
                "rl",
                (Line("truncated", "truncated"), Line("unanswered", "unanswered")),
                "share of traces",
                "share",
            ),
        ),
    ),
    Group(
        "RL: parallel thinking",
        (
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
                "Blocks and paths",
                "blocks of a trace, and paths of a block",
                "rl",
                (Line("blocks_per_trace", "blocks"), Line("paths_per_block", "paths")),
                "mean number",
            ),
            Panel(
                "Length",
                "all tokens of a response, and those on its critical path",
                "rl",
                (Line("length", "response"), Line("critical_length", "critical path")),
                "tokens",
            ),
        ),
    ),
    Group(
        "RL: learning",
        (
            Panel(
                "Loss of RL",
                "of the surrogate; near 0 at a group's first update, and no measure of progress",
                "rl",
                (Line("loss", "loss"),),
                "per token",
            ),
            Panel("Gradient norm", "before clipping", "rl", (Line("grad_norm", "gradient norm"),), "norm"),
            _learning_rate("Learning rate", "rl"),
            Panel(
                "Clip share",
                "tokens whose gradient the clipping removes",
                "rl",
                (
                    Line("clip_fraction", "all"),
                    Line("clip_low", "at the lower bound"),
                    Line("clip_high", "at the upper bound"),
                ),
                "of the tokens",
            ),
            Panel(
                "KL",
                "of the policy from that of the step's start, and from the reference policy",
                "rl",
                (
                    Line("kl_old", "from the step's start"),
                    Line("kl", "from the reference"),
                    Line("penalty_kl", "penalty in rewards"),
                ),
                "nats per token",
            ),
            Panel(
                "Entropy",
                "of the policy, mean over its tokens",
                "rl",
                (Line("entropy", "entropy"),),
                "nats",
            ),
            Panel(
                "Mismatch",
                "difference between a token's log-probability at rollout and as the trainer recomputes it",
                "rl",
                (Line("mismatch_max", "largest", "max"), Line("mismatch_mean", "mean")),
                "|Δ log p|",
                "log",
            ),
        ),
    ),
    Group(
        "RL: speed",
        (
            Panel(
                "Seconds by phase",
                "of a step; phases of a second thread overlap with those of the first",
                "rl",
                (
                    Line("time_draw_s", "sampling"),
                    Line("time_verify_s", "verification"),
                    Line("time_score_s", "rewards"),
                    Line("time_logprobs_s", "log-probs"),
                    Line("time_update_s", "updates"),
                    Line("time_sync_s", "weight sync"),
                    Line("time_wait_s", "waiting"),
                ),
                "seconds",
            ),
            Panel(
                "Tokens per second",
                "sampled over the seconds of the rollout, trained over those of the training",
                "rl",
                (
                    Line("tokens", "rollout", per="time_rollout_s"),
                    Line("tokens_trained", "training", per="time_train_s"),
                ),
                "tokens/s",
            ),
            Panel(
                "Staleness",
                "updates between the weights that sampled a trace and those that learn from it",
                "rl",
                (Line("staleness", "mean"), Line("staleness_max", "largest", "max")),
                "updates",
            ),
        ),
    ),
)
