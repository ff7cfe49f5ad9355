"""`parallel-r1 serve-rollout`: rollout servers of a checkpoint, until it is told to end."""

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

ENDING = frozenset({signal.SIGTERM, signal.SIGINT})


def serve_rollout(serving: LaunchSettings, tell: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then ends all servers and returns. For the main thread.

    Args:
        tell: is given a line about each server that becomes healthy or crashes.

    Raises:
        UserError: what is asked cannot be started, or one server only crashes.
    """
    children = build_servers(serving)
    _remove(serving.urls_file)
    written = False
    with _told_to_end() as ending:
        try:
            with Supervisor(children, serving.crashes, serving.start_seconds, tell, alone=True) as supervisor:
                while not ending():
                    supervisor.look()
                    if supervisor.healthy and not written:
                        _write(serving.urls_file, [child.url for child in children])
                        written = True
        finally:
            _remove(serving.urls_file)


def build_servers(serving: LaunchSettings) -> list[ServerProcess]:
    """The servers, not started.

    Raises:
        UserError: what is asked cannot be started.
    """
    if not (serving.checkpoint / "config.json").is_file():
        raise UserError(f"{serving.checkpoint}: no config.json; give --checkpoint a Hugging Face folder")
    if serving.isolated and serving.engine != "sglang":
        raise UserError(
            f"isolated: {serving.engine} cannot join isolated paths exactly; give --engine sglang"
        )
    python = find_python(serving)
    device, gpus = assign_gpus(serving, visible_gpus())
    return [
        ServerProcess(
            build_command(serving, python, device, port, gpus[index]),
            server_url(serving.host, port),
            serving.log_dir / f"server-{index}.log",
        )
        for index, port in enumerate(pick_ports(serving))
    ]


@contextmanager
def _told_to_end() -> Iterator[Callable[[], bool]]:
    """Whether a signal that asks for it came; a second one does not hasten the end."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in ENDING}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(file: Path | None, urls: Sequence[str]) -> None:
    """Whole or not at all: others, also on other nodes, read it as soon as it is there."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(f"{url}\n" for url in urls))


def _remove(file: Path | None) -> None:
    if file is not None:
        file.unlink(missing_ok=True)
