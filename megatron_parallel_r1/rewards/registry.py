"""Rewards by name, as a recipe asks for them: a name of its own, or a list of components."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite
from types import MappingProxyType
from typing import TypeVar

from pydantic import ValidationError

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.base import Component, Judged, Reward, Term
from megatron_parallel_r1.rewards.schedule import ONE, Constant, Weight, Window
from megatron_parallel_r1.rewards.terms import Accuracy, AccuracyTimesParallel, Diversity, Length, Parallel
from megatron_parallel_r1.utils.settings import first_problem

Setting = bool | int | float | str
Made = TypeVar("Made")

TERMS: Mapping[str, Callable[..., Term]] = MappingProxyType(
    {
        "accuracy": Accuracy,
        "parallel": Parallel,
        "accuracy_x_parallel": AccuracyTimesParallel,
        "diversity": Diversity,
        "length": Length,
    }
)
"""Name to frozen dataclass; its fields are the settings that the name takes."""


@dataclass(frozen=True, slots=True)
class ParallelBonus:
    """For a right answer +1, of a well-formed parallel trace 1 + `bonus`; else -1."""

    bonus: float = 0.2

    def reward(self) -> Reward:
        return _accuracy_with_bonus(Constant(value=self.bonus))


@dataclass(frozen=True, slots=True)
class S2:
    """The paper's S2: accuracy, and a bonus for parallel thinking in the last steps of every window.

    Settings and defaults are those of `weights.Window`.
    """

    window: int = 10
    share: float = 0.2
    bonus: float = 0.2

    def reward(self) -> Reward:
        return _accuracy_with_bonus(Window(window=self.window, share=self.share, bonus=self.bonus))


PRESETS: Mapping[str, type[ParallelBonus] | type[S2]] = MappingProxyType(
    {"parallel_bonus": ParallelBonus, "s2": S2}
)
"""Names for a list of components."""

REWARDS = (*TERMS, "s1", *PRESETS)
"""Every name that a recipe can give as its reward."""


def make_reward(name: str, settings: Mapping[str, Setting] | None = None) -> Reward:
    """The reward called `name` with the given settings, the paper's defaults for the rest.

    A name of `REWARDS`, or `module:function` (`user.py`).

    Raises:
        UserError: no such name or setting, or a value of the wrong type or range.
    """
    if name not in PRESETS:
        return Reward((make_component("accuracy" if name == "s1" else name, settings),))
    preset = _build(name, PRESETS[name], settings)
    try:
        return preset.reward()
    except ValidationError as error:
        raise UserError(f"reward {name}: {first_problem(error, Window)}") from None


def make_component(
    term: str,
    settings: Mapping[str, Setting] | None = None,
    weight: Weight = ONE,
    name: str | None = None,
) -> Component:
    """One component of a reward.

    Args:
        term: a name of `TERMS`, or `module:function`, which takes no settings.
        name: of its metric; None: the term's, or the function's.

    Raises:
        UserError: no such term or setting, or a value of the wrong type or range.
    """
    if ":" in term:
        if settings:
            raise UserError(f"reward {term}: a function takes no settings; write them in its module")
        return Component(name or term.partition(":")[2], load_user_term(term), weight)
    if term not in TERMS:
        raise UserError(f"reward {term!r}: unknown, use one of {', '.join(REWARDS)}, or module:function")
    return Component(name or term, _build(term, TERMS[term], settings), weight)


def _accuracy_with_bonus(weight: Weight) -> Reward:
    return Reward((Component("accuracy", Accuracy()), Component("parallel_bonus", Parallel(), weight)))


def _build(name: str, kind: Callable[..., Made], settings: Mapping[str, Setting] | None) -> Made:
    assert is_dataclass(kind), name
    known = {field.name: type(field.default) for field in fields(kind)}
    values = dict(settings or {})
    for key, value in values.items():
        if key not in known:
            raise UserError(f"reward {name}: no setting {key!r}, it has {', '.join(known) or 'none'}")
        accepted = (int, float) if known[key] is float else (known[key],)
        if not isinstance(value, accepted) or (isinstance(value, bool) and known[key] is not bool):
            raise UserError(f"reward {name}: {key} is {value!r}, it must be of type {known[key].__name__}")
        if not isinstance(value, str) and not isfinite(value):
            raise UserError(f"reward {name}: {key} is {value}, it must be finite")
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"reward {name}: {error}") from None


@dataclass(frozen=True, slots=True)
class UserTerm:
    """The function called `where`, its result checked."""

    where: str
    function: Term

    def __call__(self, judged: Judged, step: int) -> float:
        """Raises UserError where the function returns no finite number; its own errors pass."""
        value = self.function(judged, step)
        # A number of numpy or torch has __float__ too, a text has none.
        if not hasattr(value, "__float__") or not isfinite(number := float(value)):
            raise UserError(f"reward {self.where}: it returned {value!r}; return a finite number")
        return number


def load_user_term(where: str) -> UserTerm:
    """Imports `module:function`.

    Raises:
        UserError: it is not spelled so, cannot be imported, or is no function of (judged, step).
    """
    module_name, _, function_name = where.partition(":")
    if not module_name or not function_name:
        raise UserError(f"reward {where}: write module:function")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"reward {where}: cannot import {module_name} ({what}); mend it, or set PYTHONPATH to its folder"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "no function" if function is not None else "nothing"
        raise UserError(f"reward {where}: {module_name} has {what} called {function_name}; define it there")
    try:
        inspect.signature(function).bind(None, 0)
    except TypeError:
        raise UserError(
            f"reward {where}: it cannot be called as {function_name}(judged, step); give it two parameters"
        ) from None
    return UserTerm(where, function)
