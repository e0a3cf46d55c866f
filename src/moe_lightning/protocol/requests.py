"""What a body of /v1/completions or /v1/chat/completions asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_lightning.engine.request import SamplingParams
from moe_lightning.errors import RequestError
from moe_lightning.protocol import fields

Prompt = str | tuple[int, ...]
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class CompletionCall:
    """A checked body of /v1/completions; `model` is None where the body names none."""

    model: str | None
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    echo: bool = False


@dataclass(frozen=True)
class ChatCall:
    """A checked body of /v1/chat/completions; each message has a role, a content and perhaps a name."""

    model: str | None
    messages: tuple[dict[str, str], ...]
    params: SamplingParams


def parse_completion(body: Mapping[str, Any]) -> CompletionCall:
    """The call that a body of /v1/completions makes.

    Raises:
        RequestError: a field is missing, unknown, not supported or out of range; the message names it.
    """
    given = fields.given_fields(body, fields.COMPLETION)
    if "prompt" not in given:
        raise RequestError("prompt is missing; give a string or a list of token ids")
    sampling = _sampling(given)
    sampling["max_tokens"] = fields.typed("max_tokens", given.get("max_tokens", 16), (int,))
    echo = fields.typed("echo", given.get("echo", False), (bool,))
    if "logprobs" in given:
        sampling["logprobs"] = fields.typed("logprobs", given["logprobs"], (int,))
        if echo:  # the echoed prompt comes with log-probabilities of its own
            sampling["prompt_logprobs"] = max(sampling["logprobs"], sampling.get("prompt_logprobs", 0))
    return CompletionCall(_model(given), _prompts(given["prompt"]), SamplingParams(**sampling), echo)


def parse_chat(body: Mapping[str, Any]) -> ChatCall:
    """The call that a body of /v1/chat/completions makes.

    Raises:
        RequestError: a field is missing, unknown, not supported or out of range; the message names it.
    """
    given = fields.given_fields(body, fields.CHAT)
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages={fields.shown(messages)}: give a list of at least one message")
    sampling = _sampling(given)
    sampling["max_tokens"] = _chat_max_tokens(given)
    sampling["logprobs"] = _chat_logprobs(given)
    checked = tuple(_message(i, message) for i, message in enumerate(messages))
    return ChatCall(_model(given), checked, SamplingParams(**sampling))


def _model(given: Mapping[str, Any]) -> str | None:
    return fields.text("model", given["model"]) if "model" in given else None


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {
        name: fields.typed(name, given[name], types)
        for name, types in fields.SAMPLING.items()
        if name in given
    }
    if isinstance(stop := sampling.get("stop"), str):
        sampling["stop"] = fields.text("stop", stop)
    elif stop is not None:
        sampling["stop"] = tuple(fields.text(f"stop[{i}]", s) for i, s in enumerate(stop))
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    return sampling


def _prompts(prompt: Any) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (fields.text("prompt", prompt),)
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(f"prompt={fields.shown(prompt)}: give a string or a list of token ids")
    if isinstance(prompt[0], int):
        return (_token_ids("prompt", prompt),)
    return tuple(
        fields.text(f"prompt[{i}]", p) if isinstance(p, str) else _token_ids(f"prompt[{i}]", p)
        for i, p in enumerate(prompt)
    )


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, list) or not ids:
        raise RequestError(f"{name}={fields.shown(ids)}: give a string or a list of token ids")
    for i, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise RequestError(f"{name}[{i}]={fields.shown(token)}: a token id is an integer from 0")
    return tuple(ids)


def _chat_max_tokens(given: Mapping[str, Any]) -> int | None:
    names = [n for n in ("max_completion_tokens", "max_tokens") if n in given]
    values = {fields.typed(n, given[n], (int,)) for n in names}
    if len(values) > 1:
        raise RequestError(
            f"max_tokens={given['max_tokens']} and max_completion_tokens={given['max_completion_tokens']} "
            "contradict each other; remove max_tokens"
        )
    return values.pop() if values else None


def _chat_logprobs(given: Mapping[str, Any]) -> int | None:
    wanted = fields.typed("logprobs", given.get("logprobs", False), (bool,))
    top = fields.typed("top_logprobs", given.get("top_logprobs", 0), (int,))
    if wanted:
        return int(top)
    if top:
        raise RequestError(f"top_logprobs={top} needs logprobs=true; set it")
    return None


def _message(index: int, message: Any) -> dict[str, str]:
    name = f"messages[{index}]"
    if not isinstance(message, dict):
        raise RequestError(f"{name}={fields.shown(message)}: give an object with role and content")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role not in _ROLES:
        raise RequestError(f"{name}.role={fields.shown(role)} is not supported; use {', '.join(_ROLES)}")
    for key in message.keys() - {"role", "content", "name"}:
        raise RequestError(f"{name}.{key} is not supported; remove it")
    # Chat templates know no developer: it is the newer name of the same role.
    checked = {"role": "system" if role == "developer" else role}
    checked["content"] = _content(f"{name}.content", message.get("content"))
    if "name" in message:
        checked["name"] = fields.text(f"{name}.name", message["name"])
    return checked


def _content(name: str, content: Any) -> str:
    if not isinstance(content, list):
        return fields.text(name, content)
    if not content:
        raise RequestError(f"{name}=[]: give a string or at least one part of type text")
    # Parts are joined by line breaks, as vLLM does.
    return "\n".join(_part(f"{name}[{i}]", part) for i, part in enumerate(content))


def _part(name: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind != "text":
        raise RequestError(f"{name} is of type {fields.shown(kind)}; only parts of type text are supported")
    for key in part.keys() - {"type", "text"}:
        raise RequestError(f"{name}.{key} is not supported; remove it")
    return fields.text(f"{name}.text", part.get("text"))
