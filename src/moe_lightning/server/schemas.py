"""What the OpenAPI document says of bodies: endpoints read those themselves, by `protocol`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_lightning.protocol import fields, native

Schema = dict[str, Any]

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array"}
_RANGES: dict[str, Schema] = {
    "n": {"minimum": 1, "maximum": 1024},
    "temperature": {"minimum": 0, "maximum": 100},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "maximum": 2**31},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"minimum": 0.01, "maximum": 100},
    "seed": {"minimum": -(2**63), "maximum": 2**64 - 1},
    "min_tokens": {"minimum": 0, "maximum": 2**31},
    "prompt_logprobs": {"minimum": 0, "maximum": 100},
}
_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31}
_LOGPROBS: Schema = {"type": "integer", "minimum": 0, "maximum": 100}
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_ANY: Schema = {}


def _object(properties: dict[str, Schema], required: tuple[str, ...] = (), **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def _array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _sampling() -> dict[str, Schema]:
    found: dict[str, Schema] = {}
    for name, types in fields.SAMPLING.items():
        found[name] = {"type": "number" if float in types else _TYPES[types[0]], **_RANGES.get(name, {})}
    found["stop"] = {"anyOf": [{**_TEXT, "minLength": 1}, _array({**_TEXT, "minLength": 1}, maxItems=64)]}
    found["stop_token_ids"] = _array(_COUNT, maxItems=64)
    return found


_STREAM: dict[str, Schema] = {
    "stream": _FLAG,
    "stream_options": _object(
        {"include_usage": _FLAG, "continuous_usage_stats": _FLAG}, additionalProperties=False
    ),
}
_IGNORED: dict[str, Schema] = {"user": _TEXT, "metadata": {"type": "object"}, "store": _FLAG}
_FORM_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": 2**16}
_CHOICE: Schema = {"type": "array", "minItems": 1, "items": _FORM_TEXT}
_JSON_SCHEMA: Schema = {"anyOf": [{"type": "object"}, _FORM_TEXT]}
_FORMS: dict[str, Schema] = {
    "response_format": _object(
        {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": _object({"name": _TEXT, "schema": {"type": "object"}, "strict": _FLAG}),
        },
        ("type",),
        additionalProperties=False,
    ),
    "structured_outputs": _object(
        {
            "json": _JSON_SCHEMA,
            "regex": _FORM_TEXT,
            "choice": _CHOICE,
            "grammar": _FORM_TEXT,
            "json_object": {"const": True},
        },
        additionalProperties=False,
    ),
    "guided_json": _JSON_SCHEMA,
    "guided_regex": _FORM_TEXT,
    "guided_choice": _CHOICE,
    "guided_grammar": _FORM_TEXT,
}
_MESSAGE = _object(
    {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {
            "anyOf": [
                _TEXT,
                _array(
                    _object({"type": {"const": "text"}, "text": _TEXT}, ("type", "text"),
                            additionalProperties=False),
                    minItems=1,
                ),
            ]
        },
        "name": _TEXT,
    },
    ("role", "content"),
    additionalProperties=False,
)  # fmt: skip


def _body(properties: dict[str, Schema], required: tuple[str, ...]) -> Schema:
    """A body whose fields may all be null, but for those that it needs."""
    nullable = {name: s if name in required else _or_null(s) for name, s in properties.items()}
    return _object(nullable, required, additionalProperties=False)


def _bodies(model: Schema, token: Schema) -> dict[str, Schema]:
    sampling = _sampling()
    common = {"model": model, **sampling, **_IGNORED, **_STREAM, **_FORMS}
    ids = _array(token, minItems=1)
    prompt: Schema = {
        "anyOf": [_TEXT, ids, _array(_TEXT, minItems=1), _array(ids, minItems=1)],
        "description": "Texts or lists of token ids",
    }
    completion = {"prompt": prompt, "max_tokens": _COUNT, "logprobs": _LOGPROBS, "echo": _FLAG}
    chat = {
        "messages": _array(_MESSAGE, minItems=1),
        "max_tokens": _COUNT,
        "max_completion_tokens": _COUNT,
        "logprobs": _FLAG,
        "top_logprobs": _LOGPROBS,
    }
    tokenize = {
        "model": model,
        "prompt": _TEXT,
        "messages": _array(_MESSAGE, minItems=1),
        "add_special_tokens": _FLAG,
        "add_generation_prompt": _FLAG,
        "return_token_strs": _FLAG,
    }
    return {
        "completions": _body({**common, **completion}, ("prompt",)),
        "chat": _body({**common, **chat}, ("messages",)),
        "tokenize": _body(tokenize, ()),
        "detokenize": _body({"model": model, "tokens": _array(token)}, ("tokens",)),
        "generate": _native(sampling, ids),
    }


def _native(sampling: dict[str, Schema], ids: Schema) -> Schema:
    own = {
        name: sampling.get({"max_new_tokens": "", "min_new_tokens": ""}.get(name, name), _COUNT)
        for name in native.PARAMS
    }
    own["no_stop_trim"] = _FLAG
    own["sampling_seed"] = sampling["seed"]
    return _body(
        {
            "text": {"anyOf": [_TEXT, _array(_TEXT, minItems=1)]},
            "input_ids": {"anyOf": [ids, _array(ids, minItems=1)]},
            "sampling_params": _body(own, ()),
            "rid": _TEXT,
            "stream": _FLAG,
            "return_logprob": _FLAG,
            "top_logprobs_num": _LOGPROBS,
            "logprob_start_len": {"enum": [-1, 0]},
            "return_text_in_logprobs": _FLAG,
        },
        (),
    )


_USAGE = _object(
    {name: _COUNT for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
    ("prompt_tokens", "completion_tokens", "total_tokens"),
)


def _choices(kind: str, own: str, schema: Schema) -> Schema:
    choice = _object(
        {"index": _COUNT, own: schema, "logprobs": _ANY, "finish_reason": {"enum": ["stop", "length"]}},
        ("index", own, "logprobs", "finish_reason"),
    )
    return _object(
        {
            "id": _TEXT,
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": _TEXT,
            "choices": _array(choice, minItems=1),
            "usage": _USAGE,
        },
        ("id", "object", "created", "model", "choices", "usage"),
    )


_MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "max_model_len": _COUNT}, ("id", "object"))
_NATIVE = _object(
    {"text": _TEXT, "output_ids": _array(_COUNT), "meta_info": {"type": "object"}},
    ("text", "output_ids", "meta_info"),
)
_ANSWERS: dict[str, Schema] = {
    "completions": _choices("text_completion", "text", _TEXT),
    "chat": _choices(
        "chat.completion",
        "message",
        _object({"role": {"const": "assistant"}, "content": _TEXT}, ("role", "content")),
    ),
    "models": _object({"object": {"const": "list"}, "data": _array(_MODEL)}, ("object", "data")),
    "model": _MODEL,
    "tokenize": _object({"count": _COUNT, "max_model_len": _COUNT, "tokens": _array(_COUNT)},
                        ("count", "max_model_len", "tokens")),
    "detokenize": _object({"prompt": _TEXT}, ("prompt",)),
    "tokenizer_info": _object({"tokenizer_class": _TEXT}, ("tokenizer_class",)),
    "generate": {"anyOf": [_NATIVE, _array(_NATIVE)]},
    "info": _object({"model_path": _TEXT, "version": _TEXT}, ("model_path", "version")),
    "health": _object({"status": {"const": "ok"}}, ("status",)),
    "ready": _object({"status": {"const": "ok"}}, ("status",)),
}  # fmt: skip
_ERROR = _object(
    {
        "error": _object(
            {"message": {**_TEXT, "minLength": 1}, "type": _TEXT, "param": _ANY, "code": _TEXT},
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
    bodies = _bodies({"enum": list(models)}, {"type": "integer", "minimum": 0, "maximum": vocab_size - 1})
    content: Schema = {"application/json": {"schema": _ANSWERS.get(name, {"type": "object"})}}
    if name in _STREAMS:
        content["text/event-stream"] = {}  # server-sent events: what one is differs by tool
    failing = _ERRORS if name in bodies else {s: _ERRORS[s] for s in (401, 404, 503)}
    errors = {"application/json": {"schema": _ERROR}}
    responses: dict[str, Any] = {"200": {"description": "The answer", "content": content}}
    responses |= {str(s): {"description": text, "content": errors} for s, text in failing.items()}
    extra: Schema = {"responses": responses}
    if name in bodies:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": bodies[name]}}}
    return {"openapi_extra": extra, "operation_id": name}
