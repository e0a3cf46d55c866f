"""What a body of /v1/completions or /v1/chat/completions asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moe_lightning.engine.checks import shown, text
from moe_lightning.engine.messages import checked_messages
from moe_lightning.engine.request import SamplingParams
from moe_lightning.errors import RequestError
from moe_lightning.protocol import fields
from moe_lightning.protocol.forms import parse_form

Prompt = str | tuple[int, ...]


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
    sampling = sampling_of(given)
    sampling["max_tokens"] = fields.typed("max_tokens", given.get("max_tokens", 16), (int,))
    echo = fields.typed("echo", given.get("echo", False), (bool,))
    if "logprobs" in given:
        sampling["logprobs"] = fields.typed("logprobs", given["logprobs"], (int,))
    sampling["structured_outputs"] = parse_form(given)
    params = SamplingParams(**sampling)
    if echo and params.logprobs is not None:  # the echoed prompt comes with log-probabilities of its own
        params = replace(params, prompt_logprobs=max(params.logprobs, params.prompt_logprobs or 0))
    return CompletionCall(_model(given), prompts_of("prompt", given["prompt"]), params, echo)


def parse_chat(body: Mapping[str, Any]) -> ChatCall:
    """The call that a body of /v1/chat/completions makes.

    Raises:
        RequestError: a field is missing, unknown, not supported or out of range; the message names it.
    """
    given = fields.given_fields(body, fields.CHAT)
    messages = checked_messages(given.get("messages"))
    sampling = sampling_of(given)
    sampling["max_tokens"] = _chat_max_tokens(given)
    sampling["logprobs"] = _chat_logprobs(given)
    sampling["structured_outputs"] = parse_form(given)
    return ChatCall(_model(given), messages, SamplingParams(**sampling))


def _model(given: Mapping[str, Any]) -> str | None:
    return text("model", given["model"]) if "model" in given else None


def sampling_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling fields among those given, as arguments of `SamplingParams`.

    Raises:
        RequestError: one has the wrong type; the message names it.
    """
    sampling = {
        name: fields.typed(name, given[name], types)
        for name, types in fields.SAMPLING.items()
        if name in given
    }
    if isinstance(stop := sampling.get("stop"), str):
        sampling["stop"] = text("stop", stop)
    elif stop is not None:
        sampling["stop"] = tuple(text(f"stop[{i}]", s) for i, s in enumerate(stop))
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    return sampling


def prompts_of(name: str, prompt: Any) -> tuple[Prompt, ...]:
    """One prompt or several, from a field of that name.

    Raises:
        RequestError: it is neither text nor token ids, nor a list of those.
    """
    if isinstance(prompt, str):
        return (text(name, prompt),)
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(f"{name}={shown(prompt)}: give a string or a list of token ids")
    if isinstance(prompt[0], int):
        return (_token_ids(name, prompt),)
    return tuple(
        text(f"{name}[{i}]", p) if isinstance(p, str) else _token_ids(f"{name}[{i}]", p)
        for i, p in enumerate(prompt)
    )


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, list) or not ids:
        raise RequestError(f"{name}={shown(ids)}: give a string or a list of token ids")
    for i, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise RequestError(f"{name}[{i}]={shown(token)}: a token id is an integer from 0")
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
    top = fields.num_logprobs("top_logprobs", given.get("top_logprobs", 0))
    if wanted:
        return top
    if top:
        raise RequestError(f"top_logprobs={top} needs logprobs=true; set it")
    return None
