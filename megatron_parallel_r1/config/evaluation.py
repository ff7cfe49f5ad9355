"""Evaluations of a recipe: of finished stages, and of a stage while it trains."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from megatron_parallel_r1.config.data import ProblemSource
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.modes import EvaluationMode
from megatron_parallel_r1.utils.settings import Count, Settings, Steps

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
# The figures of an evaluation during a stage that `keep_best` and `early_stopping` can watch.
WATCHABLE_FIGURES = ("accuracy", "parallel_ratio", "length", "critical_length", "truncated", "unanswered")


class Evaluation(Settings):
    """Accuracy on problems that no stage trains on."""

    data: ProblemSource
    """Problems to evaluate on."""
    problems: Count = 512
    """Number of problems."""
    samples_per_problem: Count = 1
    """Traces sampled for each problem."""
    max_concurrent_rollouts: Count = 512
    """Most traces in flight."""


class EvaluationSet(Evaluation):
    """Problems that a stage is evaluated on while it trains; no stage may train on one of them."""

    modes: Annotated[tuple[str, ...], Field(min_length=1)] = ("parallel",)
    """Modes: `parallel` (the stage's own decoding), `sequential`, `majority@k` (docs/evaluation.md)."""
    thinking: dict[str, Any] = Field(default_factory=dict)
    """Keys of `thinking` with other values in this set, such as `temperature`."""

    @model_validator(mode="after")
    def _check_modes(self) -> EvaluationSet:
        if len(set(self.modes)) < len(self.modes):
            raise ValueError("a mode stands twice in `modes`")
        if fixed := sorted({"mode", "format"} & self.thinking.keys()):
            raise ValueError(f"thinking.{fixed[0]} is the stage's in every set; choose `modes` instead")
        for name in self.modes:
            try:
                votes = EvaluationMode.of(name).votes
            except UserError as error:
                raise ValueError(str(error)) from None
            if self.samples_per_problem % votes:
                raise ValueError(
                    f"mode {name} needs a samples_per_problem that is a multiple of {votes}, "
                    f"it is {self.samples_per_problem}"
                )
        return self


class StageEvaluation(Settings):
    """Evaluation of a stage while it trains; results are in its `evaluations.jsonl`."""

    every: Steps = 50
    """Steps between two evaluations; the last step is always evaluated."""
    first: bool = True
    """Evaluate also before the first step."""
    sets: Annotated[dict[Name, EvaluationSet], Field(min_length=1)]
    """Sets of problems, by the name that their results have."""

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether the weights after `step` are evaluated; `is_last`: the stage ends with it."""
        return step % self.every == 0 or is_last if step else self.first

    def watchable(self) -> tuple[str, ...]:
        """The metrics that `keep_best` and `early_stopping` can watch, `evaluation/SET/MODE/FIGURE`."""
        return tuple(
            f"evaluation/{name}/{mode}/{figure}"
            for name, settings in self.sets.items()
            for mode in settings.modes
            for figure in WATCHABLE_FIGURES
        )
