"""Rewards by name, as a recipe asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.base import Reward
from megatron_parallel_r1.rewards.schedule import S2
from megatron_parallel_r1.rewards.terms import Accuracy, AccuracyTimesParallel, ParallelBonus

Setting = bool | int | float | str

REWARDS: Mapping[str, Callable[..., Reward]] = MappingProxyType(
    {
        "accuracy": Accuracy,
        "s1": Accuracy,
        "s2": S2,
        "parallel_bonus": ParallelBonus,
        "accuracy_x_parallel": AccuracyTimesParallel,
    }
)
"""Name to frozen dataclass; its fields are the settings that the name takes."""


def make_reward(name: str, settings: Mapping[str, Setting] | None = None) -> Reward:
    """The reward called `name` with the given settings, the paper's defaults for the rest.

    Raises:
        UserError: no such name or setting, or a value of the wrong type or range.
    """
    if name not in REWARDS:
        raise UserError(f"reward {name!r}: unknown, use one of {', '.join(REWARDS)}")
    kind = REWARDS[name]
    assert is_dataclass(kind), name
    known = {field.name: type(field.default) for field in fields(kind)}
    values = dict(settings or {})
    for key, value in values.items():
        if key not in known:
            raise UserError(f"reward {name}: no setting {key!r}, it has {', '.join(known) or 'none'}")
        accepted = (int, float) if known[key] is float else (known[key],)
        if not isinstance(value, accepted) or (isinstance(value, bool) and known[key] is not bool):
            raise UserError(f"reward {name}: {key} is {value!r}, it must be of type {known[key].__name__}")
    return kind(**values)
