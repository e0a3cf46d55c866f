"""All errors of an app in one form."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from moe_lightning.server.errors import HttpError, error_body
from moe_lightning.server.responses import Disconnected, JsonResponse


def add_error_handlers(app: FastAPI) -> None:
    """Answer whatever an endpoint raises."""

    @app.exception_handler(HttpError)
    async def http_error(_: Request, error: HttpError) -> Response:
        return JsonResponse(error.body(), error.status, error.all_headers())

    @app.exception_handler(Disconnected)
    async def disconnected(*_: object) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def starlette_error(_: Request, error: HTTPException) -> Response:
        body = error_body(error.status_code, str(error.detail))
        return JsonResponse(body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"])
        return JsonResponse(error_body(400, f"{where}: {found['msg']}"), 400)

    @app.exception_handler(Exception)
    async def failed(*_: object) -> Response:
        return JsonResponse(error_body(500, "the server failed; its log says more", "internal_error"), 500)
