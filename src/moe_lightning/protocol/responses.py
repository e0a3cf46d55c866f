"""Response bodies of /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from moe_lightning.engine.request import CompletionOutput, Logprob, Logprobs, RequestOutput
from moe_lightning.protocol.requests import ChatCall, CompletionCall

Decode = Callable[[Sequence[int]], str]


class Scored(Protocol):
    """Tokens with their log-probabilities: of a whole answer or of a piece of it."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What was generated."""
        ...

    @property
    def logprobs(self) -> list[Logprobs] | None:
        """An entry for each token."""
        ...


_LOWEST_LOGPROB = -9999.0  # vLLM's floor: JSON has no -Infinity and no NaN


def completion_response(
    call: CompletionCall,
    outputs: Sequence[RequestOutput],
    *,
    response_id: str,
    model: str,
    created: int,
    decode: Decode,
) -> dict[str, Any]:
    """Body that answers `call`; `outputs` has one entry per prompt, `decode` turns token ids into text."""
    choices = [
        _completion_choice(call, output, completion, position * call.params.n + completion.index, decode)
        for position, output in enumerate(outputs)
        for completion in output.outputs
    ]
    return _body(response_id, "text_completion", model, created, choices, outputs)


def chat_response(
    call: ChatCall,
    output: RequestOutput,
    *,
    response_id: str,
    model: str,
    created: int,
    decode: Decode,
) -> dict[str, Any]:
    """Body that answers `call`; `decode` turns token ids into text."""
    top = call.params.logprobs
    choices = [
        {
            "index": c.index,
            "message": {"role": "assistant", "content": c.text, "refusal": None},
            "logprobs": None if top is None else chat_logprobs(c, top, decode),
            "finish_reason": c.finish_reason,
        }
        for c in output.outputs
    ]
    body = _body(response_id, "chat.completion", model, created, choices, [output])
    if call.params.prompt_logprobs is not None:
        body["prompt_logprobs"] = _prompt_logprobs(output, decode)
    return body


def _body(
    response_id: str,
    kind: str,
    model: str,
    created: int,
    choices: list[dict[str, Any]],
    outputs: Iterable[RequestOutput],
) -> dict[str, Any]:
    outputs = list(outputs)
    num_prompt = sum(len(o.prompt_token_ids) for o in outputs)
    num_generated = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    return {
        "id": response_id,
        "object": kind,
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage(num_prompt, num_generated),
    }


def usage(num_prompt: int, num_generated: int) -> dict[str, int]:
    """How many tokens went in and came out."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }


def prompt_text(output: RequestOutput, decode: Decode) -> str:
    """The prompt as it was given, or its tokens' text."""
    return output.prompt if output.prompt is not None else decode(output.prompt_token_ids)


def _completion_choice(
    call: CompletionCall, output: RequestOutput, completion: CompletionOutput, index: int, decode: Decode
) -> dict[str, Any]:
    prompt, logprobs = "", None
    if call.echo or call.params.logprobs is not None:
        prompt = prompt_text(output, decode)
    if call.params.logprobs is not None:
        tokens, entries = completion.token_ids, list[Logprobs | None](completion.logprobs or [])
        start = len(prompt)
        if call.echo:
            tokens = output.prompt_token_ids + tokens
            entries = (output.prompt_logprobs or [None] * len(output.prompt_token_ids)) + entries
            start = 0
        logprobs = completion_logprobs(tokens, entries, start, decode)
    choice = {
        "index": index,
        "text": prompt + completion.text if call.echo else completion.text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }
    if call.params.prompt_logprobs is not None:
        choice["prompt_logprobs"] = _prompt_logprobs(output, decode)
    return choice


def completion_logprobs(
    tokens: Sequence[int], entries: Sequence[Logprobs | None], start: int, decode: Decode
) -> dict[str, Any]:
    """The four parallel lists of /v1/completions; offsets count characters from the start of the prompt."""
    texts, values, tops, offsets = [], [], [], []
    for token, entry in zip(tokens, entries, strict=True):
        own = entry.get(token) if entry else None
        texts.append(_token_text(token, own, decode))
        values.append(_finite(own.logprob) if own else None)
        tops.append(_top_by_text(entry, decode) if entry else None)
        offsets.append(start)
        start += len(texts[-1])
    return {"text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": tops}


def _top_by_text(entry: Logprobs, decode: Decode) -> dict[str, float]:
    top: dict[str, float] = {}
    for token, logprob in _by_rank(entry):
        # Several tokens can have one text (parts of a character): the likeliest of them stands for all.
        top.setdefault(_token_text(token, logprob, decode), _finite(logprob.logprob))
    return top


def chat_logprobs(completion: Scored, top: int, decode: Decode) -> dict[str, Any]:
    """The field of /v1/chat/completions: each token with the `top` likeliest."""
    content = []
    for token, entry in zip(completion.token_ids, completion.logprobs or [], strict=True):
        likeliest = [_chat_token(t, p, decode) for t, p in _by_rank(entry) if p.rank <= top]
        content.append(_chat_token(token, entry[token], decode) | {"top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def _chat_token(token: int, logprob: Logprob, decode: Decode) -> dict[str, Any]:
    text = _token_text(token, logprob, decode)
    # A token that is a part of a character has no text of its own, and its bytes are not known here.
    data = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": _finite(logprob.logprob), "bytes": data}


def _prompt_logprobs(output: RequestOutput, decode: Decode) -> list[dict[str, Any] | None] | None:
    """The field that vLLM adds: per prompt token, token id -> logprob, rank and text; null for the first."""
    if output.prompt_logprobs is None:
        return None
    return [None if entry is None else _ranked(entry, decode) for entry in output.prompt_logprobs]


def _ranked(entry: Logprobs, decode: Decode) -> dict[str, Any]:
    return {
        str(token): {
            "logprob": _finite(p.logprob),
            "rank": p.rank,
            "decoded_token": _token_text(token, p, decode),
        }
        for token, p in _by_rank(entry)
    }


def _by_rank(entry: Logprobs) -> list[tuple[int, Logprob]]:
    return sorted(entry.items(), key=lambda item: item[1].rank)


def _token_text(token: int, logprob: Logprob | None, decode: Decode) -> str:
    if logprob is not None and logprob.decoded_token is not None:
        return logprob.decoded_token
    return decode([token])


def _finite(logprob: float) -> float:
    return logprob if logprob >= _LOWEST_LOGPROB else _LOWEST_LOGPROB
