"""Cold-start traces: the written search of a solver that guesses.

A hard problem with one parallel block (line breaks added):

    need=3 <Parallel><Path> x=5 ax=2 ax+b=7 s=9 no x=2 ax=6 ax+b=11 s=9 no none </Path>
    <Path> x=12 ax=10 ax+b=2 s=11 no none </Path></Parallel><Summary> none </Summary> Final Answer: none

A path ends with its result and the summary copies it, so that each step is one look-up away. Guesses are
partly random and paths short, which leaves the length of the search to reinforcement learning.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from pydantic import model_validator

from megatron_parallel_r1.data.embedded.congruence import MODULUS, Congruence
from megatron_parallel_r1.data.trace_text import WrittenTrace, canonical
from megatron_parallel_r1.thought.formats import PARALLEL_R1, ThinkingFormat
from megatron_parallel_r1.utils.settings import Count, Settings, Share


class TraceStyle(Settings):
    """How a solver searches."""

    sequential: Share = 0.5
    """Share of traces that search in the main text, without blocks."""
    paths: tuple[int, int] = (2, 4)
    """Fewest and most paths of a block."""
    tries: tuple[float, ...] = (0.6, 0.25, 0.1, 0.05)
    """Weights of 1, 2, 3, … tries in a path before it gives up."""
    sequential_tries: tuple[float, ...] = (0.6, 0.25, 0.1, 0.05)
    """The same weights for a search in the main text."""
    blocks: Count = 2
    """Most blocks of a trace."""
    again: Share = 0.4
    """Probability of another block after one whose paths found no solution."""
    guess: Share = 0.0
    """Probability that a trace without a solution ends with a value not yet tried; otherwise it ends with
    `Final Answer: none`. Lucky guesses blur both the copying of results and the reward."""
    good: Share = 0.1
    """Probability that a try is a solution on purpose; otherwise it is any value not yet tried."""

    @model_validator(mode="after")
    def _check_ranges(self) -> TraceStyle:
        for name in ("tries", "sequential_tries"):
            weights = getattr(self, name)
            if min(weights, default=0) < 0 or sum(weights) <= 0:
                raise ValueError(f"{name} is {weights}, give weights of 1, 2, … tries, not all 0")
        if not 1 <= self.paths[0] <= self.paths[1]:
            raise ValueError(f"paths is {self.paths}, give the fewest, 1 or more, then the most")
        return self


def write_trace(congruence: Congruence, style: TraceStyle, rng: random.Random) -> str:
    """Writes a response to `congruence.question`, in canonical text.

    It ends with `Final Answer: v`, where v is a solution if a try succeeded, otherwise `none` or a guess.
    """
    words = [f"need={congruence.need}"]
    tried: set[int] = set()
    solutions: list[int] = []
    if rng.random() < style.sequential:
        search, solutions = _search(congruence, style, style.sequential_tries, tried, rng)
        return _close(words + search, solutions, tried, style, rng)
    for block in range(style.blocks):
        if block and rng.random() >= style.again:
            break
        words.append("<Parallel>")
        before = frozenset(tried)
        for _ in range(rng.randint(*style.paths)):
            # Siblings do not see each other: each starts from the values tried before the block.
            own = set(before)
            search, path_solutions = _search(congruence, style, style.tries, own, rng)
            words += ["<Path>", *search, "</Path>"]
            solutions += path_solutions
            tried |= own
        taken = [rng.choice(solutions)] if solutions else []
        words += ["</Parallel>", "<Summary>", f"found={taken[0]}" if taken else "none", "</Summary>"]
        if taken:
            break
    return _close(words, taken, tried, style, rng)


def in_format(response: str, format: ThinkingFormat) -> str:
    """Rewrites a trace into another format; a plan's item is the first word of its path, with its number.

    In a format without summaries the text of the summary follows the block.
    """
    if format == PARALLEL_R1:
        return response
    written, parts, start = WrittenTrace.of(response), list[str](), 0
    for block in written.tree.blocks:
        paths = [written.inside(path) for path in block.paths]
        parts += [written.text(start, block.start), format.open]
        if format.plan is not None:
            items = [f"{number}: {path.split()[0]}" for number, path in enumerate(paths, start=1)]
            parts += [format.plan.begin or ""]
            parts += [f"{format.plan.item}{item}{format.plan.item_end}" for item in items]
            parts += [format.plan.end]
        parts += [f"{format.begin_of(n)}{path}{format.path_end}" for n, path in enumerate(paths, start=1)]
        summary = written.inside(block.summary) if block.summary is not None else ""
        parts += [format.joined, summary, format.summary_end or "", format.behind]
        start = block.stop(written.tree.length)
    return canonical("".join([*parts, written.text(start, written.tree.length)]), format)


def stated_result(text: str) -> str | None:
    """Returns the value that a path or a summary states last (`found=7`), None without one."""
    stated = [word for word in text.split() if word.startswith("found=")]
    return stated[-1].split("=")[1] if stated else None


def _close(
    words: list[str], solutions: list[int], tried: set[int], style: TraceStyle, rng: random.Random
) -> str:
    if not solutions and rng.random() < style.guess:
        solutions = [_untried(tried, rng)]
    answer = str(solutions[0]) if solutions else "none"
    return canonical(" ".join([*words, "Final", "Answer:", answer]))


def _search(
    congruence: Congruence,
    style: TraceStyle,
    weights: Sequence[float],
    tried: set[int],
    rng: random.Random,
) -> tuple[list[str], list[int]]:
    """Returns the words of a search and its solution (one value or none); adds its tries to `tried`."""
    words: list[str] = []
    budget = rng.choices(range(1, len(weights) + 1), weights)[0]
    for _ in range(min(budget, MODULUS - len(tried))):
        roots = [x for x in congruence.roots if x not in tried]
        x = rng.choice(roots) if roots and rng.random() < style.good else _untried(tried, rng)
        tried.add(x)
        words += congruence.attempt(x)
        if x in congruence.roots:
            return [*words, f"found={x}"], [x]
    return [*words, "none"], []


def _untried(tried: set[int], rng: random.Random) -> int:
    """Returns an untried value, or any value if all were tried."""
    return rng.choice([x for x in range(MODULUS) if x not in tried] or range(MODULUS))


MAX_DRILL_TRIES = 8


def write_drill(congruence: Congruence, rng: random.Random) -> str:
    """Writes a fully correct response to `congruence.question`, without tags.

    At most 1 + 5 * 8 + 4 words: `need=…`, up to eight tries of different values, and the end.
    """
    words = [f"need={congruence.need}"]
    tries = rng.sample(range(MODULUS), rng.randint(1, MAX_DRILL_TRIES))
    stops_at_solution = rng.random() < 0.5
    for x in tries:
        words += congruence.attempt(x)
        if stops_at_solution and x in congruence.roots:
            return " ".join([*words, f"found={x}", "Final", "Answer:", str(x)])
    return " ".join([*words, "none", "Final", "Answer:", "none"] if stops_at_solution else words)
