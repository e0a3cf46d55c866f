"""The endpoint /generate: SGLang's native form."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from moe_lightning.protocol.native import NativeCall, native_answers, native_meta, parse_generate
from moe_lightning.server import schemas
from moe_lightning.server.engine_thread import Update
from moe_lightning.server.responses import EventStream, JsonResponse, unless_disconnected
from moe_lightning.server.service import Service, Work


def native_router(service: Service) -> APIRouter:
    """Generate."""
    router = APIRouter(tags=["SGLang"])

    @router.post("/generate", **schemas.operation("generate", service.names, service.llm.spec.vocab_size))
    async def generate(request: Request) -> Response:
        """Continue one prompt or several."""
        request_id = request.state.request_id

        def parse(body: dict[str, Any]) -> tuple[NativeCall, Work]:
            call = parse_generate(body)
            return call, service.work_of(call, request_id)

        call, work = await service.parsed(request, parse)
        rid = call.rid or request_id
        if not call.is_stream:
            return JsonResponse(await unless_disconnected(request.receive, _answer(service, call, work, rid)))
        service.desk.check_place(work.requests)
        return EventStream(_events(service, call, work, rid), service.limits.write_seconds)

    return router


async def _answer(service: Service, call: NativeCall, work: Work, rid: str) -> Any:
    start = time.monotonic()
    outputs = await service.outputs(work)
    seconds = time.monotonic() - start
    answers = [
        answer
        for i, output in enumerate(outputs)
        for answer in native_answers(call, output, _name(call, rid, i), seconds, service.decode)
    ]
    return answers if call.is_list or call.params.n > 1 else answers[0]


async def _events(
    service: Service, call: NativeCall, work: Work, rid: str
) -> AsyncGenerator[list[dict[str, Any]], None]:
    """Each event has all of an answer that there is so far."""
    texts: dict[tuple[int, int], str] = {}
    async with aclosing(service.news(work)) as stream:
        async for news in stream:
            yield [event for i, update in news for event in _grown(service, call, i, update, rid, texts)]


def _grown(
    service: Service, call: NativeCall, position: int, update: Update, rid: str,
    texts: dict[tuple[int, int], str],
) -> list[dict[str, Any]]:  # fmt: skip
    events = []
    answers = {answer.index: answer for answer in update.output.outputs}
    for piece in update.pieces:
        key = position, piece.index
        texts[key] = texts.get(key, "") + piece.text
        answer = replace(answers[piece.index], text=texts[key])
        meta = native_meta(call, update.output, answer, _name(call, rid, position), service.decode)
        event: dict[str, Any] = {"text": texts[key], "output_ids": list(answer.token_ids), "meta_info": meta}
        if call.is_list or call.params.n > 1:
            event["index"] = position * call.params.n + piece.index
        events.append(event)
    return events


def _name(call: NativeCall, rid: str, position: int) -> str:
    return f"{rid}-{position}" if call.is_list else rid
