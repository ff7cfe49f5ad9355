"""`parallel-r1 serve-rollout`: places and runs rollout servers of a checkpoint until SIGTERM or SIGINT."""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import Device, LaunchSettings, build_command
from megatron_parallel_r1.rollout.launcher.guard import SUPPORTED
from megatron_parallel_r1.rollout.launcher.nodes import FirstPart, PartsRendezvous, check_nodes, serve_part
from megatron_parallel_r1.rollout.launcher.ports import pick_ports
from megatron_parallel_r1.rollout.launcher.supervisor import ServerProcess, Supervisor
from megatron_parallel_r1.utils.api_key import read_key
from megatron_parallel_r1.utils.files import write_atomically

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})


def serve_rollout(settings: LaunchSettings, tell: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then ends all servers and returns. For the main thread.

    Of one server over several machines, the first one's process decides, and writes `urls_file`.

    Args:
        tell: receives a line about each server that becomes healthy, crashes or hangs.

    Raises:
        UserError: the servers cannot be started, or one crashes repeatedly.
    """
    children = build_servers(settings)
    if settings.node_rank:
        with _until_signal() as stopped:
            serve_part(settings, children[0], tell, stopped)
        return
    urls_file, written = settings.urls_file, False
    if urls_file is not None:
        urls_file.unlink(missing_ok=True)
    with _until_signal() as stopped, ExitStack() as stack:
        try:
            if settings.nodes > 1:
                rendezvous = stack.enter_context(PartsRendezvous(settings))
                children = [FirstPart(child, rendezvous) for child in children]
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
    key = read_key(settings.key_variable, settings.key_file)
    return [
        ServerProcess(
            build_command(settings, python, device, port, gpus[index], key),
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
    check_nodes(settings)
    if settings.isolated and settings.engine != "sglang":
        raise UserError(
            f"isolated: {settings.engine} cannot join isolated paths exactly; give --engine sglang"
        )
    read_key(settings.key_variable, settings.key_file)
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
    gpus = settings.tensor * settings.data // settings.nodes
    if settings.servers * gpus > len(visible):
        raise UserError(
            f"{settings.servers} servers of {gpus} GPUs need {settings.servers * gpus}, and "
            f"{len(visible)} are visible; lower --servers, --tp or --dp, start one server over "
            "several --nodes, or give --device cpu"
        )
    return device, [visible[index * gpus : (index + 1) * gpus] for index in range(settings.servers)]


def server_url(host: str, port: int) -> str:
    """The address at which others reach a server."""
    return f"http://{socket.gethostname() if host == '0.0.0.0' else host}:{port}"
