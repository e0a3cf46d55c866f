"""What the batch service refuses, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from moe_lightning.errors import MoELightningError


class HttpError(MoELightningError):
    """What ends a request; `code` is for programs, `retry_after` are seconds."""

    def __init__(self, status: int, message: str, code: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after

    def response(self) -> Response:
        """What the client gets."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        # What a client wrote may be quoted, and need not be valid Unicode.
        message = str(self).encode("utf-8", "backslashreplace").decode()
        error = {"message": message, "type": kind, "param": None, "code": self.code}
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse({"error": error}, self.status, headers)


class StorageFull(HttpError):  # noqa: N818 - says what is the case, and passes by itself
    """The disk takes nothing more; the same may be tried again once there is room."""

    def __init__(self, reason: str | None) -> None:
        super().__init__(
            507, f"the server's disk takes nothing more ({reason}); make room and try again", "storage_full"
        )


class StorageDamaged(HttpError):  # noqa: N818
    """What lies on the disk is not what was written there."""

    def __init__(self, what: str) -> None:
        super().__init__(500, f"{what}; the server's operator has to repair or remove it", "storage_damaged")


class Route(APIRoute):
    """A route whose errors are answered in OpenAI's form, whatever the app around it does with its own."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with errors as responses."""
        handle = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await handle(request)
            except HttpError as error:
                return error.response()
            except RequestValidationError as error:
                return HttpError(400, _first(error), "invalid_value").response()

        return answered


def _first(error: RequestValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"
