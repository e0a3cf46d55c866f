"""The fields of a body that say what form an answer must have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moe_lightning.engine.checks import shown, text
from moe_lightning.engine.structured import StructuredOutputsParams
from moe_lightning.errors import RequestError
from moe_lightning.protocol.fields import FORMS, exactly

_OWN = frozenset({"json", "regex", "choice", "grammar", "json_object"})
_SCHEMA = frozenset({"name", "schema", "strict", "description"})


def parse_form(given: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """The form that a body's fields ask for; None for any.

    Raises:
        RequestError: a field cannot be used, or two ask for a form each; the message names them.
    """
    wanted = {name: _form(name, given[name]) for name in sorted(FORMS & given.keys())}
    found = {name: form for name, form in wanted.items() if form is not None}
    if len(found) > 1:
        raise RequestError(f"{' and '.join(found)} both ask for a form; give one of them")
    for name, form in found.items():
        try:
            return StructuredOutputsParams(**form)
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from None
    return None


def _form(name: str, value: Any) -> dict[str, Any] | None:
    """Arguments of `StructuredOutputsParams`."""
    if name == "response_format":
        return _response_format(value)
    if name == "structured_outputs":
        if not isinstance(value, dict):
            raise RequestError(f"structured_outputs={shown(value)}: give an object")
        form = exactly(value, _OWN, "structured_outputs.")
        return {**form, "json": _schema(name + ".json", form["json"])} if "json" in form else form
    kind = name.removeprefix("guided_")
    return {kind: _schema(name, value) if kind == "json" else value}


def _response_format(value: Any) -> dict[str, Any] | None:
    kind = value.get("type") if isinstance(value, dict) else value
    if not isinstance(value, dict) or kind not in ("text", "json_object", "json_schema"):
        raise RequestError(f"response_format={shown(value)}: give type text, json_object or json_schema")
    if kind != "json_schema":
        exactly(value, frozenset({"type"}), "response_format.")
        return {"json_object": True} if kind == "json_object" else None
    inner = exactly(value, frozenset({"type", "json_schema"}), "response_format.").get("json_schema")
    if not isinstance(inner, dict):
        raise RequestError(f"response_format.json_schema={shown(inner)}: give an object with name and schema")
    schema = exactly(inner, _SCHEMA, "response_format.json_schema.").get("schema", {"type": "object"})
    return {"json": _schema("response_format.json_schema.schema", schema)}


def _schema(name: str, value: Any) -> str:
    """A schema as text; as it is if it is text."""
    if isinstance(value, str):
        return text(name, value)
    if not isinstance(value, dict | bool):
        raise RequestError(f"{name}={shown(value)}: give a JSON schema")
    try:
        return text(name, json.dumps(value, ensure_ascii=False))
    except RecursionError:
        raise RequestError(f"{name} is nested too deeply; flatten it") from None
