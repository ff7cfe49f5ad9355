"""A reward of the user's own: `module:function` names a function

    def shorter(judged: Judged, step: int) -> float: ...

that is given a judged trace (`base.Judged`) and the step (0, 1, …), and returns a finite number. It must be
pure: training that resumes calls it again. The module is imported as `python -m` would, so one that lies in
the working directory is found.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from dataclasses import dataclass
from math import isfinite

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.base import Judged, Term


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
