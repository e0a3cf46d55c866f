"""The messages of a conversation, checked before a chat template sees them.

Templates are lenient: of a misspelled or unknown key they make an empty message, and the model answers that.
"""

from __future__ import annotations

from typing import Any

from moe_lightning.engine.checks import name_of, shown, text
from moe_lightning.errors import RequestError

_ROLES = ("system", "developer", "user", "assistant")


def checked_messages(messages: Any) -> tuple[dict[str, str], ...]:
    """Messages with a role, a content and perhaps a name each; checked ones pass unchanged.

    Raises:
        RequestError: there is none, or one has what is not supported; the error names the field.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError(f"messages={shown(messages)}: give a list of at least one message")
    return tuple(_message(i, message) for i, message in enumerate(messages))


def _message(index: int, message: Any) -> dict[str, str]:
    name = f"messages[{index}]"
    if not isinstance(message, dict):
        raise RequestError(f"{name}={shown(message)}: give an object with role and content")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role not in _ROLES:
        raise RequestError(f"{name}.role={shown(role)} is not supported; use {', '.join(_ROLES)}")
    for key in message.keys() - {"role", "content", "name"}:
        raise RequestError(f"{name_of(name, key)} is not supported; remove it")
    # Chat templates know no developer: it is the newer name of the same role.
    checked = {"role": "system" if role == "developer" else role}
    checked["content"] = _content(f"{name}.content", message.get("content"))
    if "name" in message:
        checked["name"] = text(f"{name}.name", message["name"])
    return checked


def _content(name: str, content: Any) -> str:
    if not isinstance(content, list):
        return text(name, content)
    if not content:
        raise RequestError(f"{name}=[]: give a string or at least one part of type text")
    # Parts are joined by line breaks, as vLLM does.
    return "\n".join(_part(f"{name}[{i}]", part) for i, part in enumerate(content))


def _part(name: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind != "text":
        raise RequestError(f"{name} is of type {shown(kind)}; only parts of type text are supported")
    for key in part.keys() - {"type", "text"}:
        raise RequestError(f"{name_of(name, key)} is not supported; remove it")
    return text(f"{name}.text", part.get("text"))
