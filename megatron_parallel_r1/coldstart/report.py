"""The report of a cold start, as Markdown to read and as JSON to reckon with."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from megatron_parallel_r1.coldstart.checks import REASONS, Checked, Rejection, Shape
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


@dataclass(frozen=True, slots=True)
class Seen:
    """A checked answer and where it belongs."""

    problem: str
    sample: int
    checked: Checked


@dataclass(frozen=True, slots=True)
class Example:
    """A rejected answer, as the report shows it."""

    problem: str
    sample: int
    rejection: Rejection
    text: str


@dataclass(frozen=True, slots=True)
class Tally:
    """Answers by what the check made of them.

    Attributes:
        answers: checked in all.
        passed: of these.
        reasons: answers that were rejected by (reason, kind), in the order of the check.
        examples: of each, by lot.
        shapes: of those that passed.
    """

    answers: int
    passed: int
    reasons: tuple[tuple[str, str, int], ...]
    examples: tuple[Example, ...]
    shapes: tuple[Shape, ...]

    @classmethod
    def of(cls, seen: Sequence[Seen], shown: int, seed: int) -> Tally:
        """Counts, and picks `shown` examples of each reason and kind by `seed`."""
        rejected: dict[tuple[str, str], list[Example]] = {}
        for one in seen:
            if rejection := one.checked.rejection:
                example = Example(one.problem, one.sample, rejection, one.checked.text)
                rejected.setdefault((rejection.reason, rejection.kind), []).append(example)
        keys = sorted(rejected, key=lambda key: (REASONS.index(key[0]), -len(rejected[key]), key[1]))
        passed = [one.checked.shape for one in seen if one.checked.kept]
        return cls(
            answers=len(seen),
            passed=len(passed),
            reasons=tuple((*key, len(rejected[key])) for key in keys),
            examples=tuple(example for key in keys for example in _some(rejected[key], shown, seed)),
            shapes=tuple(passed),
        )

    def count(self, reason: str) -> int:
        """Answers rejected for a reason, of whatever kind."""
        return sum(count for name, _, count in self.reasons if name == reason)


def _some(examples: Sequence[Example], shown: int, seed: int) -> list[Example]:
    places = sorted(random.Random(seed).sample(range(len(examples)), min(shown, len(examples))))
    return [examples[place] for place in places]


@dataclass(frozen=True, slots=True)
class Shapes:
    """How traces are built: traces by (blocks, paths of the widest block), and blocks by their paths."""

    traces: int
    cells: tuple[tuple[int, int, int], ...]
    paths: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, shapes: Iterable[Shape]) -> Shapes:
        every = list(shapes)
        cells = Counter((shape.blocks, shape.widest) for shape in every)
        paths = Counter(count for shape in every for count in shape.paths)
        return cls(
            traces=len(every),
            cells=tuple((blocks, widest, count) for (blocks, widest), count in sorted(cells.items())),
            paths=tuple(sorted(paths.items())),
        )
