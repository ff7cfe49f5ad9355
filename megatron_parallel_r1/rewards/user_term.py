"""A reward of the user: `module:function`, of one trace or of a batch, plain or `async`.

    def tidy(judged: JudgedTrace, step: int) -> float | None
    def tidy(completions: list[str], answer: list[str], **kwargs) -> list[float | None]

The second form is TRL's. It is recognised by a parameter called `completions` or `prompts`, or by `**kwargs`
alone, and gets by keyword what its signature names: `BATCH_NAMES`, `step`, and the columns of the data set.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.base import TIMED_OUT, Judged, JudgedTrace, TermValue
from megatron_parallel_r1.rewards.user_calls import (
    NO_LIMITS,
    Blocked,
    CallLimits,
    Failed,
    TimedOut,
    UserCalls,
)
from megatron_parallel_r1.utils.user_function import accepts, in_one_line, load_function

# Lists that a batched function gets by name.
BATCH_NAMES: Mapping[str, Callable[[JudgedTrace], Any]] = {
    "prompts": lambda judged: judged.question,
    "completions": lambda judged: judged.response,
    "completion_ids": lambda judged: list(judged.tokens),
    "references": lambda judged: judged.references,
    "judged": lambda judged: judged,
}


@dataclass(frozen=True, slots=True)
class BatchNames:
    """The keywords that a batched function takes.

    Attributes:
        known: all that its signature names; `required` of them have no default.
        takes_all: it has `**kwargs`.
    """

    known: frozenset[str]
    required: frozenset[str]
    takes_all: bool


@dataclass(frozen=True, slots=True)
class UserTerm:
    """A user's function as a term of a reward.

    Attributes:
        name: its `module:function`.
        names: the keywords of a batched function; None for a function of (judged, step).
    """

    name: str
    calls: UserCalls
    names: BatchNames | None

    def score_all(self, batch: Sequence[Judged], step: int, first: int = 0) -> list[TermValue]:
        """Returns the value of each trace: a number, None for no signal, or TIMED_OUT.

        Raises:
            UserError: the function raised, or returned anything else.
        """
        if not batch:
            return []
        function = self.calls.function
        if self.names is None:
            outcomes = self._outcomes([partial(function, judged, step) for judged in batch], step, first)
            return [self._value(outcome, step, first + index) for index, outcome in enumerate(outcomes)]
        last = first + len(batch) - 1
        (outcome,) = self._outcomes([partial(function, **self._arguments(batch, step))], step, first, last)
        if isinstance(outcome, TimedOut):
            return [TIMED_OUT] * len(batch)
        values = None
        if hasattr(outcome, "__len__") and not isinstance(outcome, Mapping):
            with contextlib.suppress(Exception):  # a tensor without dimensions, for one
                values = list(outcome)
        if values is None or len(values) != len(batch):
            count = "no list" if values is None else f"{len(values)} values"
            what = f"it returned {count} for {len(batch)} traces ({in_one_line(outcome)})"
            raise self._error(step, first, f"{what}; return a list with one number for each", last)
        return [self._value(value, step, first + index) for index, value in enumerate(values)]

    def check_columns(self, columns: Iterable[str]) -> None:
        """Checks that the keywords of a batched function exist.

        Raises:
            UserError: one has no default and is no column of the data set.
        """
        known = [*BATCH_NAMES, "step", *columns]
        missing = sorted(self.names.required - {*known}) if self.names is not None else ()
        if missing:
            raise UserError(
                f"reward {self.name}: there is no {missing[0]}; take some of {', '.join(known)}, or give it "
                "a default"
            )

    def _arguments(self, batch: Sequence[Any], step: int) -> dict[str, Any]:
        assert self.names is not None, "a function of one trace is called by position"
        columns = dict.fromkeys(name for judged in batch for name in judged.columns)
        everything = {
            **{name: [judged.columns.get(name) for judged in batch] for name in columns},
            **{name: [read(judged) for judged in batch] for name, read in BATCH_NAMES.items()},
            "step": step,
        }
        names = self.names
        return {name: value for name, value in everything.items() if names.takes_all or name in names.known}

    def _outcomes(
        self, calls: Sequence[Callable[[], Any]], step: int, first: int, last: int | None = None
    ) -> list[Any]:
        try:
            outcomes = self.calls.outcomes(calls)
        except Blocked:
            what = "its async function blocks the others; await what takes time in it"
            raise self._error(step, first, what, last or first + len(calls) - 1) from None
        for trace, outcome in enumerate(outcomes, first):
            if isinstance(outcome, Failed):
                error = outcome.error
                what = str(error) if isinstance(error, UserError) else in_one_line(error)
                raise self._error(step, trace, what, last) from error
        return outcomes

    def _value(self, value: Any, step: int, trace: int) -> TermValue:
        if value is None:
            return None
        if isinstance(value, TimedOut):
            return TIMED_OUT
        try:
            # Scalars of numpy and torch have __float__ too, a str does not.
            number = float(value) if hasattr(value, "__float__") else None
        except Exception:  # several elements, for one
            number = None
        if number is None or not isfinite(number):
            what = f"it returned {in_one_line(value)}; return a finite number, or None for no signal"
            raise self._error(step, trace, what)
        return number

    def _error(self, step: int, trace: int, what: str, last: int | None = None) -> UserError:
        traces = f"trace {trace}" if last in (None, trace) else f"traces {trace} to {last}"
        return UserError(f"reward {self.name}, step {step + 1}, {traces}: {what}")


def load_user_term(name: str, limits: CallLimits = NO_LIMITS) -> UserTerm:
    """Imports `module:function`.

    Raises:
        UserError: the name is malformed, cannot be imported, or has neither form of this module.
    """
    function = load_function(name, "reward")
    calls = UserCalls(function, limits)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # a function in C without a signature
        parameters = []
    kinds = [parameter.kind for parameter in parameters]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds
    batched = any(parameter.name in ("completions", "prompts") for parameter in named)
    if not batched and not (takes_all and len(kinds) == 1):
        if accepts(function, 2):
            return UserTerm(name, calls, None)
        short = name.partition(":")[2]
        raise UserError(
            f"reward {name}: it cannot be called as {short}(judged, step); give it two parameters, or those "
            "of TRL, completions and **kwargs"
        )
    required = frozenset(parameter.name for parameter in named if parameter.default is parameter.empty)
    return UserTerm(name, calls, BatchNames(frozenset(p.name for p in named), required, takes_all))
