"""Endpoints for those who run the server: health, metrics, what it is, the page."""

from __future__ import annotations

import asyncio
from importlib.resources import files

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from moe_lightning.server import schemas
from moe_lightning.server.errors import HttpError
from moe_lightning.server.info import Info
from moe_lightning.server.metrics import EngineCollector
from moe_lightning.server.responses import JsonResponse

# The page is one file: nothing comes from elsewhere, and nothing goes there.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def operate_router(info: Info) -> APIRouter:
    """Health, readiness, metrics, server info, the page at /."""
    router = APIRouter(tags=["Operation"])
    registry = info.service.watch.registry
    registry.register(EngineCollector(info))
    page = files("moe_lightning.server").joinpath("page.html").read_bytes()

    @router.get("/health", **schemas.operation("health"))
    async def health() -> Response:
        """Whether the process lives; if not, restart it."""
        if info.engine.broken:
            raise HttpError(503, "the engine is out of order; restart the server", "engine_broken")
        return JsonResponse({"status": "ok"})

    @router.get("/health/ready", **schemas.operation("ready"))
    async def ready() -> Response:
        """Whether requests are taken; if not, send them elsewhere for a while."""
        if not info.is_ready:
            raise HttpError(503, "no requests are taken now", "not_ready", info.service.desk.retry_after)
        return JsonResponse({"status": "ok"})

    @router.get("/get_server_info", **schemas.operation("info"))
    async def server_info() -> Response:
        """Settings, plan, load, lanes, throughput over time."""
        return JsonResponse(info.describe())

    @router.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        """Measurements for Prometheus."""
        # Text of some hundred lines: not while others wait for their tokens.
        body = await asyncio.to_thread(generate_latest, registry)
        return Response(body, media_type=CONTENT_TYPE_LATEST)

    @router.get("/", include_in_schema=False)
    async def root() -> Response:
        """The page."""
        headers = {"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    return router
