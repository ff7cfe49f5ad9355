"""Tables of figures, each defined once and written as Markdown, HTML and for a terminal."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from rich.table import Table as RichTable
from rich.text import Text

from megatron_parallel_r1.evaluation.pairs import Pair
from megatron_parallel_r1.evaluation.statistics import RESAMPLES, Interval
from megatron_parallel_r1.evaluation.summary import Share, Summary
from megatron_parallel_r1.report.formats import NONE, fixed, percent

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """A heading, what it means, and how its cell is read off a row."""

    title: str
    hint: str
    cell: Callable[[Row], str]
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, what to know, and cells as text."""

    title: str
    lead: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Heading, lead and table; ends without a newline."""
        lines = [
            [column.title for column in self.columns],
            ["---" if column.is_text else "---:" for column in self.columns],
            *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in self.rows),
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{self.lead}\n\n{table}"

    def terminal(self) -> RichTable:
        """For a console."""
        table = RichTable(title=self.title, title_style="bold", title_justify="left")
        for column in self.columns:
            table.add_column(column.title, justify="left" if column.is_text else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table


def tables_of(summaries: Sequence[Summary], pairs: Sequence[Pair] = ()) -> list[Table]:
    """Accuracy, the shape of the thinking, and the paired tests if there are pairs."""
    tables = [_table(*ACCURACY, summaries), _table(*THINKING, summaries)]
    return [*tables, _table(*PAIRED, pairs)] if pairs else tables


def markdown_page(tables: Sequence[Table]) -> str:
    """All tables under one heading."""
    return "\n\n".join(["# Evaluation", *(table.markdown() for table in tables)]) + "\n"


def html_page(tables: Sequence[Table], plot_svg: str | None = None) -> str:
    """One file that needs no network; it looks like a run's report, whose style sheet it shares."""
    own, report = (
        PackageLoader(f"megatron_parallel_r1.{room}", "templates") for room in ("evaluation", "report")
    )
    environment = Environment(
        loader=ChoiceLoader([own, report]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plot = base64.b64encode(plot_svg.encode()).decode() if plot_svg else None
    return environment.get_template("evaluation.html.j2").render(tables=tables, plot=plot)


def _table(title: str, lead: str, columns: tuple[Column, ...], rows: Sequence[object]) -> Table:
    return Table(title, lead, columns, tuple(tuple(column.cell(row) for column in columns) for row in rows))


def interval(found: Interval, signed: bool = False) -> str:
    """In percent: `61.3 [58.9, 63.6]`; signed for differences."""
    sign = "+" if signed else ""
    return f"{100 * found.value:{sign}.1f} [{100 * found.low:{sign}.1f}, {100 * found.high:{sign}.1f}]"


def _of(share: Share) -> str:
    return NONE if share.value is None else f"{100 * share.value:.1f} % of {share.of:,}"


def _passes(summary: Summary) -> str:
    """From k = 2 on; pass@1 is mean@n."""
    return ", ".join(f"@{k} {100 * found.value:.1f}" for k, found in summary.passes.items() if k > 1) or NONE


def _majority(summary: Summary) -> str:
    return f"@{summary.votes} {interval(summary.majority)}" if summary.votes > 1 else NONE


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


_WHO: tuple[Column[Summary], ...] = (
    Column("checkpoint", "", lambda s: s.checkpoint, is_text=True),
    Column("benchmark", "", lambda s: s.benchmark, is_text=True),
    Column("mode", "", lambda s: s.mode, is_text=True),
)
ACCURACY = (
    "Accuracy",
    f"In percent, with 95 % intervals by bootstrap over problems ({RESAMPLES:,} resamples). maj@k: the share "
    "of votes of k samples that elect a right answer.",
    (
        *_WHO,
        Column("problems × n", "n samples of each", lambda s: f"{s.problems:,} × {s.samples}"),
        Column("mean@n", "share of right responses", lambda s: interval(s.mean)),
        Column("pass@k", "unbiased, for k up to n", _passes),
        Column("maj@k", "share of right votes; a tie goes to the first answer", _majority),
        Column("no answer", "responses without a final answer", lambda s: percent(s.unanswered)),
        Column("cut", "responses that a limit ended", lambda s: percent(s.truncated)),
    ),
)
THINKING = (
    "Thinking in parallel",
    "Of a block only the longest path is on the critical path, the one to wait for; tokens beside it are "
    "saved.",
    (
        *_WHO,
        Column("parallel ratio", "responses with a block", lambda s: percent(s.parallel_ratio)),
        Column("blocks", "of a response", lambda s: fixed(s.blocks_per_response, 2)),
        Column("paths", "of a block", lambda s: fixed(s.paths_per_block, 2)),
        Column("well-formed", "blocks that the policy closed in good form", lambda s: percent(s.well_formed)),
        Column("tokens", "of a response, all", lambda s: fixed(s.tokens, 1)),
        Column("critical", "of its longest chain", lambda s: fixed(s.critical_tokens, 1)),
        Column("saved", "share of tokens beside the longest chain", lambda s: percent(s.saved)),
        Column("first block at", "0 % is the response's begin", lambda s: percent(s.first_block)),
        Column("right with blocks", "responses that use blocks", lambda s: _of(s.with_blocks)),
        Column("right without", "responses that use none", lambda s: _of(s.without_blocks)),
    ),
)
PAIRED: tuple[str, str, tuple[Column[Pair], ...]] = (
    "Paired tests",
    "Difference of mean@n (in mode majority@k of maj@k) on the same problems, in points, with its paired "
    "bootstrap interval. p: exact two-sided sign-flip permutation test over problems; with one trial a "
    "problem that is the exact McNemar test. Holm: p adjusted for all rows of this table.",
    (
        Column("benchmark", "", lambda p: p.after.benchmark, is_text=True),
        Column("from", "", lambda p: f"{p.before.checkpoint}, {p.before.mode}", is_text=True),
        Column("to", "", lambda p: f"{p.after.checkpoint}, {p.after.mode}", is_text=True),
        Column("problems", "asked in both", lambda p: f"{p.found.problems:,}"),
        Column("difference", "to - from", lambda p: interval(p.found.difference, signed=True)),
        Column("p", "sign-flip permutation", lambda p: _p(p.found.p)),
        Column("p, Holm", "adjusted", lambda p: _p(p.adjusted)),
    ),
)
