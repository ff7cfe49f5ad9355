"""Results inside parallel blocks: path lengths, agreement of summaries with paths, verdicts of paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import decode
from megatron_parallel_r1.distributed.collectives import (
    gather_from_replicas,
    is_replica_leader,
    replica_slice,
)
from megatron_parallel_r1.rewards.fast_equality import decide_without_algebra
from megatron_parallel_r1.rewards.path_diversity import content_span
from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.thought.tree import Block, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ReadResult = Callable[[str], str | None]
"""Reads the result off the text of a path or a summary; None if it states none."""

PathVerdicts = list[list[bool | None]]
"""For each block of a trace and each of its paths, whether its own answer is right; None if it has none."""

_NUMBER = re.compile(
    r"(?:(?<![\w.)}])-)?"
    r"(?:\\[dt]?frac\{\d{1,40}\}\{\d{1,40}\}"
    r"|(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d{1,40})(?:\.\d{1,40})?(?:/\d{1,40})?)%?"
)


def stated_value(text: str) -> str | None:
    r"""The `\boxed{…}` or `Final Answer: …` of a text, else its last number; None if it has neither.

    For example `25` in `half of 50 is 25 points`: prose ends in its result.
    """
    if answer := extract_answer(text):
        return answer
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def path_lengths(tree: Tree) -> Iterator[int]:
    """Number of tokens between the tags of each path, nested ones included."""
    for _, block in tree.all_blocks():
        for path in block.paths:
            start, stop = content_span(path)
            yield stop - start


def summary_metrics(
    traces: Sequence[PackedTrace], tokenizer: PreTrainedTokenizerBase, read_result: ReadResult = stated_value
) -> dict[str, float | None]:
    """Agreement of summaries with the results of their paths. Replicas share the work.

    Over blocks with two or more paths in which the summary and at least one path state a result:
    `summary_agreement` is the share whose summary states the result of some path, `summary_majority` the
    share whose summary states the most frequent result of the paths; ties count. Results are compared like
    answers, but without algebra.

    Returns:
        None for both if there is no such block.
    """
    own = [packed.unpack() for packed in replica_slice(traces)] if is_replica_leader() else []
    supports = gather_from_replicas(
        lambda: [
            support
            for trace in own
            for _, block in trace.tree.all_blocks()
            if (support := _summary_support(block, trace, tokenizer, read_result)) is not None
        ]
    )
    return {
        "summary_agreement": mean(agreeing > 0 for agreeing, _ in supports),
        "summary_majority": mean(agreeing == most for agreeing, most in supports),
    }


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None without values."""
    values = list(values)
    return fmean(values) if values else None


def _summary_support(
    block: Block, trace: Trace, tokenizer: PreTrainedTokenizerBase, read_result: ReadResult
) -> tuple[int, int] | None:
    """Counts the paths that state the summary's result, and those that state the most frequent result."""
    if block.summary is None or len(block.paths) < 2:
        return None

    def read(start: int, stop: int) -> str | None:
        return read_result(decode(tokenizer, trace.tokens[start:stop]))

    summary = read(*block.summary.inside)
    results = [value for value in (read(*content_span(path)) for path in block.paths) if value is not None]
    if summary is None or not results:
        return None
    return _count_equal(summary, results), max(_count_equal(value, results) for value in results)


def _count_equal(value: str, results: Sequence[str]) -> int:
    return sum(_are_equal(value, other) for other in results)


def _are_equal(first: str, second: str) -> bool:
    verdict = decide_without_algebra(first, second)
    return verdict is not None and verdict.correct


def judge_paths(
    traces: Sequence[PackedTrace],
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    verifier: Verifier,
    read_result: ReadResult,
) -> list[PathVerdicts]:
    """Verifies the result that each path states, in the order of `tree.all_blocks()`.

    Replicas share the work; every rank gets all verdicts.
    """
    own = replica_slice(list(zip(traces, problems, strict=True)))
    if not is_replica_leader():
        return gather_from_replicas(lambda: [])
    results = [_path_results(trace.unpack(), tokenizer, read_result) for trace, _ in own]
    pairs = [
        (answer, reference)
        for (_, problem), blocks in zip(own, results, strict=True)
        for answer in (answer for block in blocks for answer in block if answer is not None)
        for reference in problem.answers
    ]
    verdicts = iter(verifier.check_many(pairs))
    judged: list[PathVerdicts] = []
    for (_, problem), blocks in zip(own, results, strict=True):
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


def _path_results(
    trace: Trace, tokenizer: PreTrainedTokenizerBase, read_result: ReadResult
) -> list[list[str | None]]:
    return [
        [read_result(decode(tokenizer, trace.tokens[slice(*content_span(path))])) for path in block.paths]
        for _, block in trace.tree.all_blocks()
    ]
