"""`roll_out` delivers each trace when it is complete and closes every prompt; records of traces."""

from __future__ import annotations

import asyncio
import threading

import pytest

from megatron_parallel_r1.data.embedded.generate import build_tokenizer
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import encode_prompt
from megatron_parallel_r1.evaluation.evaluator import RunningScore, shuffled
from megatron_parallel_r1.evaluation.records import SampleRequest, response_record, sample_requests
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.tokenizer import add_tags
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.traces import TAGS
from tests.unit.evaluation.made import record
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3, traces_of

THINKING = Thinking(mode="isolated", paths=2, max_path_tokens=12, max_response_tokens=60, reserve_tokens=6)
PROBLEM = Problem("p", "1 + 1 = ?", ("2",), "made")


@pytest.mark.parametrize("concurrent", [1, 5, 100])
def test_each_trace_is_delivered_once_in_another_thread(concurrent: int) -> None:
    engine = native_engine(tiny_qwen3())
    prompts = [list(prompt) for prompt in random_prompts(4) for _ in range(3)]
    seeds = [100 + index for index in range(len(prompts))]
    delivered: dict[int, Trace] = {}
    threads: set[int] = set()

    def keep(index: int, trace: Trace) -> None:
        threads.add(threading.get_ident())
        assert index not in delivered
        delivered[index] = trace

    thinker = Thinker(engine, TAGS, THINKING)
    traces = asyncio.run(roll_out(thinker, prompts, seeds, concurrent, on_trace=keep))
    assert [delivered[index] for index in range(len(prompts))] == traces
    plain = traces_of(engine, THINKING, prompts, seeds)
    assert [trace.tokens for trace in traces] == [trace.tokens for trace in plain]
    assert any(trace.tree.blocks for trace in traces)
    assert engine._table.used == 0
    assert threading.get_ident() not in threads


def test_an_error_of_the_keeper_ends_the_rollout() -> None:
    def keep(index: int, trace: Trace) -> None:
        raise OSError("disk full")

    thinker = Thinker(native_engine(tiny_qwen3()), TAGS, THINKING)
    with pytest.raises(OSError, match="disk full"):
        asyncio.run(roll_out(thinker, [(8, 9)], [1], 4, on_trace=keep))


def test_the_template_is_a_text() -> None:
    tokenizer = build_tokenizer()
    question = "Solve mod 13: 3x +4 =7"
    assert encode_prompt(tokenizer, "{problem}", question) == tokenizer.encode(question + "\n")
    assert encode_prompt(tokenizer, "no {problem}", question) == tokenizer.encode(f"no {question}\n")


def test_a_record_of_a_trace_by_hand() -> None:
    tokenizer = build_tokenizer()
    add_tags(tokenizer)
    text = (
        "need=2 <Parallel> <Path> x=1 no </Path> <Path> x=2 s=2 ok found=2 </Path> </Parallel> "
        "<Summary> found=2 </Summary> Final Answer: 2"
    )
    tokens = (*tokenizer.encode(text), tokenizer.eos_token_id)
    tree = parse(tokens, Tags.of(tokenizer))
    trace = Trace(
        (1,), tokens, (True,) * len(tokens), (False,) * len(tokens), (0.0,) * len(tokens), "eos", tree
    )
    with Verifier() as verifier:
        record = response_record(SampleRequest("k", "made", PROBLEM, "i", 3, 9), trace, tokenizer, verifier)
    assert (record.key, record.problem, record.identity, record.sample, record.seed) == ("k", "p", "i", 3, 9)
    assert (record.answer, record.correct, record.references) == ("2", True, ("2",))
    # Of the paths' 4 and 6 tokens the 6 are critical.
    assert (record.tokens, record.critical_tokens) == (20, 16)
    assert (record.blocks, record.paths, record.well_formed_blocks) == (1, 2, 1)
    assert (record.first_block_token, record.first_block) == (1, 1 / 20)
    assert record.response == text


def test_running_figures_count_only_what_nothing_unfinished_precedes() -> None:
    """The short and right ones are finished first; the first of the order is long and wrong."""
    cached = record(problem="2", correct=True, blocks=1)
    running = RunningScore([None, None, cached, None])
    assert running.finish(1, record(correct=True)) == (
        2,
        {"accuracy": None, "parallel_ratio": None, "counted": 0},
    )
    assert running.finish(0, record(correct=False)) == (
        3,
        {"accuracy": 2 / 3, "parallel_ratio": 1 / 3, "counted": 3},
    )
    assert running.finish(3, record(correct=False, blocks=2)) == (
        4,
        {"accuracy": 0.5, "parallel_ratio": 0.5, "counted": 4},
    )


def test_requests_are_shuffled_by_problem_and_drawn_once() -> None:
    problems = [Problem(str(n), f"{n} + 0 = ?", (str(n),), "made") for n in range(40)]
    requests = sample_requests("made", problems, 3, 0, ())
    order = shuffled([*requests, *requests[:6]])
    assert sorted(r.key for r in order) == sorted(r.key for r in requests)
    assert [r.sample for r in order] == [0, 1, 2] * 40
    names = [int(r.problem.id) for r in order[::3]]
    assert names != sorted(names) and names == [int(r.problem.id) for r in shuffled(requests[::-1])[::3]]
    # The first half says what the whole does: of 0..39 sorted its mean would be 9.5.
    assert 14 < sum(names[:20]) / 20 < 25
