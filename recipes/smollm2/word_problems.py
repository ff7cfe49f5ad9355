"""Word problems in plain English, of one and two steps, with worked traces, as JSON Lines for a recipe.

    python -m recipes.smollm2.word_problems FOLDER

writes `cold_start.jsonl`, `train.jsonl` and `held_out.jsonl`. Held-out problems differ from all others in
both wording and numbers: they have templates of their own, and numbers that no other problem combines.

A path of a trace works out the whole problem, in one of several orders. Siblings cannot see one another, so
they are attempts, not parts of the work: some contain a slip, and the summary goes with the majority.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAMES = ("Ann", "Ben", "Clara", "David", "Ella", "Felix", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps")
# a {thing} count: {a}, {b}, {c}, {d}; the people are {P} and {Q}. Of each kind the last two are held out.
TEMPLATES = {
    "sum": (
        "{P} has {a} {thing} and buys {b} more. How many {thing} does {P} have now?",
        "There are {a} {thing} on the table and {b} on the floor. How many {thing} are there in all?",
        "{P} found {a} {thing} and {Q} found {b}. How many {thing} did they find together?",
        "In the morning {P} sold {a} {thing}, later {b} more. How many {thing} did {P} sell that day?",
        "A drawer holds {a} {thing} and a shelf holds {b}. What is the total number of {thing}?",
        "{Q} gives {P} {a} {thing}. {P} had {b} before. How many {thing} does {P} own after that?",
    ),
    "product": (
        "{P} has {a} boxes with {b} {thing} in each. How many {thing} does {P} have?",
        "Each bag holds {b} {thing}. How many {thing} are in {a} bags?",
        "{P} buys {b} {thing} every day for {a} days. How many {thing} does {P} buy?",
        "There are {a} rows of {b} {thing}. How many {thing} are there?",
        "{a} children bring {b} {thing} each. How many {thing} do they bring?",
        "A shop packs {b} {thing} into every basket and fills {a} baskets. How many {thing} does it need?",
    ),
    "product_sum": (
        "{P} has {a} boxes with {b} {thing} each, and {c} loose {thing}. How many {thing} does {P} have?",
        "{P} picks {b} {thing} a day for {a} days. {Q} picks {c}. How many {thing} have they together?",
        "Each of {a} bags holds {b} {thing}, and {c} more lie there. How many {thing} are there in all?",
        "{P} had {c} {thing}. Then {Q} gave {P} {a} packs of {b}. How many {thing} does {P} have now?",
        "A shelf has {a} rows of {b} {thing}, and a drawer has {c}. What is the total number of {thing}?",
        "After {Q} adds {c} {thing} to the {a} jars of {b} that {P} filled, how many {thing} do they own?",
    ),
    "sum_difference": (
        "{P} has {a} {thing}, buys {b} more, then gives {c} to {Q}. How many {thing} does {P} have left?",
        "There were {a} {thing} in a box. {P} put in {b} and {Q} took out {c}. How many are in the box?",
        "{P} found {a} {thing} and {Q} found {b}. They lost {c} of them. How many {thing} are left?",
        "A shop had {a} {thing}, received {b} and sold {c}. How many {thing} does it have now?",
        "{P} and {Q} put {a} and {b} {thing} together, and {c} broke. How many {thing} remain whole?",
    ),
}
HELD_OUT_TEMPLATES = 2


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A question, and the calculations that answer it, in order.

    Attributes:
        orders: calculations (left, operator, right), of which the last gives the answer; `None` stands for
            the result of the one before. Any of the orders does.
    """

    question: str
    answer: int
    orders: tuple[tuple[tuple[int | None, str, int | None], ...], ...]


