"""Rollout servers that a run starts beside its first process, and ends when it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings
from megatron_parallel_r1.rollout.launcher.run import build_servers
from megatron_parallel_r1.rollout.launcher.supervisor import ServerProcess, Supervisor


class OwnServers:
    """None runs until `urls` is called; all have ended when the `with` block has. For the first process.

    Args:
        asked: how many, and of which engine.
        logs: folder of their logs.
        tell: is given a line about each that becomes healthy or crashes.
    """

    def __init__(self, asked: Rollout, logs: Path, tell: Callable[[str], None]) -> None:
        self._asked = asked
        self._logs = logs
        self._tell = tell
        self._urls: tuple[str, ...] = ()
        self._thread: threading.Thread | None = None
        self._ending, self._settled = threading.Event(), threading.Event()
        self._error: UserError | None = None

    def urls(self, checkpoint: Path, isolated: bool) -> tuple[str, ...]:
        """Their base addresses; the first call starts them and waits until they are healthy.

        Args:
            checkpoint: a Hugging Face folder to start with; later weights are published.
            isolated: with the plugin that joins isolated paths.

        Raises:
            UserError: they cannot be started.
        """
        if self._thread is None:
            children = build_servers(
                LaunchSettings(
                    checkpoint=checkpoint,
                    engine="vllm" if self._asked.engine == "vllm" else "sglang",
                    servers=self._asked.servers,
                    tensor=self._asked.tensor,
                    port=0,
                    memory_share=self._asked.memory_share,
                    isolated=isolated,
                    colocated=self._asked.colocated,
                    log_dir=self._logs,
                )
            )
            self._urls = tuple(child.url for child in children)
            # All of a server's life is in one thread: the kernel ends it with the thread that started it.
            self._thread = threading.Thread(target=self._keep, args=(children,), name="servers", daemon=True)
            self._thread.start()
        self._settled.wait()
        if self._error is not None:
            raise self._error
        return self._urls

    def __enter__(self) -> OwnServers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        if self._thread is not None:
            self._thread.join()

    def _keep(self, children: list[ServerProcess]) -> None:
        settings = LaunchSettings(checkpoint=self._logs)
        try:
            with Supervisor(children, settings.crashes, settings.start_seconds, self._tell) as supervisor:
                while not self._ending.is_set():
                    supervisor.look()
                    if supervisor.healthy:
                        self._settled.set()
        except UserError as error:
            # If it comes late, the pool says that no server is left.
            self._error = error
            self._tell(str(error))
        finally:
            self._settled.set()
