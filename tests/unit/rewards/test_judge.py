from __future__ import annotations

from megatron_parallel_r1.rewards.format_check import Format
from megatron_parallel_r1.rewards.verification import ResponseToJudge, judge
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.thought.tree import Block, Path, Summary, Tree

SEQUENTIAL = Tree(length=5)
PARALLEL = Tree(20, (Block(2, (Path(3, 6, True), Path(6, 9, True)), 9, Summary(10, 13, True)),))


def test_a_batch_by_hand(verifier: Verifier) -> None:
    attempts = [
        ResponseToJudge("so\nFinal Answer: 7", PARALLEL, ("7",)),
        ResponseToJudge("so\nFinal Answer: 9", PARALLEL, ("7", "9")),
        ResponseToJudge("so\nFinal Answer: 8", SEQUENTIAL, ("7", "9")),
        ResponseToJudge("no answer", SEQUENTIAL, ("7",)),
        ResponseToJudge(r"is \boxed{(x+1)^2}", SEQUENTIAL, ("0", "x^2+2x+1")),
    ]
    judged = judge(attempts, verifier)
    assert [verdict.correct for verdict in judged] == [True, True, False, False, True]
    assert [verdict.extracted for verdict in judged] == ["7", "9", "8", None, "(x+1)^2"]
    assert [verdict.reason for verdict in judged] == ["text", "text", "number", "empty", "algebra"]
    assert [verdict.well_formed for verdict in judged] == [True, True, False, False, False]
    assert judged[0].format == Format(blocks=1, well_formed_blocks=1, paths=2)


def test_an_empty_batch_starts_no_worker() -> None:
    with Verifier() as verifier:
        assert judge([], verifier) == []
        assert verifier.pids == ()
