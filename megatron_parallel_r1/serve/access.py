"""Who may ask: the API key, the host that a browser believes to speak to, and bodies of a bearable size."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from megatron_parallel_r1.serve.api_error import Refused
from megatron_parallel_r1.serve.limits import Limits

# Times the limit: so much of a body that is too long is read and thrown away. A connection that is closed
# while the client still writes is reset, and the client never reads why.
DISCARDED = 16


def is_loopback(host: str) -> bool:
    """Whether a name or address can only mean this machine."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def check_host(request: HttpRequest) -> None:
    """Refuses what a foreign page sends to this machine under its own name (DNS rebinding).

    Raises:
        Refused: 403.
    """
    host = request.headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if not is_loopback(name):
        raise Refused(403, "this server is for its own machine: ask localhost", code="wrong_host")


def check_key(request: HttpRequest, api_key: str) -> None:
    """Compares in a time that does not depend on where the keys differ.

    Raises:
        Refused: 401.
    """
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers arrive as latin-1; a key may be any text.
    same = hmac.compare_digest(given.strip().encode("latin-1"), api_key.encode())
    if scheme.lower() != "bearer" or not same:
        raise Refused(
            401,
            "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def read_body(request: HttpRequest, limits: Limits) -> bytes:
    """A JSON body, read no further than the limit.

    Raises:
        Refused: 415, it is not called JSON (which a foreign web page may not call it unasked); 413, it is too
            long; 408, it does not come; 400, the client went away.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send the body as `Content-Type: application/json`")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > DISCARDED * limits.body_bytes:
        raise _too_long(limits)
    try:
        return await asyncio.wait_for(_collect(request, limits), limits.body_seconds)
    except asyncio.TimeoutError:
        raise Refused(
            408, f"the body did not come within {limits.body_seconds:g} s", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise Refused(400, "the body ended before its end") from None


async def _collect(request: HttpRequest, limits: Limits) -> bytes:
    body, length = bytearray(), 0
    async for piece in request.stream():
        length += len(piece)
        if length <= limits.body_bytes:
            body += piece
        elif length > DISCARDED * limits.body_bytes:
            break
    if length > limits.body_bytes:
        raise _too_long(limits)
    return bytes(body)


def _too_long(limits: Limits) -> Refused:
    return Refused(413, f"the body is longer than {limits.body_bytes} bytes", headers={"Connection": "close"})
