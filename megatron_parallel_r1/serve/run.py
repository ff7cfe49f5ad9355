"""`parallel-r1 serve`: loads a release, opens a port, serves."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.serve.limits import Limits

KEY_VARIABLE = "PARALLEL_R1_API_KEY"


def serve(
    checkpoint: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    name: str | None = None,
    device: str | None = None,
    limits: Limits | None = None,
) -> None:
    """Serves until it is interrupted.

    Args:
        port: 0: a free one.
        api_key: default: what the environment variable `PARALLEL_R1_API_KEY` says, if it is set.
        limits: None: the defaults.

    Raises:
        UserError: a package is missing, the checkpoint cannot be read, or the port cannot be had.
    """
    try:
        import uvicorn

        from megatron_parallel_r1.serve.access import is_loopback
        from megatron_parallel_r1.serve.app import make_app
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "starlette"):
            raise
        raise UserError(
            f"serve: {error.name} is not installed; pip install 'megatron_parallel_r1[serve]'"
        ) from None
    from megatron_parallel_r1.serve.served import Served

    key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    if key is not None and not key.strip():
        raise UserError(f"serve: the API key is empty; give one, or unset {KEY_VARIABLE}")
    local = is_loopback(host)
    with _listen(host, port) as listener:
        served = Served.load(checkpoint, name, device)
        app = make_app(served, limits or Limits(), key and key.strip(), local)
        if not local and not key:
            print(f"warning: {host} is open to other machines, and no API key is set", file=sys.stderr)
        shown = f"[{host}]" if ":" in host else host
        print(f"{served.name} thinks at http://{shown}:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=3)
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Before the weights are read: a port that is taken is told at once, and who comes early waits.

    Bound alone it would refuse who asks at once, and Linux would let a second server bind it too.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"serve: cannot listen at {host} port {port} ({reason}); choose another") from None
    return listener
