"""Functions of the user, which a recipe names as `module:function`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from megatron_parallel_r1.errors import UserError

LONGEST = 100  # characters of a value or an error in a message


def load_function(name: str, what: str) -> Callable[..., Any]:
    """Imports `module:function`; the working directory is on the path.

    Args:
        what: the recipe key or the thing that the function is, for messages.

    Raises:
        UserError: the name is malformed, or the module cannot be imported or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"{what} {name}: write module:function")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may call sys.exit too
        why = f"{type(error).__name__}: {_short(str(error))}"
        raise UserError(
            f"{what} {name}: cannot import {module_name} ({why}); fix it, or set PYTHONPATH to its folder"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "no function" if function is not None else "nothing"
        raise UserError(f"{what} {name}: {module_name} has {found} called {function_name}; define it there")
    return function


def accepts(function: Callable[..., Any], count: int) -> bool:
    """Returns whether a function can be called with `count` positional arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a function in C without a signature
        return True
    return True


def load_with_parameters(name: str, what: str, parameters: str) -> Callable[..., Any]:
    """Imports `module:function` and checks its number of parameters.

    Args:
        parameters: their names, such as `judged, step`.

    Raises:
        UserError: as `load_function`, or it takes another number of positional arguments.
    """
    function = load_function(name, what)
    if not accepts(function, len(parameters.split(", "))):
        raise UserError(f"{what} {name}: it cannot be called as {name.partition(':')[2]}({parameters})")
    return function


def in_one_line(value: object) -> str:
    """Returns a value, or an error with the place where it was raised, as one short line."""
    kind = type(value).__name__
    try:
        if not isinstance(value, BaseException):
            return _short(repr(value))
        text = f"{kind}: {_short(str(value))}"
    except (Exception, SystemExit):  # of the user's own class
        text = f"a {kind}"
    frames = traceback.extract_tb(value.__traceback__) if isinstance(value, BaseException) else []
    return f"{text}, {os.path.basename(frames[-1].filename)} line {frames[-1].lineno}" if frames else text


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
