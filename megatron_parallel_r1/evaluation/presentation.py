"""The tables of an evaluation, their pages in Markdown and HTML, and files with the plot."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from rich.console import Console

from megatron_parallel_r1.evaluation.output import writing
from megatron_parallel_r1.evaluation.plot import draw_plot, svg_of
from megatron_parallel_r1.evaluation.statistics import Interval
from megatron_parallel_r1.evaluation.summary import BenchmarkResult, EvaluationSummary, PairedTest, RightShare
from megatron_parallel_r1.utils.formats import NONE, fixed, interval, percent
from megatron_parallel_r1.utils.tables import Column, Table


def write_pages(
    results: Sequence[BenchmarkResult], pairs: Sequence[PairedTest], stem: Path, console: Console
) -> None:
    """Writes `<stem>.md`, `.html` and `.json`, and for several checkpoints the plot, `.png` and `.svg`.

    Prints the tables.

    Raises:
        UserError: the folder cannot be written.
    """
    summaries = [result.summary for result in results]
    tables, svg = evaluation_tables(summaries, pairs), None
    with writing(stem.parent):
        stem.parent.mkdir(parents=True, exist_ok=True)
        if len({(summary.checkpoint, summary.step) for summary in summaries}) > 1:
            figure = draw_plot(summaries)
            figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=150)
            svg = svg_of(figure)
            stem.with_name(f"{stem.name}.svg").write_text(svg, encoding="utf-8")
        stem.with_name(f"{stem.name}.md").write_text(markdown_page(tables), encoding="utf-8")
        stem.with_name(f"{stem.name}.html").write_text(html_page(tables, svg), encoding="utf-8")
        figures = json.dumps([asdict(summary) for summary in summaries], indent=2, ensure_ascii=False)
        stem.with_name(f"{stem.name}.json").write_text(figures + "\n", encoding="utf-8")
    for table in tables:
        console.print(table.terminal())
    console.print(f"tables   {stem}.md, {stem}.html", soft_wrap=True, highlight=False)


def evaluation_tables(
    summaries: Sequence[EvaluationSummary], pairs: Sequence[PairedTest] = ()
) -> list[Table]:
    """Accuracy, parallel thinking, and the paired tests if there are any."""
    tables = [
        Table.of("Accuracy", _ACCURACY_LEAD, _ACCURACY, summaries),
        Table.of("Thinking in parallel", _THINKING_LEAD, _THINKING, summaries),
    ]
    return [*tables, Table.of("Paired tests", _PAIRED_LEAD, _PAIRED, pairs)] if pairs else tables


def markdown_page(tables: Sequence[Table]) -> str:
    """All tables under one heading."""
    sections = (f"## {table.title}\n\n{table.lead}\n\n{table.markdown()}" for table in tables)
    return "\n\n".join(["# Evaluation", *sections]) + "\n"


def html_page(tables: Sequence[Table], plot_svg: str | None = None) -> str:
    """One file without external resources, in the style of a run's report."""
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


def _interval(mean: Interval, signed: bool = False) -> str:
    return interval(mean.value, mean.low, mean.high, signed)


def _of(share: RightShare) -> str:
    return NONE if share.value is None else f"{100 * share.value:.1f} % of {share.of:,}"


def _passes(summary: EvaluationSummary) -> str:
    """From k = 2 on; pass@1 is mean@n."""
    return ", ".join(f"@{k} {100 * mean.value:.1f}" for k, mean in summary.passes.items() if k > 1) or NONE


def _majority(summary: EvaluationSummary) -> str:
    return f"@{summary.votes} {_interval(summary.majority)}" if summary.votes > 1 else NONE


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


_NAMES: tuple[Column[EvaluationSummary], ...] = (
    Column("checkpoint", "", lambda s: s.checkpoint, is_text=True),
    Column("benchmark", "", lambda s: s.benchmark, is_text=True),
    Column("mode", "", lambda s: s.mode, is_text=True),
)
_ACCURACY_LEAD = (
    "In percent, with 95 % Wilson score intervals over problems. maj@k: the share of votes of k samples that "
    "elect a right answer."
)
_ACCURACY: tuple[Column[EvaluationSummary], ...] = (
    *_NAMES,
    Column("problems × n", "n samples of each", lambda s: f"{s.problems:,} × {s.samples}"),
    Column("mean@n", "share of right responses", lambda s: _interval(s.mean)),
    Column("pass@k", "unbiased, for k up to n", _passes),
    Column("maj@k", "share of right votes; a tie goes to the first answer", _majority),
    Column("no answer", "responses without a final answer", lambda s: percent(s.unanswered)),
    Column("cut", "responses cut by a limit", lambda s: percent(s.truncated)),
)
_THINKING_LEAD = (
    "Only the longest path of a block is on the critical path, which sets the latency; tokens beside it are "
    "saved."
)
_THINKING: tuple[Column[EvaluationSummary], ...] = (
    *_NAMES,
    Column("parallel ratio", "responses with a block", lambda s: percent(s.parallel_ratio)),
    Column("blocks", "per response", lambda s: fixed(s.blocks_per_response, 2)),
    Column("paths", "per block", lambda s: fixed(s.paths_per_block, 2)),
    Column("well-formed", "blocks that the policy closed in good form", lambda s: percent(s.well_formed)),
    Column("tokens", "of a response, all", lambda s: fixed(s.tokens, 1)),
    Column("critical", "tokens of its longest chain", lambda s: fixed(s.critical_tokens, 1)),
    Column("saved", "share of tokens beside the longest chain", lambda s: percent(s.saved)),
    Column("first block at", "0 % is the start of the response", lambda s: percent(s.first_block)),
    Column("right with blocks", "responses that use blocks", lambda s: _of(s.with_blocks)),
    Column("right without", "responses that use none", lambda s: _of(s.without_blocks)),
)
_PAIRED_LEAD = (
    "Difference of mean@n (in mode majority@k of maj@k) on the same problems, in points, with its "
    "Agresti-Min interval. p: exact two-sided sign-flip permutation test over problems; with one trial a "
    "problem that is the exact McNemar test. Holm: p adjusted for all rows of this table."
)
_PAIRED: tuple[Column[PairedTest], ...] = (
    Column("benchmark", "", lambda p: p.after.benchmark, is_text=True),
    Column("from", "", lambda p: f"{p.before.checkpoint}, {p.before.mode}", is_text=True),
    Column("to", "", lambda p: f"{p.after.checkpoint}, {p.after.mode}", is_text=True),
    Column("problems", "common to both", lambda p: f"{p.comparison.problems:,}"),
    Column("difference", "to - from", lambda p: _interval(p.comparison.difference, signed=True)),
    Column("p", "sign-flip permutation", lambda p: _p(p.comparison.p)),
    Column("p, Holm", "adjusted", lambda p: _p(p.adjusted)),
)
