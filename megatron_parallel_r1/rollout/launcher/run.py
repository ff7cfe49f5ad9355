"""`parallel-r1 serve-rollout`: places and runs rollout servers of a checkpoint until SIGTERM or SIGINT."""

from __future__ import annotations

import importlib.util
import os
import platform
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import Device, LaunchSettings, build_command
from megatron_parallel_r1.rollout.launcher.guard import SUPPORTED
from megatron_parallel_r1.rollout.launcher.supervisor import ServerProcess, Supervisor
from megatron_parallel_r1.utils.files import write_atomically

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})


def serve_rollout(settings: LaunchSettings, tell: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then ends all servers and returns. For the main thread.

    Args:
        tell: receives a line about each server that becomes healthy, crashes or hangs.

    Raises:
        UserError: the servers cannot be started, or one crashes repeatedly.
    """
    children = build_servers(settings)
    urls_file, written = settings.urls_file, False
    if urls_file is not None:
        urls_file.unlink(missing_ok=True)
    with _until_signal() as stopped:
        try:
            with Supervisor(children, settings, tell, alone=True) as supervisor:
                while not stopped():
                    supervisor.poll()
                    if supervisor.healthy and urls_file is not None and not written:
                        urls_file.parent.mkdir(parents=True, exist_ok=True)
                        # In one step: other nodes read it as soon as it exists.
                        write_atomically(urls_file, "".join(f"{child.url}\n" for child in children))
                        written = True
        finally:
            if urls_file is not None:
                urls_file.unlink(missing_ok=True)


def build_servers(settings: LaunchSettings) -> list[ServerProcess]:
    """The servers, not started yet.

    Raises:
        UserError: they cannot be started.
    """
    if not SUPPORTED:
        raise UserError(
            f"servers cannot be started on {platform.system()}: it has no prctl, which ends them with their "
            "supervisor; start them on Linux and give their addresses (rollout.urls)"
        )
    if not (settings.checkpoint / "config.json").is_file():
        raise UserError(f"{settings.checkpoint}: no config.json; give --checkpoint a Hugging Face folder")
    python, device, gpus = check_launch(settings)
    return [
        ServerProcess(
            build_command(settings, python, device, port, gpus[index]),
            server_url(settings.host, port),
            settings.log_dir / f"server-{index}.log",
        )
        for index, port in enumerate(pick_ports(settings))
    ]


def check_launch(settings: LaunchSettings) -> tuple[Path, Device, list[tuple[str, ...]]]:
    """The engine's interpreter, the device, and the GPUs of each server; reads no checkpoint.

    Raises:
        UserError: the servers cannot be started on this machine.
    """
    if settings.isolated and settings.engine != "sglang":
        raise UserError(
            f"isolated: {settings.engine} cannot join isolated paths exactly; give --engine sglang"
        )
    gpus = visible_gpus() if settings.gpus is None else settings.gpus
    return find_python(settings), *assign_gpus(settings, gpus)


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


# Linux assigns ephemeral ports from 32768 on (net.ipv4.ip_local_port_range).
FREE_PORTS = range(20000, 32000)
TRIES = 50


def find_python(settings: LaunchSettings) -> Path:
    """The interpreter that has the engine.

    Raises:
        UserError: there is none.
    """
    if settings.python is not None:
        if not os.access(settings.python, os.X_OK):
            raise UserError(
                f"{settings.python}: no such interpreter; give --python one that has {settings.engine}"
            )
        return settings.python
    checkout = Path(__file__).resolve().parents[3]
    environment = checkout / f".venv-{settings.engine}"
    if (environment / "ready").exists():
        return environment / "bin" / "python"
    if importlib.util.find_spec(settings.engine) is not None:
        return Path(sys.executable)
    raise UserError(
        f"no environment with {settings.engine} ({environment}): run `make engines` in {checkout}, or give "
        "--python"
    )


def visible_gpus() -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES names them; none if there is no GPU."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices is not None:
        return tuple(name.strip() for name in devices.split(",") if name.strip() not in ("", "-1"))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except FileNotFoundError:
        return ()
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return tuple(str(index) for index in range(sum(line.startswith("GPU ") for line in lines)))


def assign_gpus(settings: LaunchSettings, visible: tuple[str, ...]) -> tuple[Device, list[tuple[str, ...]]]:
    """The device, and the GPUs of each server.

    Raises:
        UserError: there are too few.
    """
    device = settings.device or ("cuda" if visible else "cpu")
    if device == "cpu":
        return device, [()] * settings.servers
    gpus = settings.tensor * settings.data
    if settings.servers * gpus > len(visible):
        raise UserError(
            f"{settings.servers} servers of {gpus} GPUs need {settings.servers * gpus}, and "
            f"{len(visible)} are visible; lower --servers, --tp or --dp, or give --device cpu"
        )
    return device, [visible[index * gpus : (index + 1) * gpus] for index in range(settings.servers)]


def pick_ports(settings: LaunchSettings) -> list[int]:
    """One free port for each server.

    Raises:
        UserError: a given port is taken.
    """
    requested = [settings.port + index if settings.port else 0 for index in range(settings.servers)]
    listeners = [socket.socket() for _ in requested]
    try:
        # All stay bound until the last is known, or two servers could get the same free port.
        return [
            _bind(listener, settings.host, port) if port else _bind_free(listener, settings.host)
            for listener, port in zip(listeners, requested, strict=True)
        ]
    finally:
        for listener in listeners:
            listener.close()


def _bind_free(listener: socket.socket, host: str) -> int:
    """A port below the ephemeral range: a server binds its port only once its model is loaded, and by then an
    ephemeral port may be in use by some connection."""
    # Not from the random stream of a run.
    for port in random.SystemRandom().sample(FREE_PORTS, TRIES):
        with suppress(UserError):
            return _bind(listener, host, port)
    return _bind(listener, host, 0)


def _bind(listener: socket.socket, host: str, port: int) -> int:
    # As servers do: a port with only lingering connections is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # With this option two sockets may bind one address, but not both listen.
        listener.listen()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"port {port} on {host}: {reason}; give another --port, or 0 for a free one"
        ) from None
    return listener.getsockname()[1]


def server_url(host: str, port: int) -> str:
    """The address at which others reach a server."""
    return f"http://{socket.gethostname() if host == '0.0.0.0' else host}:{port}"