def draw_problem(rng: random.Random, held_out: bool) -> WordProblem:
    """Draws a problem; the same state of `rng` gives the same problem."""
    kind = rng.choice(list(TEMPLATES))
    templates = TEMPLATES[kind]
    template = rng.choice(templates[-HELD_OUT_TEMPLATES:] if held_out else templates[:-HELD_OUT_TEMPLATES])
    while True:
        a, b, c = _numbers(kind, rng)
        shown = sorted((a, b, c) if "{c}" in template else (a, b))
        if (zlib.crc32(repr(shown).encode()) % 5 == 0) == held_out:
            break
    one, other = rng.sample(NAMES, 2)
    question = template.format(P=one, Q=other, thing=rng.choice(THINGS), a=a, b=b, c=c)
    match kind:
        case "sum":
            return WordProblem(question, a + b, (((a, "+", b),), ((b, "+", a),)))
        case "product":
            return WordProblem(question, a * b, (((a, "*", b),), ((b, "*", a),)))
        case "product_sum":
            first, second = (a, "*", b), (b, "*", a)
            orders = ((first, (None, "+", c)), (first, (c, "+", None)), (second, (None, "+", c)))
            return WordProblem(question, a * b + c, orders)
    less = (None, "-", c)
    orders = (((a, "+", b), less), ((b, "+", a), less), *([((a, "-", c), (None, "+", b))] if a > c else []))
    return WordProblem(question, a + b - c, orders)


def _numbers(kind: str, rng: random.Random) -> tuple[int, int, int]:
    if kind.startswith("product"):
        return rng.randint(2, 6), rng.randint(2, 10), rng.randint(2, 20)
    a, b = rng.randint(3, 29), rng.randint(3, 29)
    return a, b, rng.randint(2, a + b - 2)


def worked(problem: WordProblem, rng: random.Random, slips: float = 0.0) -> tuple[str, int]:
    """A chain of calculations and its result, of which each is off with probability `slips`."""
    parts, result = [], 0
    for left, operator, right in rng.choice(problem.orders):
        x, y = result if left is None else left, result if right is None else right
        result = {"+": x + y, "-": x - y, "*": x * y}[operator]
        if rng.random() < slips:
            result += rng.choice((-10, -2, -1, 1, 2, 10))
        parts.append(f"{x} {operator} {y} = {result}")
    return ", ".join(parts), result


def write_trace(problem: WordProblem, rng: random.Random, paths: int, slips: float = 0.1) -> str:
    """A worked response: with 0 paths one chain, which is right; else a block of attempts and a summary.

    Most paths of a block that agree are right.
    """
    if not paths:
        return f"{worked(problem, rng)[0]}\nFinal Answer: {problem.answer}"
    while True:
        attempts = [worked(problem, rng, slips) for _ in range(paths)]
        results = [result for _, result in attempts]
        (most, votes), *others = Counter(results).most_common()
        if most == problem.answer and all(votes > other for _, other in others):
            break
    block = "".join(f"<Path>{text}</Path>" for text, _ in attempts)
    said = ", ".join(map(str, results))
    return (
        f"<Parallel>{block}</Parallel><Summary>The paths say {said}: {problem.answer}.</Summary>\n"
        f"Final Answer: {problem.answer}"
    )


def examples(seed: int, paths: int = 3, sequential: float = 0.3) -> Iterator[dict[str, str]]:
    """An endless stream of training problems with traces, a share `sequential` of them without a block."""
    rng = random.Random(f"cold start/{seed}")
    while True:
        problem = draw_problem(rng, held_out=False)
        trace = write_trace(problem, rng, 0 if rng.random() < sequential else paths)
        yield {"problem": problem.question, "answer": str(problem.answer), "response": trace}


def problems(seed: int, held_out: bool) -> Iterator[dict[str, str]]:
    """An endless stream of problems with their answers."""
    rng = random.Random(f"{'held out' if held_out else 'train'}/{seed}")
    while True:
        problem = draw_problem(rng, held_out)
        yield {"problem": problem.question, "answer": str(problem.answer)}


def write_files(folder: Path, seed: int = 0) -> None:
    """Writes the three files of distinct problems."""
    folder.mkdir(parents=True, exist_ok=True)
    streams = {
        "cold_start": (examples(seed), 4000),
        "train": (problems(seed, held_out=False), 8000),
        "held_out": (problems(seed, held_out=True), 1024),
    }
    for name, (rows, count) in streams.items():
        distinct: dict[str, dict[str, str]] = {}
        while len(distinct) < count:
            row = next(rows)
            distinct.setdefault(row["problem"], row)
        text = "".join(json.dumps(row) + "\n" for row in distinct.values())
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write word problems and worked traces as JSON Lines.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_files(args.folder, args.seed)
