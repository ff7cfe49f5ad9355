"""Where servers run: the engine's interpreter, their GPUs, their ports."""

from __future__ import annotations

import importlib.util
import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import Device, LaunchSettings

# Linux gives those from 32768 on (net.ipv4.ip_local_port_range).
FREE_PORTS = range(20000, 32000)
TRIES = 50


def find_python(serving: LaunchSettings) -> Path:
    """The interpreter that has the engine.

    Raises:
        UserError: there is none.
    """
    if serving.python is not None:
        if not os.access(serving.python, os.X_OK):
            raise UserError(
                f"{serving.python}: no such interpreter; give --python one that has {serving.engine}"
            )
        return serving.python
    checkout = Path(__file__).resolve().parents[3]
    made = checkout / f".venv-{serving.engine}"
    if (made / "ready").exists():
        return made / "bin" / "python"
    if importlib.util.find_spec(serving.engine) is not None:
        return Path(sys.executable)
    raise UserError(
        f"no environment with {serving.engine} ({made}): run `make engines` in {checkout}, or give --python"
    )


def visible_gpus() -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES names them; none if there is no GPU."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return tuple(name.strip() for name in told.split(",") if name.strip() not in ("", "-1"))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except FileNotFoundError:
        return ()
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return tuple(str(index) for index in range(sum(line.startswith("GPU ") for line in lines)))


def assign_gpus(serving: LaunchSettings, visible: tuple[str, ...]) -> tuple[Device, list[tuple[str, ...]]]:
    """The device, and the GPUs of each server.

    Raises:
        UserError: there are too few.
    """
    device = serving.device or ("cuda" if visible else "cpu")
    if device == "cpu":
        return device, [()] * serving.servers
    each = serving.tensor * serving.data
    if serving.servers * each > len(visible):
        raise UserError(
            f"{serving.servers} servers of {each} GPUs need {serving.servers * each}, visible are "
            f"{len(visible)}; lower --servers, --tp or --dp, or give --device cpu"
        )
    return device, [visible[index * each : (index + 1) * each] for index in range(serving.servers)]


def pick_ports(serving: LaunchSettings) -> list[int]:
    """One for each server, all of them free now.

    Raises:
        UserError: one is taken.
    """
    wanted = [serving.port + index if serving.port else 0 for index in range(serving.servers)]
    listeners = [socket.socket() for _ in wanted]
    try:
        # All are held until the last is known, or two servers could get the same free one.
        return [
            _bind(listener, serving.host, port) if port else _bind_free(listener, serving.host)
            for listener, port in zip(listeners, wanted, strict=True)
        ]
    finally:
        for listener in listeners:
            listener.close()


def _bind_free(listener: socket.socket, host: str) -> int:
    """A port below those that the kernel gives to whoever asks for any: a server binds its own only when its
    model is loaded, and by then such a one may be the near end of somebody's connection."""
    # Not of the stream that a run draws from.
    for port in random.SystemRandom().sample(FREE_PORTS, TRIES):
        with suppress(UserError):
            return _bind(listener, host, port)
    return _bind(listener, host, 0)


def _bind(listener: socket.socket, host: str, port: int) -> int:
    # As servers do: a port whose last connections only linger is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Two sockets may be bound to one address so; not two that listen.
        listener.listen()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"port {port} on {host}: {reason}; give another --port, or 0 for a free one"
        ) from None
    return listener.getsockname()[1]


def server_url(host: str, port: int) -> str:
    """How others reach a server that listens there."""
    return f"http://{socket.gethostname() if host == '0.0.0.0' else host}:{port}"
