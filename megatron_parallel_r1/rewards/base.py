"""A reward: the weighted sum of named terms of a judged trace, with weights that depend on the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Protocol

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.fast_equality import VerdictReason
from megatron_parallel_r1.rewards.format_check import Format
from megatron_parallel_r1.rewards.schedule import CONSTANT_ONE, WeightSchedule


@dataclass(frozen=True, slots=True)
class Judged:
    """A judged trace: everything that a reward may depend on.

    Attributes:
        correct: whether the final answer is right.
        format: the parallel structure.
        extracted: the final answer as written, None without one.
        reason: the step that decided `correct`; `timeout` and `crash` are worth counting.
        text: the main text, without blocks and summaries.
        references: the right answers.
        length: tokens of the trace, including forced ones.
        critical_length: tokens on the critical path: of each block only the longest path counts.
        difference: the difference between sibling paths, 0..1 (`path_diversity.py`); None where no block has
            two.
    """

    correct: bool
    format: Format
    extracted: str | None
    reason: VerdictReason
    text: str = ""
    references: tuple[str, ...] = ()
    length: int = 0
    critical_length: int = 0
    difference: float | None = None

    @property
    def well_formed(self) -> bool:
        """Whether the trace has a parallel block and passes the format check."""
        return self.format.well_formed


class Term(Protocol):
    """A pure function of a judged trace and the training step, without state or randomness."""

    def __call__(self, judged: Judged, step: int) -> float:
        """Returns the value of the trace at `step` (0, 1, …)."""
        ...


@dataclass(frozen=True, slots=True)
class Component:
    """One term of a reward, under the name of its metric."""

    name: str
    term: Term
    weight: WeightSchedule = CONSTANT_ONE


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one trace.

    Attributes:
        total: the reward; advantages are computed from it.
        parts: weight x value of each component, by name; they add up to `total`.
    """

    total: float
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reward:
    """The weighted sum of components; the weights depend on the training step.

    Raises:
        UserError: there is no component, or two have the same name.
    """

    components: tuple[Component, ...]

    def __post_init__(self) -> None:
        names = [component.name for component in self.components]
        if not names:
            raise UserError("reward: it has no components; list at least one")
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"reward: two components are called {repeated}; rename one of them")

    def score(self, judged: Judged, step: int) -> Score:
        """Returns the reward at `step` (0, 1, …), by component. Skips components of weight 0."""
        parts: dict[str, float] = {}
        for component in self.components:
            weight = component.weight.at(step)
            parts[component.name] = weight * component.term(judged, step) if weight else 0.0
        return Score(sum(parts.values()), parts)

    def __call__(self, judged: Judged, step: int) -> float:
        return self.score(judged, step).total

    def term(self, step: int) -> str:
        """Names the components of non-zero weight at `step`, for the metrics."""
        return "+".join(component.name for component in self.components if component.weight.at(step))


def reward_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """Returns means over traces: `reward`, and for each component `reward_<name>`, which add up to it."""
    means = {"reward": fsum(score.total for score in scores) / len(scores)}
    for name in scores[0].parts:
        means[f"reward_{name}"] = fsum(score.parts[name] for score in scores) / len(scores)
    return means
