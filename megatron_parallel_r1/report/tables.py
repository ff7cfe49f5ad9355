"""The evaluation table: for a terminal, and as Markdown for a model card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from megatron_parallel_r1.report.formats import NONE, accuracy, count, fixed, percent

Record = dict[str, Any]


def _well_formed(record: Record) -> float | None:
    """Without any block there is no share of them to give."""
    return None if record.get("blocks_per_trace") == 0 else record.get("well_formed_blocks")


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, what it means, and how to read its cell off an evaluation record."""

    title: str
    hint: str
    cell: Callable[[Record], str]
    is_text: bool = False


COLUMNS = (
    Column("stage", "evaluated after this stage", lambda r: str(r["stage"]), is_text=True),
    Column("step", "of that stage", lambda r: f"{r['step']:,}"),
    Column("mode", "how the traces were sampled", lambda r: str(r.get("mode") or NONE), is_text=True),
    Column(
        "accuracy",
        "share of held-out problems with the right final answer, ± half its 95 % interval",
        lambda r: accuracy(r.get("accuracy"), r.get("ci95")),
    ),
    Column(
        "parallel ratio",
        "share of the traces with a parallel block",
        lambda r: percent(r.get("parallel_ratio")),
    ),
    Column(
        "well-formed",
        "share of the blocks with two closed paths or more and a closed summary",
        lambda r: percent(_well_formed(r)),
    ),
    Column("blocks / trace", "mean number of blocks", lambda r: fixed(r.get("blocks_per_trace"), 2)),
    Column("length", "mean tokens of a response", lambda r: fixed(r.get("length"), 1)),
    Column(
        "critical path",
        "mean tokens on the longest chain of a response: what one waits for",
        lambda r: fixed(r.get("critical_length"), 1),
    ),
    Column(
        "problems",
        "how many were asked",
        lambda r: NONE if r.get("problems") is None else count(r["problems"]),
    ),
)


def latest_evals(records: Sequence[Record]) -> list[Record]:
    """One record for each (stage, step, mode): the last written, at the place of the first."""
    return list({(r["stage"], r["step"], r.get("mode")): r for r in records}.values())


def eval_table(records: Sequence[Record], title: str = "Evaluation on held-out problems") -> Table:
    """A table for a terminal."""
    table = Table(title=title, title_style="bold", title_justify="left")
    for column in COLUMNS:
        table.add_column(column.title, justify="left" if column.is_text else "right")
    for record in latest_evals(records):
        table.add_row(*(Text(column.cell(record)) for column in COLUMNS))
    return table


def eval_markdown(records: Sequence[Record]) -> str:
    """A Markdown table with its heading; ends without a newline."""
    rows = [[column.title for column in COLUMNS]]
    rows.append(["---" if column.is_text else "---:" for column in COLUMNS])
    rows += [[_plain(c.cell(record)) for c in COLUMNS] for record in latest_evals(records)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
