"""What pydantic has against a recipe, in one line that names the key."""

from __future__ import annotations

from pydantic import ValidationError

# Pydantic names the chosen member of a union in the path of an error; no recipe has such a key.
UNION_TAGS = (
    "sft",
    "rl",
    "dataset",
    "embedded",
    "embedded_arithmetic",
    "embedded_cold_start",
    "bpe",
    "folder",
    "constant",
    "linear",
    "window",
    "endpoint",
    "engine",
)


def first_problem(error: ValidationError, inside: str | None = None) -> str:
    """The first problem of a failed validation, in one line that names the key."""
    problems = error.errors()
    first = problems[0]
    place = (inside, *(part for part in first["loc"] if part not in UNION_TAGS))
    where = ".".join(str(part) for part in place if part is not None) or "recipe"
    known = {
        "extra_forbidden": "unknown key",
        "unexpected_keyword_argument": "unknown key",
        "missing": "missing key",
    }
    what = known.get(first["type"], first["msg"].removeprefix("Value error, "))
    given = first.get("input")
    shown = f" (given {given!r})" if isinstance(given, str | int | float | bool) else ""
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{where}: {what}{shown}{more}"
