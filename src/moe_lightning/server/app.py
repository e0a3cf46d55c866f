"""The application: a loaded model as an ASGI app."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastapi import FastAPI

from moe_lightning import __version__
from moe_lightning.llm import LLM
from moe_lightning.perf.outlook import Prediction
from moe_lightning.server.batch_limits import BatchLimits
from moe_lightning.server.batches import BatchService
from moe_lightning.server.desk import Desk
from moe_lightning.server.engine_thread import EngineThread
from moe_lightning.server.handlers import add_error_handlers
from moe_lightning.server.info import Info
from moe_lightning.server.limits import Limits
from moe_lightning.server.metrics import BatchCollector
from moe_lightning.server.middleware import Gate
from moe_lightning.server.native import native_router
from moe_lightning.server.openai import openai_router
from moe_lightning.server.operate import operate_router
from moe_lightning.server.service import Service
from moe_lightning.server.tokens import tokens_router
from moe_lightning.server.watch import Watch


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    `names` are what clients may call it, `prediction` is what its plan should reach, and `data_dir` is where files
    and batches are kept, None for none, within `batch_limits`. `hosts` are the names that the server is called by,
    None for any.
    """

    names: Sequence[str] = ()
    api_key: str | None = None
    limits: Limits = field(default_factory=Limits)
    prediction: Prediction | None = None
    data_dir: Path | None = None
    batch_limits: BatchLimits = field(default_factory=BatchLimits)
    hosts: Sequence[str] | None = None


def create_app(llm: LLM, settings: Settings | None = None) -> FastAPI:
    """An app that serves a model; its engine runs from the app's start-up to its shut-down.

    `app.state.service` is what the endpoints share, `app.state.engine` the engine's thread.
    """
    settings = settings or Settings()
    llm.answer_in_order()
    watch = Watch(llm)
    engine = EngineThread(llm.engine, watch.on_change)
    desk = Desk(engine, settings.limits, llm.policy.max_num_seqs, lambda: watch.load.pass_seconds)
    service = Service(llm, desk, settings.limits, watch, settings.names or (llm.model_name,))
    batches = None
    if settings.data_dir is not None:
        bounds = replace(settings.batch_limits, order_seconds=settings.limits.body_seconds)
        batches = BatchService(settings.data_dir, service.answer_body, bounds)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start(asyncio.get_running_loop())
        try:
            if batches is not None:
                await batches.start()
            yield
        finally:
            if batches is not None:
                await batches.stop()
            service.close()
            # A pass may take seconds: others may still be told that the server closes.
            await asyncio.to_thread(engine.stop)

    app = FastAPI(
        title="MoE-Lightning", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service, app.state.engine = service, engine
    for router in (
        openai_router(service),
        tokens_router(service),
        native_router(service),
        operate_router(Info(service, engine, settings.prediction)),
    ):
        app.include_router(router)
    if batches is not None:
        app.include_router(batches.router())
        watch.registry.register(BatchCollector(service.names[0], batches))
    add_error_handlers(app)
    app.add_middleware(Gate, limits=settings.limits, api_key=settings.api_key, hosts=settings.hosts)
    return app
