"""From addresses to a pool of servers that have told of themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.client import STARTED, Server, Timeouts
from megatron_parallel_r1.rollout.servers.pool import Pool, PoolSettings
from megatron_parallel_r1.rollout.servers.sglang import SGLang
from megatron_parallel_r1.rollout.servers.vllm import VLLM
from megatron_parallel_r1.utils.rank import is_rank_zero

LOG = logging.getLogger(__name__)
CLIENTS: Mapping[str, Callable[[str, Timeouts], Server]] = MappingProxyType({"sglang": SGLang, "vllm": VLLM})


def met_pool(
    engine: str,
    urls: Sequence[str],
    timeouts: Timeouts,
    settings: PoolSettings,
    urls_file: Path | None = None,
) -> Pool:
    """The servers at these addresses, at least one of them answering; warns of those that ignore seeds.

    Args:
        engine: one of `CLIENTS`.
        urls_file: see `Pool`.

    Raises:
        UserError: none answers in `settings.patience_s`, or they do not give the log-probs that they should.
    """

    def connect(url: str) -> Server:
        return CLIENTS[engine](url, timeouts)

    pool = Pool(connect, urls, settings, urls_file)
    pool.meet()
    unseeded = [url for url, about in pool.abouts.items() if not about.seeded]
    if unseeded and is_rank_zero():
        LOG.warning(
            "warning: %s: seeds are ignored, so what is asked again is drawn anew; start servers by "
            "serve-rollout, without --no-deterministic",
            ", ".join(unseeded),
        )
    return pool


def check_checkpoint(pool: Pool, folder: Path) -> None:
    """Whether the servers hold a checkpoint as they were started with it.

    Raises:
        UserError: one holds another one, or weights of an update.
    """
    for url, about in pool.abouts.items():
        served = Path(about.model)
        updated = about.version != STARTED
        if updated or (served.exists() and served.resolve() != folder.resolve()):
            what = f"weights of update {about.version}" if updated else about.model
            raise UserError(f"{url} holds {what}, not {folder}; start it with that checkpoint")
