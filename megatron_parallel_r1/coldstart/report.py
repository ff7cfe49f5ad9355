"""The report of a cold start, as Markdown to read and as JSON to reckon with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_parallel_r1.coldstart.tally import Shapes, Tally
from megatron_parallel_r1.report.formats import percent

SHOWN_CHARS = 1500


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a cold start came to.

    Attributes:
        problems: asked about.
        hard: problems that took further rounds.
        unsolved: ids of those without a trace that passes, in order.
        unanswered: requests without an answer; the same command asks them again.
        tally: of all answers.
        passed, written: the traces before and after the balance.
    """

    problems: int
    hard: int
    unsolved: tuple[str, ...]
    unanswered: int
    tally: Tally
    passed: Shapes
    written: Shapes

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        lines = [
            "# Cold start",
            "",
            *_table(
                ("", "count"),
                [
                    ("problems", self.problems),
                    ("problems asked about in more than one round", self.hard),
                    ("problems without a trace that passes", len(self.unsolved)),
                    ("requests without an answer", self.unanswered),
                    ("answers", self.tally.answers),
                    ("traces that pass", self.tally.passed),
                    ("traces written", self.written.traces),
                ],
            ),
            "",
            *tally_lines(self.tally),
            "## Blocks and paths",
            "",
            *_shapes(self.passed, self.written),
        ]
        return "\n".join(lines).rstrip() + "\n"


def tally_lines(tally: Tally) -> list[str]:
    """Markdown: who passes and why the rest does not, with examples."""
    share = tally.passed / tally.answers if tally.answers else None
    rows: list[tuple[object, ...]] = [("passes", "", tally.passed, percent(share))]
    rows += [(reason, kind, count, percent(count / tally.answers)) for reason, kind, count in tally.reasons]
    lines = ["## Check", "", *_table(("", "kind", "answers", "share"), rows), ""]
    for example in tally.examples:
        told = ": ".join(part for part in (example.rejection.kind, example.rejection.detail) if part)
        title = f"### {example.rejection.reason}, problem {example.problem}, sample {example.sample}"
        lines += [title, "", *([told, ""] if told else []), *_quoted(example.text), ""]
    return lines


def _shapes(before: Shapes, after: Shapes) -> list[str]:
    left = {(blocks, widest): count for blocks, widest, count in after.cells}
    cells = [(blocks, widest, count, left.get((blocks, widest), 0)) for blocks, widest, count in before.cells]
    kept = dict(after.paths)
    paths = [(count, blocks, kept.get(count, 0)) for count, blocks in before.paths]
    return [
        *_table(("blocks", "paths of the widest", "traces that pass", "traces written"), cells),
        "",
        *_table(("paths of a block", "blocks that pass", "blocks written"), paths),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *map(line, rows)]


def _quoted(text: str) -> list[str]:
    """A code block of what a teacher wrote, whatever that holds."""
    shown = text[:SHOWN_CHARS] + (" […]" if len(text) > SHOWN_CHARS else "")
    fence = "```"
    while fence in shown:
        fence += "`"
    return [fence, *shown.splitlines(), fence]
