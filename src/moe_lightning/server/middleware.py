"""What every request passes: its id, the name of the host, the key, and how many there may be."""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_lightning.server.errors import HttpError
from moe_lightning.server.hosts import is_allowed
from moe_lightning.server.limits import Limits
from moe_lightning.server.responses import JsonResponse

# Without a key: probes, which say nothing of the model, and a page that has no data of its own.
OPEN_PATHS = frozenset({"/", "/health", "/health/ready"})
_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """Gives each request an id, asks for the key, and refuses what is too much or meant for another host.

    Args:
        app: what comes after.
        limits: how many requests may be in progress.
        api_key: that clients have to send; None for none.
        hosts: names that the server is called by, as `allowed_names` gives them; None for any.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, api_key: str | None = None, hosts: Sequence[str] | None = None
    ) -> None:
        self._app = app
        self._limits, self._hosts = limits, hosts
        self._key = None if api_key is None else api_key.encode()
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self._num_open += 1
        try:
            refusal = self._refusal(scope["path"], headers)
            if refusal is None:
                await self._app(scope, receive, send_with_id)
            else:
                response = JsonResponse(refusal.body(), refusal.status, refusal.all_headers())
                await response(scope, receive, send_with_id)
        finally:
            self._num_open -= 1

    def _refusal(self, path: str, headers: Headers) -> HttpError | None:
        if self._hosts is not None and not is_allowed(host := headers.get("host", ""), self._hosts):
            message = f"host {host[:80]!r} is not served here; start the server with --allowed-hosts"
            return HttpError(421, message, "unknown_host")
        if path in OPEN_PATHS:
            return None
        if self._key is not None and not hmac.compare_digest(_given_key(headers), self._key):
            message = "give the server's API key: Authorization: Bearer KEY"
            return HttpError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self._num_open > self._limits.max_connections:
            return HttpError(503, "too many requests at a time; send it again later", "busy", retry_after=1)
        return None


def _request_id(given: str) -> str:
    """The client's own id if it can stand in a header and a log, else a new one."""
    return given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def _given_key(headers: Headers) -> bytes:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
