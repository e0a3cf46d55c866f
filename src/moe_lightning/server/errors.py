"""Errors as clients get them, in OpenAI's form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


@dataclass
class HttpError(Exception):
    """What ends a request; `code` is for programs, `retry_after` are seconds."""

    status: int
    message: str
    code: str | None = None
    retry_after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The response's body."""
        return error_body(self.status, self.message, self.code)

    def all_headers(self) -> dict[str, str]:
        """The response's own headers."""
        retry = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return retry | self.headers


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """A body that says what is wrong."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code or kind}}
