"""What came of a cold start, or of a check of a finished data set, in numbers and examples.

Nothing in it depends on when the run was stopped, or on what of it was already in the journal.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_parallel_r1.coldstart.checks import REASONS, Checked, Rejection, Shape


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
