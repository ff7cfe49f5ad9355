"""Inside parallel blocks: how long paths are, and whether summaries say what their paths found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import decode
from megatron_parallel_r1.distributed.replicas import gather_from_replicas, is_replica_leader, replica_slice
from megatron_parallel_r1.rewards.fast_equality import decide_without_algebra
from megatron_parallel_r1.rewards.path_diversity import content_span
from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.thought.tree import Block, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stated = Callable[[str], str | None]
"""The result that the text of a path or a summary states; None: none."""

_NUMBER = re.compile(
    r"(?:(?<![\w.)}])-)?"
    r"(?:\\[dt]?frac\{\d{1,40}\}\{\d{1,40}\}"
    r"|(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d{1,40})(?:\.\d{1,40})?(?:/\d{1,40})?)%?"
)


def stated_value(text: str) -> str | None:
    r"""A `\boxed{…}` or `Final Answer: …` of the text, else the last number in it; None without one.

    In `half of 50 is 25 points` that is `25`: prose ends in what it found.
    """
    if answer := extract_answer(text):
        return answer
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def path_lengths(tree: Tree) -> Iterator[int]:
    """Tokens between the tags of each path, at any depth."""
    for _, block in tree.all_blocks():
        for path in block.paths:
            start, stop = content_span(path)
            yield stop - start


def summary_metrics(
    traces: Sequence[Trace], tokenizer: PreTrainedTokenizerBase, stated: Stated = stated_value
) -> dict[str, float | None]:
    """Whether summaries say what their paths found.

    Over blocks of two paths or more whose summary states a result, as a path of theirs does:
    `summary_agreement` is the share of those whose summary states the result of one path at least,
    `summary_majority` that of the most frequent one among the paths that state any; of equally frequent ones
    either counts. Results are equal as answers are, as far as that is told without algebra.

    Args:
        stated: reads the result off a text.

    Returns:
        None for both where there is no such block.
    """
    ranks = [
        rank
        for trace in traces
        for _, block in trace.tree.all_blocks()
        if (rank := _rank(block, trace, tokenizer, stated)) is not None
    ]
    return {
        "summary_agreement": mean(agreeing > 0 for agreeing, _ in ranks),
        "summary_majority": mean(agreeing == most for agreeing, most in ranks),
    }


def mean(values: Iterable[float]) -> float | None:
    """None where there are no values."""
    values = list(values)
    return fmean(values) if values else None


def _rank(
    block: Block, trace: Trace, tokenizer: PreTrainedTokenizerBase, stated: Stated
) -> tuple[int, int] | None:
    """How many paths state what the summary does, and how many state what most of them do."""
    if block.summary is None or len(block.paths) < 2:
        return None

    def read(start: int, stop: int) -> str | None:
        return stated(decode(tokenizer, trace.tokens[start:stop]))

    summed = read(block.summary.start + 1, block.summary.stop - block.summary.closed)
    found = [value for value in (read(*content_span(path)) for path in block.paths) if value is not None]
    if summed is None or not found:
        return None
    return _supporters(summed, found), max(_supporters(value, found) for value in found)


def _supporters(value: str, found: Sequence[str]) -> int:
    return sum(_same(value, other) for other in found)


def _same(one: str, other: str) -> bool:
    verdict = decide_without_algebra(one, other)
    return verdict is not None and verdict.correct


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For each block of a trace and each of its paths, whether its own answer is right; None where it has none.
PathVerdicts = list[list[bool | None]]


def judge_paths(
    traces: Sequence[Trace],
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    verifier: Verifier,
    stated: Stated,
) -> list[PathVerdicts]:
    """For each trace, of each block of `tree.all_blocks()` and each of its paths, whether what it states is
    right; None where it states nothing. All copies of the model share the work.
    """
    mine = replica_slice(list(zip(traces, problems, strict=True)))
    if not is_replica_leader():
        return gather_from_replicas(lambda: [])
    found = [_stated(trace, tokenizer, stated) for trace, _ in mine]
    pairs = [
        (answer, reference)
        for (_, problem), blocks in zip(mine, found, strict=True)
        for answer in (answer for block in blocks for answer in block if answer is not None)
        for reference in problem.answers
    ]
    verdicts = iter(verifier.check_many(pairs))
    judged: list[PathVerdicts] = []
    for (_, problem), blocks in zip(mine, found, strict=True):
        judged.append(
            [
                [
                    None if answer is None else any([next(verdicts).correct for _ in problem.answers])
                    for answer in block
                ]
                for block in blocks
            ]
        )
    return gather_from_replicas(lambda: judged)


def _stated(trace: Trace, tokenizer: PreTrainedTokenizerBase, stated: Stated) -> list[list[str | None]]:
    return [
        [stated(decode(tokenizer, trace.tokens[slice(*content_span(path))])) for path in block.paths]
        for _, block in trace.tree.all_blocks()
    ]
