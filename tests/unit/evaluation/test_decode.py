"""Drawing one by one gives the traces that training's `roll_out` gives, and lets go of every prompt."""

from __future__ import annotations

import asyncio
import threading

import pytest

from megatron_parallel_r1.data.embedded.generate import build_tokenizer
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.evaluation.decode import draw, judged_record, prompt_tokens
from megatron_parallel_r1.evaluation.records import Attempt
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.tokenizer import add_tags
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.traces import TAGS
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3, traces_of

THINKING = Thinking(mode="isolated", paths=2, max_path_tokens=12, max_response_tokens=60, reserve_tokens=6)
PROBLEM = Problem("p", "1 + 1 = ?", ("2",), "made")


@pytest.mark.parametrize("concurrent", [1, 5, 100])
def test_it_draws_what_training_draws(concurrent: int) -> None:
    engine = native_engine(tiny_qwen3())
    prompts = [tuple(prompt) for prompt in random_prompts(4) for _ in range(3)]
    asked = [Attempt(str(i), "made", PROBLEM, "p", i, 100 + i) for i in range(len(prompts))]
    found: dict[str, Trace] = {}
    threads: set[int] = set()

    def keep(attempt: Attempt, trace: Trace) -> None:
        threads.add(threading.get_ident())
        found[attempt.key] = trace

    asyncio.run(draw(Thinker(engine, TAGS, THINKING), asked, prompts, concurrent, keep))
    theirs = traces_of(engine, THINKING, [list(p) for p in prompts], [a.seed for a in asked])
    assert [found[a.key].tokens for a in asked] == [trace.tokens for trace in theirs]
    assert any(trace.tree.blocks for trace in theirs)
    assert engine._table.used == 0
    assert threading.get_ident() not in threads


def test_an_error_of_the_keeper_ends_the_draw() -> None:
    def keep(attempt: Attempt, trace: Trace) -> None:
        raise OSError("disk full")

    thinker = Thinker(native_engine(tiny_qwen3()), TAGS, THINKING)
    asked = [Attempt("0", "made", PROBLEM, "p", 0, 1)]
    with pytest.raises(OSError, match="disk full"):
        asyncio.run(draw(thinker, asked, [(8, 9)], 4, keep))


def test_the_template_is_a_text() -> None:
    tokenizer = build_tokenizer()
    question = "Solve mod 13: 3x +4 =7"
    assert prompt_tokens(tokenizer, "{problem}", question) == tuple(tokenizer.encode(question + "\n"))
    assert prompt_tokens(tokenizer, "no {problem}", question) == tuple(tokenizer.encode(f"no {question}\n"))


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
        found = judged_record(Attempt("k", "made", PROBLEM, "i", 3, 9), trace, tokenizer, verifier)
    assert (found.key, found.problem, found.identity, found.sample, found.seed) == ("k", "p", "i", 3, 9)
    assert (found.answer, found.correct, found.references) == ("2", True, ("2",))
    # Of the paths' 4 and 6 tokens the 6 are critical.
    assert (found.tokens, found.critical_tokens) == (20, 16)
    assert (found.blocks, found.paths, found.well_formed_blocks) == (1, 2, 1)
    assert (found.first_block_token, found.first_block) == (1, 1 / 20)
    assert found.response == text
