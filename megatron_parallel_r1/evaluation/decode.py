"""Draws and judges responses, each kept the moment it is done: nobody waits for the longest of a batch."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.data.prompts import decode as text_of
from megatron_parallel_r1.data.prompts import encode_prompt
from megatron_parallel_r1.evaluation.records import Attempt, Record, record_of
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.metrics import judge_traces
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.thought.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = tuple[int, ...]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, template: str, question: str) -> Prompt:
    """The prompt that `template`, a text with `{problem}`, makes of a question."""
    # `plain` adds nothing to what it is given: here, a prompt that is already whole.
    return tuple(encode_prompt(tokenizer, "plain", template.replace("{problem}", question)))


async def draw(
    thinker: Thinker[Any],
    asked: Sequence[Attempt],
    prompts: Sequence[Prompt],
    concurrent: int,
    on_trace: Callable[[Attempt, Trace], None],
) -> None:
    """Draws a response to each of `asked`; a prompt is written once, and let go of after its last response.

    Args:
        prompts: of each attempt.
        concurrent: traces in flight at most.
        on_trace: gets each trace once it is there, in a thread of its own; draws go on meanwhile.
    """
    engine = thinker.engine
    slots = asyncio.Semaphore(concurrent)
    opened: dict[Prompt, asyncio.Task[Any]] = {}
    left = Counter(prompts)

    async def write_prompt(prompt: Prompt) -> Any:
        context = engine.open()
        await engine.write(context, prompt)
        return context

    async def one(attempt: Attempt, prompt: Prompt) -> None:
        async with slots:
            if prompt not in opened:
                opened[prompt] = asyncio.ensure_future(write_prompt(prompt))
            context = await opened[prompt]
            trace = await thinker.trace(prompt, context, attempt.seed)
            left[prompt] -= 1
            if not left[prompt]:
                engine.close(context)
                del opened[prompt]
        await asyncio.to_thread(on_trace, attempt, trace)

    await asyncio.gather(*(one(attempt, prompt) for attempt, prompt in zip(asked, prompts, strict=True)))


def judged_record(
    attempt: Attempt, trace: Trace, tokenizer: PreTrainedTokenizerBase, verifier: Verifier
) -> Record:
    """The record of a response."""
    (judged,) = judge_traces([trace], [attempt.problem], tokenizer, verifier)
    return record_of(attempt, trace, judged, text_of(tokenizer, trace.tokens))
