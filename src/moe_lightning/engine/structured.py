"""The form that an answer must have, as a user asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps
from typing import Any

from moe_lightning.engine.checks import shown, text
from moe_lightning.errors import RequestError

_FORMS = ("json", "regex", "choice", "grammar", "json_object")
_MAX_FORM = 2**16  # characters


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The form that an answer must have; exactly one field, names as in vLLM.

    Attributes:
        json: a JSON schema, as text or as an object.
        regex: a regular expression that the whole answer matches.
        choice: the answers that there may be.
        grammar: in EBNF, as GBNF and xgrammar write it; its first rule is called root.
        json_object: any JSON object.

    Raises:
        RequestError: there is not exactly one, or it cannot be one; the message names it.
    """

    json: str | dict[str, object] | None = None
    regex: str | None = None
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(f"structured_outputs has {len(given)} forms; give one of {', '.join(_FORMS)}")
        kind, value = self.kind_and_value
        if kind == "choice":
            if (
                not isinstance(value, list | tuple)
                or not value
                or not all(isinstance(v, str) and v for v in value)
            ):
                raise RequestError(f"choice={shown(value)} of structured_outputs: give non-empty strings")
        elif kind == "json_object":
            if value is not True:
                raise RequestError(f"json_object={shown(value)} of structured_outputs: give true")
        elif not isinstance(value, str) or not value:
            raise RequestError(f"{kind}={shown(value)} of structured_outputs: give a non-empty string")
        for part in value if kind == "choice" else [value] if kind != "json_object" else []:
            text(f"{kind} of structured_outputs", part)
        if len(str(value)) > _MAX_FORM:
            raise RequestError(
                f"{kind} of structured_outputs has {len(str(value))} characters; {_MAX_FORM} are the most"
            )

    @property
    def kind_and_value(self) -> tuple[str, Any]:
        """The field that is given, and its value; a schema as text."""
        kind = next(name for name in _FORMS if getattr(self, name) is not None)
        value = getattr(self, kind)
        return kind, dumps(value) if kind == "json" and isinstance(value, dict) else value

    @property
    def key(self) -> tuple[str, Any]:
        """What tells this form from others; hashable."""
        kind, value = self.kind_and_value
        return kind, tuple(value) if kind == "choice" else value
