"""Access control: the API key, the Host header, and the size of request bodies."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from megatron_parallel_r1.serve.admission import Limits
from megatron_parallel_r1.serve.schema import ApiError

# A body that is too long is read and discarded up to this many times the limit: a connection that is closed
# while the client still writes is reset, and the client never reads why.
DISCARD_FACTOR = 16


def is_loopback(host: str) -> bool:
    """Whether a name or address can only mean this machine."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def check_host(request: HttpRequest) -> None:
    """Rejects requests that a web page of another origin sends under its own host name (DNS rebinding).

    Raises:
        ApiError: 403.
    """
    host = request.headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if not is_loopback(name):
        raise ApiError(403, "this server accepts requests to localhost only", code="wrong_host")


def check_key(request: HttpRequest, api_key: str) -> None:
    """Compares the key in constant time.

    Raises:
        ApiError: 401.
    """
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    # Headers arrive as latin-1; a key may be any text.
    same = hmac.compare_digest(sent.strip().encode("latin-1"), api_key.encode())
    if scheme.lower() != "bearer" or not same:
        raise ApiError(
            401,
            "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def read_body(request: HttpRequest, limits: Limits) -> bytes:
    """Reads a JSON body of at most `limits.body_bytes`.

    Raises:
        ApiError: 415, its type is not JSON (a foreign web page cannot send JSON without a preflight); 413, it
            is too long; 408, it does not arrive in time; 400, the client disconnects.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the body as `Content-Type: application/json`")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > DISCARD_FACTOR * limits.body_bytes:
        raise _too_long(limits)
    try:
        return await asyncio.wait_for(_collect(request, limits), limits.body_seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {limits.body_seconds:g} s", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the body is incomplete") from None


async def _collect(request: HttpRequest, limits: Limits) -> bytes:
    body, length = bytearray(), 0
    async for chunk in request.stream():
        length += len(chunk)
        if length <= limits.body_bytes:
            body += chunk
        elif length > DISCARD_FACTOR * limits.body_bytes:
            break
    if length > limits.body_bytes:
        raise _too_long(limits)
    return bytes(body)


def _too_long(limits: Limits) -> ApiError:
    return ApiError(
        413, f"the body is longer than {limits.body_bytes} bytes", headers={"Connection": "close"}
    )
