"""What a reward is given, and what it is: named terms, each with its weight over the steps, and their sum.

A new kind of term is a frozen dataclass whose fields are its settings, and one line in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Protocol

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.fast_equality import Reason
from megatron_parallel_r1.rewards.formats import Format
from megatron_parallel_r1.rewards.schedule import ONE, Weight


@dataclass(frozen=True, slots=True)
class Judged:
    """All that a reward may depend on in one trace.

    Attributes:
        correct: its final answer is a right one.
        format: facts of its parallel structure.
        extracted: the final answer as written, None where it gives none.
        reason: which step decided `correct`; `timeout` and `crash` are worth counting.
        text: the main text, without blocks and summaries.
        references: the right answers.
        length: tokens of the trace, forced ones included.
        critical_length: of these, those on the critical path: of each block only the longest path counts.
        difference: how much sibling paths differ, 0..1 (`siblings.py`); None where no block has two.
    """

    correct: bool
    format: Format
    extracted: str | None
    reason: Reason
    text: str = ""
    references: tuple[str, ...] = ()
    length: int = 0
    critical_length: int = 0
    difference: float | None = None

    @property
    def well_formed(self) -> bool:
        """It thinks in parallel, and passes the format check."""
        return self.format.well_formed


class Term(Protocol):
    """A pure function of a judged trace and the training step: no state, no randomness."""

    def __call__(self, judged: Judged, step: int) -> float:
        """The trace's value at `step` (0, 1, …), which for all traces of a step is the same function."""
        ...


@dataclass(frozen=True, slots=True)
class Component:
    """One term of a reward, under the name that its metric bears."""

    name: str
    term: Term
    weight: Weight = ONE


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one trace.

    Attributes:
        total: what the advantages are computed from.
        parts: of each component, by name, weight x value; they add up to `total`.
    """

    total: float
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reward:
    """The weighted sum of its components; the weights follow the training step.

    Raises:
        UserError: no component, or two of the same name.
    """

    components: tuple[Component, ...]

    def __post_init__(self) -> None:
        names = [component.name for component in self.components]
        if not names:
            raise UserError("reward: it has no components; list one at least")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"reward: two components are called {twice}; give one another name")

    def score(self, judged: Judged, step: int) -> Score:
        """The trace's reward at `step` (0, 1, …), by component. A component of weight 0 is not computed."""
        parts = {}
        for component in self.components:
            weight = component.weight.at(step)
            parts[component.name] = weight * component.term(judged, step) if weight else 0.0
        return Score(sum(parts.values()), parts)

    def __call__(self, judged: Judged, step: int) -> float:
        return self.score(judged, step).total

    def term(self, step: int) -> str:
        """What is rewarded at `step`, for the metrics: the components of weight other than 0."""
        return "+".join(component.name for component in self.components if component.weight.at(step))


def reward_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """Means over traces: `reward`, and of each component `reward_<name>`, which add up to it."""
    means = {"reward": fsum(score.total for score in scores) / len(scores)}
    for name in scores[0].parts:
        means[f"reward_{name}"] = fsum(score.parts[name] for score in scores) / len(scores)
    return means
