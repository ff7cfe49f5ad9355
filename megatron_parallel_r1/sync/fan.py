"""One call to several servers at once, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.server import Unreachable
from megatron_parallel_r1.sync.control import Control

C = TypeVar("C", bound=Control)
R = TypeVar("R")


def each(servers: Sequence[C], work: Callable[[C], R]) -> tuple[dict[str, R], dict[str, str]]:
    """What came back, and why nothing did, by URL."""
    if not servers:
        return {}, {}
    with ThreadPoolExecutor(len(servers)) as pool:
        return outcomes({server.url: pool.submit(work, server) for server in servers})


def outcomes(calls: dict[str, Future[R]]) -> tuple[dict[str, R], dict[str, str]]:
    """As `each`, of calls under way."""
    came: dict[str, R] = {}
    failed: dict[str, str] = {}
    for url, call in calls.items():
        try:
            came[url] = call.result()
        except (UserError, Unreachable) as error:
            failed[url] = str(error)
    return came, failed


def over(calls: dict[str, Future[R]]) -> set[str]:
    """URLs of calls under way that have failed by now."""
    return {url for url, call in calls.items() if call.done() and call.exception() is not None}
