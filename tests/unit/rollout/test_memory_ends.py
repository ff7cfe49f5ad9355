"""Memory ends while the native engine's cache grows: whoever asked is told, and the engine goes on as it was.

The allocation that fails is simulated; on a GPU torch raises the same error.
"""

from __future__ import annotations

import asyncio

import pytest
import torch

from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.model import DecodeModel
from tests.unit.rollout.tiny import VOCABULARY, native_engine, tiny_qwen3

SLOTS = 4096  # of a fresh engine


def prompts(tokens: int) -> list[list[int]]:
    """Of a hundred tokens each, all unlike."""
    return [
        [7 + (number * place) % (VOCABULARY - 7) for place in range(100)] for number in range(tokens // 100)
    ]


async def answers(
    engine: NativeEngine, token_lists: list[list[int]]
) -> list[tuple[int, ...] | BaseException]:
    """The ten tokens that each draws behind its prompt, all at once; or why it got none."""

    async def result(seed: int, prompt: list[int]) -> tuple[int, ...]:
        context = engine.open()
        try:
            await engine.write(context, prompt)
            drawn = await engine.sample(context, Sampling(seed=seed), 10, frozenset(), frozenset())
            return drawn.tokens
        finally:
            engine.close(context)

    calls = [result(seed, prompt) for seed, prompt in enumerate(token_lists)]
    return await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("recurring", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_growth_that_fails_changes_nothing(
    layer: int, recurring: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_qwen3()
    engine = native_engine(model, recurring=recurring)
    few, many = prompts(1000), prompts(SLOTS + 1000)
    expected = asyncio.run(answers(native_engine(model), many))
    empty_cache = DecodeModel._empty_cache
    sizes: list[int] = []

    def scarce(self: DecodeModel, slots: int) -> torch.Tensor:
        sizes.append(slots)
        if len(sizes) > layer:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty_cache(self, slots)

    assert asyncio.run(answers(engine, few)) == expected[: len(few)]
    with monkeypatch.context() as patch:
        patch.setattr(DecodeModel, "_empty_cache", scarce)
        results = asyncio.run(answers(engine, many))
        assert any(isinstance(result, torch.OutOfMemoryError) for result in results)
        assert sizes == [SLOTS] * (layer + 1) and engine.cached_tokens == 0
        # What fits is served as ever, while there is still no more memory.
        assert asyncio.run(answers(engine, few)) == expected[: len(few)]
        assert len(sizes) == layer + 1
    assert asyncio.run(answers(engine, many)) == expected
