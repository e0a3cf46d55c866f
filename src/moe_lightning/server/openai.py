"""Endpoints of OpenAI's API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from moe_lightning.protocol.stream_options import StreamOptions, split_stream
from moe_lightning.server import schemas
from moe_lightning.server.errors import HttpError
from moe_lightning.server.responses import EventStream, JsonResponse, unless_disconnected
from moe_lightning.server.service import CHAT, COMPLETIONS, Service, Work


def openai_router(service: Service) -> APIRouter:
    """Completions, chat completions, models."""
    router = APIRouter(tags=["OpenAI"])

    @router.post(COMPLETIONS, **schemas.operation("completions", service.names, service.llm.spec.vocab_size))
    async def completions(request: Request) -> Response:
        """Continue one prompt or several: texts or lists of token ids."""
        return await _respond(service, COMPLETIONS, request)

    @router.post(CHAT, **schemas.operation("chat", service.names, service.llm.spec.vocab_size))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        return await _respond(service, CHAT, request)

    @router.get("/v1/models", **schemas.operation("models"))
    async def models() -> Response:
        """The names that the model answers to."""
        return JsonResponse({"object": "list", "data": [_model(service, name) for name in service.names]})

    @router.get("/v1/models/{name:path}", **schemas.operation("model"))
    async def model(name: str) -> Response:
        """One of them."""
        if name not in service.names:
            raise HttpError(404, f"model {name[:80]!r} is not served here", "model_not_found")
        return JsonResponse(_model(service, name))

    return router


async def _respond(service: Service, url: str, request: Request) -> Response:
    request_id = request.state.request_id

    def parse(body: dict[str, Any]) -> tuple[Work, StreamOptions | None]:
        body, options = split_stream(body)
        return service.work(url, body, request_id), options

    work, options = await service.parsed(request, parse)
    if options is None:
        return JsonResponse(await unless_disconnected(request.receive, service.answer(work)))
    service.desk.check_place(work.requests)  # while the status can still say it
    return EventStream(service.events(work, options), service.limits.write_seconds)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "moe-lightning",
        "root": service.llm.config.model,
        "parent": None,
        "max_model_len": service.llm.max_model_len,
    }
