"""What a client is told when it does not get an answer, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A request that is not answered.

    Attributes:
        status: the HTTP status; 4xx: the client can mend it, 503: it may ask again later.
        param: the field at fault.
        code: for programs.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
