"""The terms of a reward, and rewards by name as a recipe spells them: a preset, or a list of components.

To add a term, write a frozen dataclass whose fields are its settings, and add it to `TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from math import inf, isfinite
from types import MappingProxyType
from typing import Literal, TypeVar, get_args

from pydantic import ValidationError

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.base import Component, Judged, Reward, Term
from megatron_parallel_r1.rewards.schedule import CONSTANT_ONE, Constant, WeightSchedule, Window
from megatron_parallel_r1.rewards.user_calls import NO_LIMITS, CallLimits
from megatron_parallel_r1.rewards.user_term import load_user_term
from megatron_parallel_r1.utils.settings import first_problem

RewardSetting = bool | int | float | str
Measure = Literal["total", "critical"]
Built = TypeVar("Built")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """+1 for a right final answer, else -1: S1 of arXiv 2509.07980."""

    def __call__(self, judged: Judged, step: int) -> float:
        return 1.0 if judged.correct else -1.0


@dataclass(frozen=True, slots=True)
class WellFormedParallel:
    """1 for a right answer of a well-formed parallel trace, else 0: the paper's S2 adds a bonus for it."""

    def __call__(self, judged: Judged, step: int) -> float:
        return 1.0 if judged.correct and judged.well_formed else 0.0


@dataclass(frozen=True, slots=True)
class AccuracyTimesParallel:
    """+1 for a right answer of a well-formed parallel trace, else -1: it stabilises the format."""

    def __call__(self, judged: Judged, step: int) -> float:
        return 1.0 if judged.correct and judged.well_formed else -1.0


@dataclass(frozen=True, slots=True)
class Diversity:
    """The difference between sibling paths, 0..1 (`path_diversity.py`); 0 without two siblings.

    Attributes:
        only_right: 0 also for a wrong answer, so that noise in the paths is not rewarded.
    """

    only_right: bool = True

    def __call__(self, judged: Judged, step: int) -> float:
        if self.only_right and not judged.correct:
            return 0.0
        return judged.difference or 0.0


