"""`parallel-r1 serve`: opens a port, loads a release and serves it."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.serve.admission import Limits

if TYPE_CHECKING:
    from megatron_parallel_r1.serve.engines import EngineChoice

KEY_VARIABLE = "PARALLEL_R1_API_KEY"
BACKLOG = 2048


def serve(
    checkpoint: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    name: str | None = None,
    device: str | None = None,
    limits: Limits | None = None,
    drain: float = 20.0,
    engine: EngineChoice | None = None,
) -> None:
    """Serves until it is interrupted.

    Args:
        port: 0 picks a free port.
        api_key: default: the environment variable `PARALLEL_R1_API_KEY`, if it is set.
        name: of the model in the API; default: the folder's.
        device: default: the GPU, if there is one.
        limits: None: the defaults.
        drain: time for requests under way to end after SIGTERM, in seconds.
        engine: None: the native one.

    Raises:
        UserError: a package is missing, the checkpoint cannot be read, or the port is not available.
    """
    try:
        import uvicorn

        from megatron_parallel_r1.serve.access import is_loopback
        from megatron_parallel_r1.serve.app import make_app
        from megatron_parallel_r1.serve.drain import Drain, DrainingServer
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "starlette"):
            raise
        raise UserError(
            f"serve: {error.name} is not installed; pip install 'megatron_parallel_r1[serve]'"
        ) from None
    from megatron_parallel_r1.serve.engines import EngineChoice, opened_model

    key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    if key is not None and not key.strip():
        raise UserError(f"serve: the API key is empty; give one, or unset {KEY_VARIABLE}")
    local = is_loopback(host)
    choice = engine or EngineChoice()
    with _listen(host, port) as listener, opened_model(checkpoint, name, device, choice) as served:
        draining = Drain()
        app = make_app(served, limits or Limits(), key and key.strip(), local, draining)
        if not local and not key:
            print(f"warning: {host} is open to other machines, and no API key is set", file=sys.stderr)
        address = f"[{host}]" if ":" in host else host
        print(f"{served.name} thinks at http://{address}:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, log_level="warning", server_header=False)
        DrainingServer(config, draining, drain).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Listens before the weights are read: a taken port fails at once, and early clients wait.

    A socket that is only bound refuses connections, and Linux lets a second server bind it too.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small packets at once (TCP_NODELAY) only where a socket names its protocol; otherwise the
    # first event of a stream waits 40 ms for the client's acknowledgement of the headers.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"serve: cannot listen at {host} port {port} ({reason}); choose another") from None
    return listener
