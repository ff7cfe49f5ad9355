"""A reward: the weighted sum of named terms of a judged trace, with weights that depend on the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import fsum
from typing import Any, Literal, Protocol, runtime_checkable

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.fast_equality import VerdictReason
from megatron_parallel_r1.rewards.format_check import Format
from megatron_parallel_r1.rewards.schedule import CONSTANT_ONE, WeightSchedule
from megatron_parallel_r1.thought.trace import Finish


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


@dataclass(frozen=True, slots=True)
class BlockText:
    """The text of a parallel block, without its tags, and the tokens of that text.

    Attributes:
        summary: None if the trace ended before it.
    """

    paths: tuple[str, ...]
    path_tokens: tuple[int, ...]
    summary: str | None = None
    summary_tokens: int = 0


@dataclass(frozen=True, slots=True)
class JudgedTrace(Judged):
    """A judged trace with its problem and its whole text: what a user's reward gets.

    Attributes:
        question: the problem, without the prompt template.
        response: the whole text, with tags, paths and summaries.
        blocks: all parallel blocks in order of appearance, nested ones after the one that they are in.
        tokens: token ids of the response.
        finish: `eos`, or `length` if a limit cut it.
        columns: the row of the data set, all its columns; empty for embedded problems.
    """

    question: str = ""
    response: str = ""
    blocks: tuple[BlockText, ...] = ()
    tokens: tuple[int, ...] = ()
    finish: Finish = "eos"
    columns: Mapping[str, Any] = field(default_factory=dict)


class NoValue(Enum):
    """Why a term has no value, beside None for no signal."""

    TIMED_OUT = "timed out"


TIMED_OUT = NoValue.TIMED_OUT
TermValue = float | None | Literal[NoValue.TIMED_OUT]


class Term(Protocol):
    """A pure function of a judged trace and the training step, without state or randomness."""

    def __call__(self, judged: Judged, step: int) -> float:
        """Returns the value of the trace at `step` (0, 1, …)."""
        ...


@runtime_checkable
class BatchTerm(Protocol):
    """A term that scores many traces at once, and may have no value for some of them."""

    def score_all(self, batch: Sequence[Judged], step: int, first: int = 0) -> list[TermValue]:
        """Returns the value of each trace at `step`; `first` is the number of the first within the step."""
        ...

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises UserError if the term needs a column that the data set lacks."""
        ...


@dataclass(frozen=True, slots=True)
class Component:
    """One term of a reward, under the name of its metric."""

    name: str
    term: Term | BatchTerm
    weight: WeightSchedule = CONSTANT_ONE

    def parts(self, batch: Sequence[Judged], step: int, first: int) -> Sequence[TermValue]:
        """Returns weight x value of each trace; a component of weight 0 is not computed."""
        weight = self.weight.at(step)
        if not weight:
            return [0.0] * len(batch)
        if not isinstance(self.term, BatchTerm):
            return [weight * self.term(judged, step) for judged in batch]
        values = self.term.score_all(batch, step, first)
        return [weight * value if isinstance(value, float) else value for value in values]


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one trace.

    Attributes:
        total: the reward; advantages are computed from it. None leaves the trace out of the loss and of its
            group: a component has no value for it.
        parts: weight x value of each component, by name; they add up to `total`.
        timeouts: components without a value because a user's function took too long.
    """

    total: float | None
    parts: Mapping[str, float | None]
    timeouts: int = 0

    @classmethod
    def of(cls, parts: Mapping[str, TermValue]) -> Score:
        """The score of a trace from the parts of its components."""
        known = [value for value in parts.values() if isinstance(value, float | int)]
        timeouts = sum(value is TIMED_OUT for value in parts.values())
        total = sum(known) if len(known) == len(parts) else None
        return cls(total, {name: None if v is TIMED_OUT else v for name, v in parts.items()}, timeouts)


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

    @property
    def user_terms(self) -> tuple[BatchTerm, ...]:
        """The terms that are functions of the user."""
        return tuple(c.term for c in self.components if isinstance(c.term, BatchTerm))

    def score_all(self, batch: Sequence[Judged], step: int, first: int = 0) -> list[Score]:
        """Returns the reward of each trace at `step` (0, 1, …), by component.

        Args:
            first: number of the batch's first trace within the step, for messages.

        Raises:
            UserError: a user's function raised, or returned no number.
        """
        columns = {component.name: component.parts(batch, step, first) for component in self.components}
        return [Score.of(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]

    def score(self, judged: Judged, step: int) -> Score:
        """Returns the reward of one trace."""
        return self.score_all([judged], step)[0]

    def __call__(self, judged: Judged, step: int) -> float | None:
        return self.score(judged, step).total

    def term(self, step: int) -> str:
        """Names the components of non-zero weight at `step`, for the metrics."""
        return "+".join(component.name for component in self.components if component.weight.at(step))


def reward_metrics(scores: Sequence[Score]) -> dict[str, float | None]:
    """Returns means over traces: `reward`, and for each component `reward_<name>`, which add up to it.

    Traces without a reward or a part count in no mean of it; a mean of none is None.
    """
    means = {"reward": _mean([score.total for score in scores])}
    for name in scores[0].parts:
        means[f"reward_{name}"] = _mean([score.parts[name] for score in scores])
    return means


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fsum(known) / len(known) if known else None
