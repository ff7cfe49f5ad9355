"""Whether each path of a block found the right answer by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import decode
from megatron_parallel_r1.distributed.replicas import gather_from_replicas, is_replica_leader, replica_slice
from megatron_parallel_r1.rewards.path_diversity import content
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.path_metrics import Stated
from megatron_parallel_r1.thought.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Verdicts = list[list[bool | None]]


def judge_paths(
    traces: Sequence[Trace],
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    verifier: Verifier,
    stated: Stated,
) -> list[Verdicts]:
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
    judged: list[Verdicts] = []
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
        [stated(decode(tokenizer, trace.tokens[slice(*content(path))])) for path in block.paths]
        for _, block in trace.tree.all_blocks()
    ]
