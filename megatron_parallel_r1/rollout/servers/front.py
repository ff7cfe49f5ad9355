"""A router of the site, such as sglang-router, before the servers: what it must let through.

It chooses the server of a request, by its own prefix affinity. It may read a request's fields one by one, and
drop those that it does not know: draws would then be of another distribution than the trainer's, and nothing
would fail. So each is tried, once, by its effect.
"""

from __future__ import annotations

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.joined_blocks import JoinedBlock
from megatron_parallel_r1.rollout.servers.client import GenerateRequest, Server, draws_by_seed

NONE: frozenset[int] = frozenset()
TOKENS = (0, 0, 0)
LIMIT = 4


async def check_router(router: Server, seeded: bool) -> None:
    """Checks that seeds, stop tokens and suppressed tokens reach the servers.

    Args:
        seeded: the servers behind it draw by seed.

    Raises:
        UserError: the router drops a field of a request that changes what is drawn.
        Unreachable: no answer.
    """

    async def draw(stop: frozenset[int] = NONE, suppress: frozenset[int] = NONE) -> tuple[int, ...]:
        request = GenerateRequest(TOKENS, Sampling(temperature=0.0), LIMIT, stop, suppress, "router")
        return (await router.generate(request)).completion.tokens

    dropped = [] if await draws_by_seed(router) or not seeded else ["sampling_seed"]
    first = (await draw())[0]
    dropped += ["stop_token_ids"] if len(await draw(stop=frozenset({first}))) > 1 else []
    dropped += ["logit_bias"] if (await draw(suppress=frozenset({first})))[0] == first else []
    if dropped:
        raise UserError(
            f"{router.url} drops {', '.join(dropped)} from requests; update that router, or leave out "
            "rollout.router"
        )


async def passes_blocks(router: Server) -> bool:
    """Whether joined blocks reach the servers; they refuse one that no text can have.

    Raises:
        Unreachable: no answer.
    """
    impossible = (JoinedBlock(len(TOKENS), (1,)),)
    request = GenerateRequest(TOKENS, Sampling(), 1, NONE, NONE, "router", impossible)
    try:
        await router.generate(request)
    except UserError:
        return True
    return False
