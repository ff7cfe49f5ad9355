r"""Answers checked per second: this project's verifier compared with math-verify in one run.

    python -m benchmarks.verifier [--data DATA.parquet] [--pairs 400] [--repeats 5] [--seed 0] [--write]

Both get the same texts, `… $\boxed{answer}$.` and `$\boxed{reference}$`, and extract the answer:
ours with `extract_answer` and one worker process with its time limit, math-verify with `parse` and `verify`
in this process without time limits. Each repeat samples new pairs, so that no cache answers, and the order of
the two alternates.

The answers come from a `solution` column, by default of `math_train.parquet` in `data/` of MPR1_SHARED or
`../shared`; if the file is absent, they are synthetic and the table says so.

    integers                   an integer and the same or another integer
    plain fractions            `\dfrac{6}{8}` and `\frac{3}{4}` or another fraction
    boxed answers, re-spelled  an answer and its re-spelling
    boxed answers, wrong       an answer and that of another problem with a different text

"agree" counts the pairs with equal verdicts; the first of the others are listed.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from math_verify import parse, verify

from benchmarks.page import Table, add_write_option, publish
from benchmarks.side_by_side import ratios, spread
from megatron_parallel_r1.data.opening import open_file
from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import Verifier

Pair = tuple[str, str]
Check = Callable[[Sequence[Pair]], list[bool]]

SYNTHETIC = (
    r"2\sqrt{3}", r"\frac{\sqrt{3}}{2}", r"3\pi", "(2, -1)", r"[0, \infty)", "x^2 + 2x + 1", r"\{1, 2, 5\}",
    "-3, 4", r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", "y = 2x + 1", "3 + 4i", r"60^\circ", r"\text{even}",
    r"1 + \sqrt{5}", r"\left(\frac{1}{2}, 3\right)", r"(-\infty, 2) \cup (3, \infty)", "(x+1)(x-2)", r"40\%",
    r"\frac{5\pi}{6}", "2^{10}",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """Results for one kind of pairs: pairs/s of both in each repeat; disagreements with our verdict."""

    pairs: int
    ours: list[float]
    theirs: list[float]
    disagreements: list[tuple[Pair, bool]]

    def row(self, name: str) -> list[str]:
        agree = f"{self.pairs - len(self.disagreements)} of {self.pairs}"
        faster = spread(ratios(self.ours, self.theirs), ".1f")
        return [name, spread(self.ours, ".0f"), spread(self.theirs, ".0f"), faster, agree]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a table with a `solution` column")
    parser.add_argument("--pairs", type=int, default=400, help="pairs of each kind per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    add_write_option(parser)
    args = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that time limits are off
    answers, where = _answers(args.data)
    rows: list[list[str]] = []
    disagreements: list[str] = []
    with Verifier() as verifier:

        def ours(pairs: Sequence[Pair]) -> list[bool]:
            read = [(extract_answer(answer), extract_answer(reference) or "") for answer, reference in pairs]
            return [verdict.correct for verdict in verifier.check_many(read)]

        ours([("$\\boxed{x+1}$", "$\\boxed{1+x}$")])  # starts the worker
        for name, draw in _kinds(answers).items():
            result = _measure(draw, ours, args.pairs, args.repeats, random.Random(args.seed))
            rows.append(result.row(name))
            disagreements += [f"{name}: {pair} ours {verdict}" for pair, verdict in result.disagreements[:5]]
    columns = ("pairs", "this verifier", "math-verify", "ratio", "agree")
    note = f"{args.repeats} repeats of {args.pairs} pairs of each kind; boxed answers: {where}."
    table = Table("Answers checked: pairs per second, median (lowest to highest)", columns, rows, note)
    publish("verifier", [table], "one worker process besides this one", args.write)
    print("\n".join(disagreements or ["No verdict differs."]))


def _kinds(answers: Sequence[str]) -> dict[str, Callable[[random.Random], Pair]]:
    def integers(rng: random.Random) -> Pair:
        number = rng.randrange(-999, 10_000)
        return str(number), str(number + rng.choice((0, 1)))

    def fractions(rng: random.Random) -> Pair:
        top, bottom, times = rng.randrange(1, 99), rng.randrange(2, 99), rng.randrange(1, 5)
        other = top + rng.choice((0, 1))
        return rf"\dfrac{{{times * top}}}{{{times * bottom}}}", rf"\frac{{{other}}}{{{bottom}}}"

    def respelled(rng: random.Random) -> Pair:
        answer = rng.choice(answers)
        return _respelled(answer, rng), answer

    def wrong(rng: random.Random) -> Pair:
        answer, reference = rng.choice(answers), rng.choice(answers)
        return (answer, reference) if answer != reference else wrong(rng)

    return {
        "integers": integers,
        "plain fractions": fractions,
        "boxed answers, re-spelled": respelled,
        "boxed answers, wrong": wrong,
    }


def _respelled(answer: str, rng: random.Random) -> str:
    if re.fullmatch(r"-?\d+", answer):
        return rng.choice([f"{answer}.0", f"x = {answer}", rf"{answer} \text{{ units}}", f"{int(answer):,}"])
    return rng.choice(
        [
            rf"\displaystyle {answer}",
            answer.replace(r"\frac", r"\dfrac"),
            re.sub(r"(?<!\\left)\(", r"\\left(", re.sub(r"(?<!\\right)\)", r"\\right)", answer)),
        ]
    )


def _measure(
    draw: Callable[[random.Random], Pair], ours: Check, count: int, repeats: int, rng: random.Random
) -> Measured:
    result = Measured(count * repeats, [], [], [])
    for repeat in range(repeats):
        drawn = [draw(rng) for _ in range(count)]
        pairs = [(f"So it is $\\boxed{{{answer}}}$.", f"$\\boxed{{{other}}}$") for answer, other in drawn]
        verdicts: dict[Check, list[bool]] = {}
        for check in (ours, math_verify) if repeat % 2 else (math_verify, ours):
            began = time.perf_counter()
            verdicts[check] = check(pairs)
            speeds = result.ours if check is ours else result.theirs
            speeds.append(count / (time.perf_counter() - began))
        for pair, verdict, other in zip(drawn, verdicts[ours], verdicts[math_verify], strict=True):
            if verdict != other:
                result.disagreements.append((pair, verdict))
    return result


def math_verify(pairs: Sequence[Pair]) -> list[bool]:
    """math-verify as in its documentation, without time limits."""
    return [
        verify(
            parse(reference, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None
        )
        for answer, reference in pairs
    ]


def _answers(path: Path | None) -> tuple[list[str], str]:
    """Reference answers and their source."""
    repository = Path(__file__).resolve().parents[1]
    shared = Path(os.environ.get("MPR1_SHARED") or repository.parent / "shared")
    path = path or shared / "data" / "math_train.parquet"
    if not path.is_file():
        return list(SYNTHETIC), f"{len(SYNTHETIC)} synthetic answers, as {path.name} is absent"
    rows = [cells for _, cells in open_file(path).rows()]
    answers = [answer for cells in rows if (answer := extract_answer(cells["solution"]))]
    return answers, f"{len(answers)} answers of {path.name}"


if __name__ == "__main__":
    main()
