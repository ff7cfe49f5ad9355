"""`parallel-r1 serve-rollout`: runs rollout servers of a checkpoint until SIGTERM or SIGINT."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings, build_command
from megatron_parallel_r1.rollout.launcher.placement import (
    assign_gpus,
    find_python,
    pick_ports,
    server_url,
    visible_gpus,
)
from megatron_parallel_r1.rollout.launcher.supervisor import ServerProcess, Supervisor
from megatron_parallel_r1.utils.files import write_atomically

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})


def serve_rollout(settings: LaunchSettings, tell: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then ends all servers and returns. For the main thread.

    Args:
        tell: receives a line about each server that becomes healthy or crashes.

    Raises:
        UserError: the servers cannot be started, or one crashes repeatedly.
    """
    children = build_servers(settings)
    _remove(settings.urls_file)
    written = False
    with _until_signal() as stopped:
        try:
            with Supervisor(
                children, settings.crashes, settings.start_seconds, tell, alone=True
            ) as supervisor:
                while not stopped():
                    supervisor.poll()
                    if supervisor.healthy and not written:
                        _write(settings.urls_file, [child.url for child in children])
                        written = True
        finally:
            _remove(settings.urls_file)


def build_servers(settings: LaunchSettings) -> list[ServerProcess]:
    """The servers, not started yet.

    Raises:
        UserError: they cannot be started.
    """
    if not (settings.checkpoint / "config.json").is_file():
        raise UserError(f"{settings.checkpoint}: no config.json; give --checkpoint a Hugging Face folder")
    if settings.isolated and settings.engine != "sglang":
        raise UserError(
            f"isolated: {settings.engine} cannot join isolated paths exactly; give --engine sglang"
        )
    python = find_python(settings)
    device, gpus = assign_gpus(settings, visible_gpus())
    return [
        ServerProcess(
            build_command(settings, python, device, port, gpus[index]),
            server_url(settings.host, port),
            settings.log_dir / f"server-{index}.log",
        )
        for index, port in enumerate(pick_ports(settings))
    ]


@contextmanager
def _until_signal() -> Iterator[Callable[[], bool]]:
    """Yields whether a stop signal has arrived; a second one does not hasten the end."""
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, record) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(file: Path | None, urls: Sequence[str]) -> None:
    """Writes the file atomically: other nodes read it as soon as it exists."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(f"{url}\n" for url in urls))


def _remove(file: Path | None) -> None:
    if file is not None:
        file.unlink(missing_ok=True)
