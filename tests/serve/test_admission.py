"""Whose turn it is, and how much of the engine's cache a request is counted with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from megatron_parallel_r1.rollout.native.page_table import PageTable
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.serve.admission import Admission, Limits
from megatron_parallel_r1.serve.engine_request import EngineRequest
from megatron_parallel_r1.serve.schema import ApiError
from megatron_parallel_r1.thought.layout import Mode
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3, traces_of


async def settled(*tasks: asyncio.Task[None]) -> list[bool]:
    """Which of them have ended once all have gone as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)
    return [task.done() for task in tasks]


def test_those_at_once_share_the_cache_in_the_order_of_their_arrival() -> None:
    async def run() -> None:
        admission = Admission(Limits(running=3, cache_tokens=100, waiting=2))
        inside: list[str] = []

        def enter(name: str, tokens: int) -> Callable[[], None]:
            leave = asyncio.Event()

            async def stay() -> None:
                async with admission.slot(tokens):
                    inside.append(name)
                    await leave.wait()
                    inside.remove(name)

            tasks[name] = asyncio.create_task(stay())
            return leave.set

        tasks: dict[str, asyncio.Task[None]] = {}
        leave_first, leave_second = enter("first", 60), enter("second", 40)
        enter("large", 70)
        await settled()
        enter("small", 1)
        await settled()
        assert (inside, admission.running, admission.waiting) == (["first", "second"], 2, 2)
        with pytest.raises(ApiError, match="2 requests are waiting") as refused:
            async with admission.slot(1):
                pass
        with pytest.raises(ApiError, match="2 requests are waiting"):
            admission.check_room()
        assert refused.value.status == 503 and refused.value.headers["Retry-After"]
        leave_second()
        await settled()
        assert inside == ["first"], "the small one must not overtake the large one"
        leave_first()
        await settled()
        assert (inside, admission.running, admission.waiting) == (["large", "small"], 2, 0)
        enter("gone", 50)
        await settled()
        tasks["gone"].cancel()
        await settled()
        enter("last", 29)
        await settled()
        assert (inside, admission.waiting) == (["large", "small", "last"], 0)
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["isolated", "replay", "causal", "sequential"])
def test_no_answer_holds_more_than_it_is_counted_with(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    extend = PageTable.extend

    def noted(self: PageTable, *arguments: object) -> object:
        slots = extend(self, *arguments)
        held.append(self.used)
        return slots

    monkeypatch.setattr(PageTable, "extend", noted)
    # Of one block, which takes most of the response: here replay needs half as much again.
    thinking = Thinking(mode=mode, paths=8, max_blocks=1, max_response_tokens=40)
    shares = []
    for seed, prompt in enumerate(random_prompts(30)):
        held.clear()
        traces_of(native_engine(tiny_qwen3()), thinking, [prompt], [seed])
        shares.append(max(held) / EngineRequest([prompt], 1, [seed], thinking, ()).cache_tokens)
    assert 0.5 < max(shares) <= 1
