"""Runs tasks in forks of a process that has imported Transformer Engine and Megatron-Core, which is slow."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from megatron_parallel_r1.rollout.launcher.ports import free_port


def in_children(processes: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Runs a task in new processes, the ranks of one launch; returns their results in the ranks' order.

    Call it before this process has threads.

    Raises:
        RuntimeError: a task failed; with its traceback.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    started = []
    for rank in range(processes):
        ours, theirs = context.Pipe(duplex=False)
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes,
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        child = context.Process(target=_run, args=(theirs, environment, task, arguments))
        child.start()
        theirs.close()
        started.append((child, ours))
    results = []
    for child, ours in started:
        try:
            worked, result = ours.recv()
        except EOFError:
            worked, result = False, "the process ended early"
        child.join()
        if not worked:
            for other, _ in started:
                other.kill()
            raise RuntimeError(result)
        results.append(result)
    return results


def _run(
    pipe: Connection, environment: dict[str, Any], task: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        pipe.send((True, task(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
