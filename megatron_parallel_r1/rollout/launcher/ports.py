"""Ports of this machine for servers."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings

# Linux assigns ephemeral ports from 32768 on (net.ipv4.ip_local_port_range).
FREE_PORTS = range(20000, 32000)
TRIES = 50


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
            bind(listener, settings.host, port) if port else bind_free(listener, settings.host)
            for listener, port in zip(listeners, requested, strict=True)
        ]
    finally:
        for listener in listeners:
            listener.close()


def bind_free(listener: socket.socket, host: str) -> int:
    """Binds a port below the ephemeral range, and returns it.

    A server binds its port only once its model is loaded, and by then an ephemeral port may be in use by some
    connection.
    """
    # Not from the random stream of a run.
    for port in random.SystemRandom().sample(FREE_PORTS, TRIES):
        with suppress(UserError):
            return bind(listener, host, port)
    return bind(listener, host, 0)


def free_port(host: str = "127.0.0.1") -> int:
    """A port below the ephemeral range that nothing listens on now."""
    with socket.socket() as listener:
        return bind_free(listener, host)


def bind(listener: socket.socket, host: str, port: int) -> int:
    """Binds a port, and returns it.

    Raises:
        UserError: it is taken.
    """
    # As servers do: a port with only lingering connections is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # With this option two sockets may bind one address, but not both listen.
        listener.listen()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"port {port} on {host}: {reason}; give another port, or --port 0 for a free one"
        ) from None
    return listener.getsockname()[1]
