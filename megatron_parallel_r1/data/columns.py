"""Columns of a data set of the user's own: read from a command line, or found by their usual names."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from megatron_parallel_r1.data.cells import Cells, UnusableRow
from megatron_parallel_r1.data.opening import open_local
from megatron_parallel_r1.errors import UserError

PROMPTS = ("question", "problem", "prompt", "instruction", "query", "input", "messages")
ANSWERS = (
    *("answer", "reward_model.ground_truth", "ground_truth", "final_answer", "expected_answer"),
    *("solution", "target", "label", "output"),
)
RESPONSES = ("response", "trace", "completion", "messages", "output")
ROWS = 200


def read_columns(words: str | None) -> dict[str, str]:
    """Reads `prompt=NAME,answer=NAME`.

    Raises:
        UserError: a role is unknown or missing.
    """
    if words is None:
        return {}
    columns = dict(word.partition("=")[::2] for word in words.split(","))
    if set(columns) != {"prompt", "answer"} or not all(columns.values()):
        raise UserError(f"--columns {words}: give prompt=NAME,answer=NAME")
    return columns


def find_columns(path: Path, examples: bool, split: str | None = None) -> dict[str, str]:
    """Finds the columns of prompt and answer, of `examples` also of the response, in the first rows.

    Args:
        path: a file or folder of rows.
        split: of a folder.

    Raises:
        UserError: no row can be read, or no column has a usual name.
    """
    _, tables = open_local(path, split, usual_split="train", usual_config=None)
    rows = [cells for _, cells in islice(tables[0].rows(), ROWS) if not isinstance(cells, UnusableRow)]
    if not rows:
        raise UserError(f"{path}: no row can be read")
    roles = [("prompt", PROMPTS), ("answer", ANSWERS), *([("response", RESPONSES)] if examples else [])]
    found: dict[str, str] = {}
    for role, names in roles:
        match = next((name for name in names if _has(rows[0], name) and name not in found.values()), None)
        if match is None:
            raise UserError(
                f"{path}: no column looks like the {role} ({', '.join(rows[0])}); name them, "
                f"such as --columns {','.join(f'{each}=COLUMN' for each, _ in roles)}"
            )
        found[role] = match
    return found


def _has(row: Cells, path: str) -> bool:
    first, _, rest = path.partition(".")
    inside = row.get(first)
    return inside is not None and (not rest or (isinstance(inside, dict) and _has(inside, rest)))
