"""The report of a cold start, as Markdown for people and as JSON for programs."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from megatron_parallel_r1.coldstart.checks import REASONS, Checked, Rejection, TraceShape
from megatron_parallel_r1.utils.formats import percent
from megatron_parallel_r1.utils.tables import markdown_table

EXCERPT_CHARS = 1500


@dataclass(frozen=True, slots=True)
class ColdStartReport:
    """The result of a cold start.

    Attributes:
        problems: the number of problems.
        hard: problems that took more than one round.
        unsolved: ids of problems without a trace that passes, in order.
        unanswered: requests without an answer; the same command repeats them.
        tally: the tally of all answers.
        passed, written: shapes of the traces before and after balancing.
    """

    problems: int
    hard: int
    unsolved: tuple[str, ...]
    unanswered: int
    tally: Tally
    passed: ShapeCounts
    written: ShapeCounts

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        lines = [
            "# Cold start",
            "",
            markdown_table(
                ("", "count"),
                [
                    ("problems", self.problems),
                    ("problems that took more than one round", self.hard),
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
            *shape_lines(self.passed, self.written),
        ]
        return "\n".join(lines).rstrip() + "\n"


def tally_lines(tally: Tally) -> list[str]:
    """Formats Markdown: how many answers pass, why the others do not, and examples."""
    share = tally.passed / tally.answers if tally.answers else None
    rows: list[tuple[object, ...]] = [("passes", "", tally.passed, percent(share))]
    rows += [(reason, kind, count, percent(count / tally.answers)) for reason, kind, count in tally.reasons]
    lines = ["## Check", "", markdown_table(("", "kind", "answers", "share"), rows), ""]
    for example in tally.examples:
        why = ": ".join(part for part in (example.rejection.kind, example.rejection.detail) if part)
        title = f"### {example.rejection.reason}, problem {example.problem}, sample {example.sample}"
        lines += [title, "", *([why, ""] if why else []), *_quoted(example.text), ""]
    return lines


def shape_lines(before: ShapeCounts, after: ShapeCounts) -> list[str]:
    """Formats Markdown: traces by their blocks and paths, before and after balancing."""
    left = {(blocks, widest): count for blocks, widest, count in after.cells}
    cells = [(blocks, widest, count, left.get((blocks, widest), 0)) for blocks, widest, count in before.cells]
    kept = dict(after.paths)
    paths = [(count, blocks, kept.get(count, 0)) for count, blocks in before.paths]
    return [
        markdown_table(("blocks", "paths of the widest", "traces that pass", "traces written"), cells),
        "",
        markdown_table(("paths of a block", "blocks that pass", "blocks written"), paths),
    ]


def _quoted(text: str) -> list[str]:
    """Formats any text as a code block."""
    excerpt = text[:EXCERPT_CHARS] + (" […]" if len(text) > EXCERPT_CHARS else "")
    fence = "```"
    while fence in excerpt:
        fence += "`"
    return [fence, *excerpt.splitlines(), fence]


@dataclass(frozen=True, slots=True)
class CheckedSample:
    """A checked answer, with the id of its problem and its sample number."""

    problem: str
    sample: int
    checked: Checked


@dataclass(frozen=True, slots=True)
class RejectedExample:
    """A rejected answer that the report shows."""

    problem: str
    sample: int
    rejection: Rejection
    text: str


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of answers by the result of the check.

    Attributes:
        answers: all answers checked.
        passed: answers that passed.
        reasons: (reason, kind, rejected answers), in the order of the check.
        examples: random examples of each reason and kind.
        shapes: shapes of the answers that passed.
    """

    answers: int
    passed: int
    reasons: tuple[tuple[str, str, int], ...]
    examples: tuple[RejectedExample, ...]
    shapes: tuple[TraceShape, ...]

    @classmethod
    def of(cls, samples: Sequence[CheckedSample], examples: int, seed: int) -> Tally:
        """Counts answers, and draws up to `examples` examples of each reason and kind by `seed`."""
        rejected: dict[tuple[str, str], list[RejectedExample]] = {}
        for sample in samples:
            if rejection := sample.checked.rejection:
                example = RejectedExample(sample.problem, sample.sample, rejection, sample.checked.text)
                rejected.setdefault((rejection.reason, rejection.kind), []).append(example)
        keys = sorted(rejected, key=lambda key: (REASONS.index(key[0]), -len(rejected[key]), key[1]))
        passed = [sample.checked.shape for sample in samples if sample.checked.kept]
        return cls(
            answers=len(samples),
            passed=len(passed),
            reasons=tuple((*key, len(rejected[key])) for key in keys),
            examples=tuple(example for key in keys for example in _draw(rejected[key], examples, seed)),
            shapes=tuple(passed),
        )

    def count(self, reason: str) -> int:
        """Returns the number of answers rejected for a reason, of any kind."""
        return sum(count for name, _, count in self.reasons if name == reason)


def _draw(examples: Sequence[RejectedExample], count: int, seed: int) -> list[RejectedExample]:
    indices = sorted(random.Random(seed).sample(range(len(examples)), min(count, len(examples))))
    return [examples[index] for index in indices]


@dataclass(frozen=True, slots=True)
class ShapeCounts:
    """Counts of traces by (blocks, paths of the widest block), and of blocks by number of paths."""

    traces: int
    cells: tuple[tuple[int, int, int], ...]
    paths: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, shapes: Iterable[TraceShape]) -> ShapeCounts:
        listed = list(shapes)
        cells = Counter((shape.blocks, shape.widest) for shape in listed)
        paths = Counter(count for shape in listed for count in shape.paths)
        return cls(
            traces=len(listed),
            cells=tuple((blocks, widest, count) for (blocks, widest), count in sorted(cells.items())),
            paths=tuple(sorted(paths.items())),
        )