@dataclass(frozen=True, slots=True)
class Length:
    """A penalty on long traces: 0 up to `free` tokens, -1 from `limit` on, linear between.

    With `limit` the longest response and `free` smaller by its buffer, this is DAPO's soft over-long
    punishment (arXiv 2503.14476, equation 13).

    Attributes:
        measure: `total` counts all tokens, `critical` of each block only the longest path.
    """

    free: int = 0
    limit: int = 3000
    measure: str = "total"

    def __post_init__(self) -> None:
        if not 0 <= self.free < self.limit:
            raise ValueError(f"free {self.free} and limit {self.limit}; set 0 <= free < limit")
        if self.measure not in get_args(Measure):
            raise ValueError(f"measure {self.measure!r}; use one of {', '.join(get_args(Measure))}")

    def __call__(self, judged: Judged, step: int) -> float:
        tokens = judged.critical_length if self.measure == "critical" else judged.length
        return -min(max((tokens - self.free) / (self.limit - self.free), 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class PGrpo:
    """1 for a right answer plus `factor` x min(acceleration, `cap`), else 0: ThreadWeaver (arXiv 2512.07843).

    The acceleration is the share of tokens off the critical path, 1 - critical / total. Defaults are those of
    the published configuration. P-GRPO pairs it with `objective.advantage: dr_grpo`, since a division by the
    standard deviation would let the acceleration decide wherever all answers of a group are right.
    """

    factor: float = 0.5
    cap: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.factor < inf or not 0 <= self.cap <= 1:
            raise ValueError(f"factor {self.factor} and cap {self.cap}; set factor >= 0 and 0 <= cap <= 1")

    def __call__(self, judged: Judged, step: int) -> float:
        if not judged.correct:
            return 0.0
        acceleration = 1.0 - judged.critical_length / judged.length if judged.length else 0.0
        return 1.0 + self.factor * min(acceleration, self.cap)


def score_accuracy(judged: Judged) -> float:
    """1 for a right final answer, else 0: the score of every evaluation, whatever the training reward."""
    return float(judged.correct)


TERMS: Mapping[str, Callable[..., Term]] = MappingProxyType(
    {
        "accuracy": Accuracy,
        "parallel": WellFormedParallel,
        "accuracy_x_parallel": AccuracyTimesParallel,
        "diversity": Diversity,
        "length": Length,
        "p_grpo": PGrpo,
    }
)
"""Name to frozen dataclass; its fields are the settings of the term."""


@dataclass(frozen=True, slots=True)
class ParallelBonus:
    """+1 for a right answer, 1 + `bonus` if its trace is parallel and well formed; else -1."""

    bonus: float = 0.2

    def reward(self) -> Reward:
        return _accuracy_with_bonus(Constant(value=self.bonus))


@dataclass(frozen=True, slots=True)
class S2:
    """The paper's S2: accuracy, plus a bonus for parallel thinking in the last steps of every window.

    Settings and defaults are those of `schedule.Window`.
    """

    window: int = 10
    share: float = 0.2
    bonus: float = 0.2

    def reward(self) -> Reward:
        return _accuracy_with_bonus(Window(window=self.window, share=self.share, bonus=self.bonus))


PRESETS: Mapping[str, Callable[..., ParallelBonus | S2]] = MappingProxyType(
    {"parallel_bonus": ParallelBonus, "s2": S2}
)
"""Names for a list of components."""

REWARDS = (*TERMS, "s1", *PRESETS)
"""Every name that a recipe accepts as its reward."""


def make_reward(
    name: str, settings: Mapping[str, RewardSetting] | None = None, limits: CallLimits = NO_LIMITS
) -> Reward:
    """Builds the reward `name` with the given settings and the paper's defaults for the others.

    Args:
        name: one of `REWARDS`, or `module:function` (`load_user_term`).
        limits: of the calls of a user's function.

    Raises:
        UserError: the name or a setting is unknown, or a value has the wrong type or range.
    """
    if name not in PRESETS:
        return Reward((make_component("accuracy" if name == "s1" else name, settings, limits=limits),))
    preset = _build(name, PRESETS[name], settings)
    try:
        return preset.reward()
    except ValidationError as error:
        raise UserError(f"reward {name}: {first_problem(error, Window)}") from None


def make_component(
    term: str,
    settings: Mapping[str, RewardSetting] | None = None,
    weight: WeightSchedule = CONSTANT_ONE,
    name: str | None = None,
    limits: CallLimits = NO_LIMITS,
) -> Component:
    """Builds one component of a reward.

    Args:
        term: one of `TERMS`, or `module:function`, which takes no settings.
        name: the name of its metric; None: that of the term or function.
        limits: of the calls of a user's function.

    Raises:
        UserError: the term or a setting is unknown, or a value has the wrong type or range.
    """
    if ":" in term:
        if settings:
            raise UserError(f"reward {term}: a function takes no settings; write them in its module")
        return Component(name or term.partition(":")[2], load_user_term(term, limits), weight)
    if term not in TERMS:
        raise UserError(f"reward {term!r}: unknown, use one of {', '.join(REWARDS)}, or module:function")
    return Component(name or term, _build(term, TERMS[term], settings), weight)


def _accuracy_with_bonus(weight: WeightSchedule) -> Reward:
    bonus = Component("parallel_bonus", WellFormedParallel(), weight)
    return Reward((Component("accuracy", Accuracy()), bonus))


def _build(name: str, kind: Callable[..., Built], settings: Mapping[str, RewardSetting] | None) -> Built:
    build = kind  # `is_dataclass` narrows the type of `kind`
    assert is_dataclass(kind), name
    types = {field.name: type(field.default) for field in fields(kind)}
    values = dict(settings or {})
    for key, value in list(values.items()):
        if key not in types:
            raise UserError(f"reward {name}: no setting {key!r}, it has {', '.join(types) or 'none'}")
        if isinstance(value, str) and types[key] is float:
            with suppress(ValueError):  # YAML reads 1e-1, without a point, as text
                value = values[key] = float(value)
        accepted = (int, float) if types[key] is float else (types[key],)
        if not isinstance(value, accepted) or (isinstance(value, bool) and types[key] is not bool):
            raise UserError(f"reward {name}: {key} is {value!r}, it must be of type {types[key].__name__}")
        if not isinstance(value, str) and not isfinite(value):
            raise UserError(f"reward {name}: {key} is {value}, it must be finite")
    try:
        return build(**values)
    except ValueError as error:
        raise UserError(f"reward {name}: {error}") from None
