"""What the OpenAPI document says of the bodies of requests: endpoints read those themselves, by `protocol`."""

from __future__ import annotations

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
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31}
_LOGPROBS: Schema = {"type": "integer", "minimum": 0, "maximum": 100}
TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
ANY: Schema = {}


def object_of(properties: dict[str, Schema], required: tuple[str, ...] = (), **more: Any) -> Schema:
    """An object with these properties."""
    return {"type": "object", "properties": properties, "required": list(required), **more}


def array_of(items: Schema, **more: Any) -> Schema:
    """An array of such items."""
    return {"type": "array", "items": items, **more}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _sampling() -> dict[str, Schema]:
    found: dict[str, Schema] = {}
    for name, types in fields.SAMPLING.items():
        found[name] = {"type": "number" if float in types else _TYPES[types[0]], **_RANGES.get(name, {})}
    found["stop"] = {"anyOf": [{**TEXT, "minLength": 1}, array_of({**TEXT, "minLength": 1}, maxItems=64)]}
    found["stop_token_ids"] = array_of(COUNT, maxItems=64)
    return found


_STREAM: dict[str, Schema] = {
    "stream": _FLAG,
    "stream_options": object_of(
        {"include_usage": _FLAG, "continuous_usage_stats": _FLAG}, additionalProperties=False
    ),
}
_IGNORED: dict[str, Schema] = {"user": TEXT, "metadata": {"type": "object"}, "store": _FLAG}
_FORM_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": 2**16}
_CHOICE: Schema = {"type": "array", "minItems": 1, "items": _FORM_TEXT}
_JSON_SCHEMA: Schema = {"anyOf": [{"type": "object"}, _FORM_TEXT]}
_FORMS: dict[str, Schema] = {
    "response_format": object_of(
        {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": object_of({"name": TEXT, "schema": {"type": "object"}, "strict": _FLAG}),
        },
        ("type",),
        additionalProperties=False,
    ),
    "structured_outputs": object_of(
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
_MESSAGE = object_of(
    {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {
            "anyOf": [
                TEXT,
                array_of(
                    object_of({"type": {"const": "text"}, "text": TEXT}, ("type", "text"),
                            additionalProperties=False),
                    minItems=1,
                ),
            ]
        },
        "name": TEXT,
    },
    ("role", "content"),
    additionalProperties=False,
)  # fmt: skip


def _body(properties: dict[str, Schema], required: tuple[str, ...]) -> Schema:
    """A body whose fields may all be null, but for those that it needs."""
    nullable = {name: s if name in required else _or_null(s) for name, s in properties.items()}
    return object_of(nullable, required, additionalProperties=False)


def bodies(model: Schema, token: Schema) -> dict[str, Schema]:
    """The schema of each endpoint's body, for the names of a model and its token ids."""
    sampling = _sampling()
    common = {"model": model, **sampling, **_IGNORED, **_STREAM, **_FORMS}
    ids = array_of(token, minItems=1)
    prompt: Schema = {
        "anyOf": [TEXT, ids, array_of(TEXT, minItems=1), array_of(ids, minItems=1)],
        "description": "Texts or lists of token ids",
    }
    completion = {"prompt": prompt, "max_tokens": COUNT, "logprobs": _LOGPROBS, "echo": _FLAG}
    chat = {
        "messages": array_of(_MESSAGE, minItems=1),
        "max_tokens": COUNT,
        "max_completion_tokens": COUNT,
        "logprobs": _FLAG,
        "top_logprobs": _LOGPROBS,
    }
    tokenize = {
        "model": model,
        "prompt": TEXT,
        "messages": array_of(_MESSAGE, minItems=1),
        "add_special_tokens": _FLAG,
        "add_generation_prompt": _FLAG,
        "return_token_strs": _FLAG,
    }
    return {
        "completions": _body({**common, **completion}, ("prompt",)),
        "chat": _body({**common, **chat}, ("messages",)),
        "tokenize": _body(tokenize, ()),
        "detokenize": _body({"model": model, "tokens": array_of(token)}, ("tokens",)),
        "generate": _native(sampling, ids),
    }


def _native(sampling: dict[str, Schema], ids: Schema) -> Schema:
    own = {
        name: sampling.get({"max_new_tokens": "", "min_new_tokens": ""}.get(name, name), COUNT)
        for name in native.PARAMS
    }
    own["no_stop_trim"] = _FLAG
    own["sampling_seed"] = sampling["seed"]
    return _body(
        {
            "text": {"anyOf": [TEXT, array_of(TEXT, minItems=1)]},
            "input_ids": {"anyOf": [ids, array_of(ids, minItems=1)]},
            "sampling_params": _body(own, ()),
            "rid": TEXT,
            "stream": _FLAG,
            "return_logprob": _FLAG,
            "top_logprobs_num": _LOGPROBS,
            "logprob_start_len": {"enum": [-1, 0]},
            "return_text_in_logprobs": _FLAG,
        },
        (),
    )
