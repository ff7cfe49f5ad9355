"""Whether a server draws by seed, and whether its log-probs are of the distribution that it draws from.

Both are seen, not asked for: settings that change them have other names in each engine and each version.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.servers.client import Asked

if TYPE_CHECKING:
    from megatron_parallel_r1.rollout.servers.client import Server

# The hottest that vLLM takes. There a language model hardly draws the same DRAWN tokens twice by chance, and
# what it draws has another log-prob than at temperature 1.
HOT = 2.0
DRAWN = 32
# Nats. Far above rounding in bfloat16, far below what doubling the temperature does.
SAME = 1e-2


async def seeded(server: Server) -> bool:
    """Whether the same seed draws the same.

    Raises:
        UserError: the log-probs leave the temperature out.
        Unreachable: no answer.
    """
    asked = Asked(
        (0,), Sampling(temperature=HOT, seed=20250909), DRAWN, frozenset(), frozenset(), "handshake"
    )
    first, second = await asyncio.gather(server.generate(asked), server.generate(asked))
    drawn = first.completion
    cool = await server.score(asked.tokens + drawn.tokens)
    if max(abs(hot - cold) for hot, cold in zip(drawn.logprobs, cool, strict=True)) < SAME:
        raise UserError(
            f"{server.url} returns log-probs that leave the temperature out; start vLLM with "
            "--logprobs-mode processed_logprobs, SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB"
        )
    return drawn.tokens == second.completion.tokens
