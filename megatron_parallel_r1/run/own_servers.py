"""Rollout servers that a run starts, on the node of rank zero or beside every node's ranks, and stops when it
ends."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings
from megatron_parallel_r1.rollout.launcher.run import build_servers, visible_gpus
from megatron_parallel_r1.rollout.launcher.supervisor import ServerProcess, Supervisor
from megatron_parallel_r1.utils.rank import world_size


def launch_settings(
    rollout: Rollout, checkpoint: Path, isolated: bool, logs: Path, ranks: int
) -> LaunchSettings:
    """The settings of the servers that a run starts; arguments as those of `OwnServers`.

    Raises:
        UserError: this node has too few GPUs.
    """
    spread = rollout.colocated and 0 < ranks < world_size()
    return LaunchSettings(
        checkpoint=checkpoint,
        engine="vllm" if rollout.engine == "vllm" else "sglang",
        # Ranks of all nodes send requests to colocated servers.
        host="0.0.0.0" if spread else "127.0.0.1",
        servers=rollout.servers,
        tensor=rollout.tensor,
        port=0,
        # The engines' own choice on GPUs for a checkpoint in float32 is float16.
        dtype="float32" if _stored_dtype(checkpoint) == "float32" else None,
        gpus=server_gpus(rollout, visible_gpus(), ranks),
        memory_share=rollout.memory_share,
        deterministic=rollout.deterministic,
        isolated=isolated,
        colocated=rollout.colocated,
        key_variable=rollout.key_variable,
        key_file=rollout.key_file,
        log_dir=logs / socket.gethostname() if spread else logs,
    )


def _stored_dtype(checkpoint: Path) -> str | None:
    """The dtype that a folder's config.json names, if there is one."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    return config.get("dtype") or config.get("torch_dtype")


def server_gpus(rollout: Rollout, visible: tuple[str, ...], ranks: int) -> tuple[str, ...]:
    """The GPUs of servers beside `ranks` ranks on this node, the i-th of which has the i-th visible GPU.

    Raises:
        UserError: there are GPUs, but too few.
    """
    if visible:
        rollout.check_gpus(ranks, len(visible))
    return visible if rollout.colocated else visible[ranks:]


class OwnServers:
    """Starts rollout servers at the first call of `urls`, stops them at the end of the `with` block.

    For rank zero, or the first rank of each node for colocated servers; on other ranks it does nothing.

    Args:
        rollout: the engine and the number of servers.
        logs: folder of the server logs.
        report: called with a line when a server becomes healthy or crashes.
        ranks: ranks on this node that hold a model on their GPUs.
    """

    def __init__(self, rollout: Rollout, logs: Path, report: Callable[[str], None], ranks: int) -> None:
        self._rollout, self._ranks = rollout, ranks
        self._logs = logs
        self._report = report
        self._urls: tuple[str, ...] = ()
        self._thread: threading.Thread | None = None
        self._ending, self._settled = threading.Event(), threading.Event()
        self._resting, self._healthy = threading.Event(), threading.Event()
        self._error: UserError | None = None

    def urls(self, checkpoint: Path, isolated: bool) -> tuple[str, ...]:
        """Returns the base URLs; the first call starts the servers and waits until they are healthy.

        Args:
            checkpoint: a Hugging Face folder with the initial weights; later weights are published.
            isolated: load the plugin that joins isolated paths.

        Raises:
            UserError: they cannot be started.
        """
        if self._thread is None:
            settings = launch_settings(self._rollout, checkpoint, isolated, self._logs, self._ranks)
            children = build_servers(settings)
            self._urls = tuple(child.url for child in children)
            # One thread starts and watches the servers: the kernel kills them when that thread ends.
            self._thread = threading.Thread(
                target=self._keep, args=(children, settings), name="servers", daemon=True
            )
            self._thread.start()
        self._settled.wait()
        if self._error is not None:
            raise self._error
        return self._urls

    def rest(self) -> None:
        """Restarts no server until `wake`: the trainer uses its memory."""
        self._resting.set()

    def wake(self, patience_s: float) -> None:
        """Restarts servers that were lost meanwhile, and waits until all are healthy, or `patience_s`."""
        self._resting.clear()
        if self._thread is not None and self._thread.is_alive():
            self._healthy.clear()
            self._healthy.wait(patience_s)

    def __enter__(self) -> OwnServers:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Stops the servers, if they were started."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()

    def _keep(self, children: list[ServerProcess], settings: LaunchSettings) -> None:
        try:
            with Supervisor(children, settings, self._report) as supervisor:
                while not self._ending.is_set():
                    supervisor.poll(restarts=not self._resting.is_set())
                    if supervisor.healthy:
                        self._settled.set()
                    waited_for = supervisor.healthy and not self._healthy.is_set()
                    # A guard ends later than its server.
                    if waited_for and all(child.answers() for child in children):
                        self._healthy.set()
        except UserError as error:
            # Once `urls` has returned, the pool reports that no server is left.
            self._error = error
            self._report(str(error))
        finally:
            self._healthy.set()
            self._settled.set()
