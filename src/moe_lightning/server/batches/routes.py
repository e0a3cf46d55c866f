"""The HTTP routes of files and batches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from moe_lightning.server.batch_limits import BatchLimits
from moe_lightning.server.batches.objects import Batch, CreateBatch, FileDeleted, FileObject, Page
from moe_lightning.server.errors import HttpError

if TYPE_CHECKING:
    from moe_lightning.server.batches.service import BatchService

_CHUNK_BYTES = 2**18
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is refused", "content": {"application/json": {"schema": _ERROR}}},
    "5XX": {"description": "The server is failing", "content": {"application/json": {"schema": _ERROR}}},
}
_After = Annotated[str | None, Query(description="Id of the last object of the page before", max_length=64)]


def make_router(service: BatchService) -> APIRouter:
    """All routes."""
    router = APIRouter(prefix="/v1", responses=_RESPONSES)
    _add_files(router, service)
    _add_batches(router, service)
    return router


def _add_files(router: APIRouter, service: BatchService) -> None:
    form = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}

    @router.post("/files", openapi_extra=form, tags=["files"])
    async def upload_file(request: Request) -> FileObject:
        _refuse_other_sites(request)
        return await service.files.upload(request.stream(), request.headers.get("content-type", ""))

    @router.get("/files", tags=["files"])
    async def list_files(
        after: _After = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: Annotated[str | None, Query(max_length=64)] = None,
    ) -> Page[FileObject]:
        return await service.files.list(after, limit, newest_first=order == "desc", purpose=purpose)

    @router.get("/files/{file_id}", tags=["files"])
    async def get_file(file_id: str) -> FileObject:
        return await service.files.get(file_id)

    content: dict[int | str, dict[str, Any]] = {
        200: {"description": "The file", "content": {"application/octet-stream": {}}}
    }

    @router.get(
        "/files/{file_id}/content", response_class=StreamingResponse, responses=content, tags=["files"]
    )
    async def get_file_content(file_id: str) -> StreamingResponse:
        file, opened = await service.files.content(file_id)
        headers = {
            "Content-Length": str(file.bytes),
            "Content-Disposition": f'attachment; filename="{file.id}"',
            "X-Content-Type-Options": "nosniff",  # what a client uploaded is no page of ours
        }
        return StreamingResponse(
            _pieces(opened, file.bytes), headers=headers, media_type="application/octet-stream"
        )

    @router.delete("/files/{file_id}", tags=["files"])
    async def delete_file(file_id: str) -> FileDeleted:
        await service.files.delete(file_id)
        return FileDeleted(id=file_id)


def _add_batches(router: APIRouter, service: BatchService) -> None:
    schema = CreateBatch.model_json_schema(ref_template="#/components/schemas/{model}")
    schema["properties"]["output_expires_after"] = {
        "anyOf": [schema.pop("$defs")["Expiry"], {"type": "null"}], "default": None
    }  # fmt: skip
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @router.post("/batches", openapi_extra=body, tags=["batches"])
    async def create_batch(request: Request) -> Batch:
        return await service.create(await _wanted(request, service.limits))

    @router.get("/batches", tags=["batches"])
    async def list_batches(
        after: _After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> Page[Batch]:
        return await service.list(after, limit)

    @router.get("/batches/{batch_id}", tags=["batches"])
    async def get_batch(batch_id: str) -> Batch:
        return await service.get(batch_id)

    @router.post("/batches/{batch_id}/cancel", tags=["batches"])
    async def cancel_batch(batch_id: str) -> Batch:
        return await service.cancel(batch_id)


async def _wanted(request: Request, limits: BatchLimits) -> CreateBatch:
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise HttpError(415, "send the batch as application/json", "invalid_content_type")
    raw = b""
    try:
        async with asyncio.timeout(limits.order_seconds):
            async for piece in request.stream():
                raw += piece
                if len(raw) > limits.order_bytes:
                    raise HttpError(
                        413, f"the body is larger than {limits.order_bytes} bytes", "body_too_large"
                    )
    except TimeoutError:
        raise HttpError(
            408, f"the body did not come within {limits.order_seconds:g} s", "slow_body"
        ) from None
    try:
        return CreateBatch.model_validate_json(raw)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise HttpError(400, f"{where}: {first['msg']}", "invalid_value") from None


def _refuse_other_sites(request: Request) -> None:
    # A browser sends a form from any page to any server, this one on loopback too.
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise HttpError(403, "uploads from pages of other sites are refused", "other_site")


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    with file:
        while size and (piece := file.read(min(size, _CHUNK_BYTES))):
            size -= len(piece)
            yield piece
