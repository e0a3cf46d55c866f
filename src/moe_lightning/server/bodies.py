"""Bodies of requests, read within bounds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from moe_lightning.engine.checks import shown
from moe_lightning.server.errors import HttpError
from moe_lightning.server.limits import Limits


class BodyReader:
    """Reads JSON bodies; knows how many bytes all of them hold that are not made into requests yet."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body, which must be declared as JSON; until the block ends it counts as held.

        Raises:
            HttpError: the body is declared as something else, too large, or comes too slowly.
        """
        content_type = request.headers.get("content-type", "")
        if content_type.split(";")[0].strip().lower() != "application/json":
            # Browsers send other types from any page to any server without asking it.
            raise HttpError(415, f"Content-Type {shown(content_type)}: send application/json", "content_type")
        parts: list[bytes] = []
        try:
            await self._read(request, parts)
            parts[:] = [b"".join(parts)]  # its bytes once, not twice
            yield parts[0]
        finally:
            self._held -= sum(map(len, parts))

    async def _read(self, request: Request, parts: list[bytes]) -> None:
        limit, size = self._limits.max_body_bytes, 0
        if _declared(request) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    self._held += len(part)
                    if size > limit:
                        raise _too_large(limit)
                    if self._held > self._limits.max_bodies_bytes:
                        raise HttpError(
                            503, "too many large requests; send it again later", "busy", retry_after=1
                        )
        except TimeoutError:
            raise HttpError(
                408, f"the body did not come within {self._limits.body_seconds:g} s", "slow_body"
            ) from None
        except ClientDisconnect:
            raise HttpError(400, "the connection ended within the body", "disconnected") from None


def _declared(request: Request) -> int:
    length = request.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body is larger than {limit} bytes; split the request", "body_too_large")


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that bytes are.

    Raises:
        HttpError: they are none.
    """
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _bad_json(f"the body is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _bad_json("the body is nested too deeply; flatten it") from None
    except ValueError as error:
        raise _bad_json(f"the body is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise _bad_json(f"the body is {shown(value)}; send an object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _bad_json(message: str) -> HttpError:
    return HttpError(400, message, "invalid_json")
