"""What the OpenAPI document says of each endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_lightning.server.body_schemas import ANY, COUNT, TEXT, Schema, array_of, bodies, object_of

_USAGE = object_of(
    {name: COUNT for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
    ("prompt_tokens", "completion_tokens", "total_tokens"),
)


def _choices(kind: str, own: str, schema: Schema) -> Schema:
    choice = object_of(
        {"index": COUNT, own: schema, "logprobs": ANY, "finish_reason": {"enum": ["stop", "length"]}},
        ("index", own, "logprobs", "finish_reason"),
    )
    return object_of(
        {
            "id": TEXT,
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": TEXT,
            "choices": array_of(choice, minItems=1),
            "usage": _USAGE,
        },
        ("id", "object", "created", "model", "choices", "usage"),
    )


_MODEL = object_of({"id": TEXT, "object": {"const": "model"}, "max_model_len": COUNT}, ("id", "object"))
_NATIVE = object_of(
    {"text": TEXT, "output_ids": array_of(COUNT), "meta_info": {"type": "object"}},
    ("text", "output_ids", "meta_info"),
)
_ANSWERS: dict[str, Schema] = {
    "completions": _choices("text_completion", "text", TEXT),
    "chat": _choices(
        "chat.completion",
        "message",
        object_of({"role": {"const": "assistant"}, "content": TEXT}, ("role", "content")),
    ),
    "models": object_of({"object": {"const": "list"}, "data": array_of(_MODEL)}, ("object", "data")),
    "model": _MODEL,
    "tokenize": object_of({"count": COUNT, "max_model_len": COUNT, "tokens": array_of(COUNT)},
                        ("count", "max_model_len", "tokens")),
    "detokenize": object_of({"prompt": TEXT}, ("prompt",)),
    "tokenizer_info": object_of({"tokenizer_class": TEXT}, ("tokenizer_class",)),
    "generate": {"anyOf": [_NATIVE, array_of(_NATIVE)]},
    "info": object_of({"model_path": TEXT, "version": TEXT}, ("model_path", "version")),
    "health": object_of({"status": {"const": "ok"}}, ("status",)),
    "ready": object_of({"status": {"const": "ok"}}, ("status",)),
}  # fmt: skip
_ERROR = object_of(
    {
        "error": object_of(
            {"message": {**TEXT, "minLength": 1}, "type": TEXT, "param": ANY, "code": TEXT},
            ("message", "type", "code"),
        )
    },
    ("error",),
)
_ERRORS = {
    400: "The body cannot be served; the message names the field",
    401: "The API key is missing or wrong",
    404: "There is no such model",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    429: "The queue is full; Retry-After says when to try again",
    500: "The model computed no numbers",
    503: "The server is busy or shutting down",
}
_STREAMS = ("completions", "chat", "generate")


def operation(name: str, models: Sequence[str] = (), vocab_size: int = 2**31) -> dict[str, Any]:
    """Arguments of a route: the schemas of its body and responses.

    `models` are the names that a body may give, `vocab_size` says which token ids.
    """
    known = bodies({"enum": list(models)}, {"type": "integer", "minimum": 0, "maximum": vocab_size - 1})
    content: Schema = {"application/json": {"schema": _ANSWERS.get(name, {"type": "object"})}}
    if name in _STREAMS:
        content["text/event-stream"] = {}  # server-sent events: what one is differs by tool
    failing = _ERRORS if name in known else {s: _ERRORS[s] for s in (401, 404, 503)}
    errors = {"application/json": {"schema": _ERROR}}
    responses: dict[str, Any] = {"200": {"description": "The answer", "content": content}}
    responses |= {str(s): {"description": text, "content": errors} for s, text in failing.items()}
    extra: Schema = {"responses": responses}
    if name in known:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": known[name]}}}
    return {"openapi_extra": extra, "operation_id": name}
