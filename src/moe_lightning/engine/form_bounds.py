"""How large a form may be: compiling one takes time and memory that its text does not show."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from moe_lightning.engine.structured import StructuredOutputsParams
from moe_lightning.errors import RequestError

MAX_DEPTH = 32  # levels of objects and lists of a schema: its compilation takes the cube of that
MAX_COUNT = 10_000  # of a repetition, and of all of a form together
_COUNTS = frozenset(
    {
        "maxLength",
        "minLength",
        "maxItems",
        "minItems",
        "maxProperties",
        "minProperties",
        "maxContains",
        "minContains",
    }
)
_REPETITION = re.compile(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}")


def check_bounds(
    wanted: StructuredOutputsParams, max_depth: int = MAX_DEPTH, max_count: int = MAX_COUNT
) -> None:
    """Make sure that a form can be compiled in a time to wait for.

    Args:
        wanted: the form.
        max_depth: levels of objects and lists of a schema.
        max_count: all repetitions together.

    Raises:
        RequestError: it repeats too often or is nested too deeply.
    """
    kind, value = wanted.kind_and_value
    where = f"{kind} of structured_outputs"
    if kind in ("regex", "grammar"):
        _check_total(where, _repetitions(value), max_count)
    elif kind == "json":
        _check_total(where, _counts(where, _parsed(where, value, max_depth), max_depth), max_count)


def _parsed(where: str, schema: str, max_depth: int) -> Any:
    try:
        return json.loads(schema)
    except RecursionError:
        raise _too_deep(where, max_depth) from None
    except ValueError as error:
        raise RequestError(f"{where} cannot be used: it is no JSON ({error})") from None


def _counts(where: str, schema: Any, max_depth: int) -> Iterator[int]:
    """All counts of a schema, whatever keyword they belong to."""
    pending = [(schema, 1)]
    while pending:
        value, depth = pending.pop()
        if not isinstance(value, dict | list):
            continue
        if depth > max_depth:
            raise _too_deep(where, max_depth)
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            pending.append((inner, depth + 1))
            if key in _COUNTS and isinstance(inner, int | float):
                yield int(min(abs(inner), MAX_COUNT + 1))
            elif key == "pattern" and isinstance(inner, str):
                yield from _repetitions(inner)


def _repetitions(text: str) -> Iterator[int]:
    for found in _REPETITION.finditer(text):
        digits = found[2] or found[1]
        yield int(digits) if len(digits) < 10 else MAX_COUNT + 1


def _check_total(where: str, counts: Iterator[int], max_count: int) -> None:
    total = 0
    for count in counts:
        total += count
        if total > max_count:
            raise RequestError(
                f"{where} repeats more than {max_count} times in sum; ask for fewer, or leave the limit out"
            )


def _too_deep(where: str, max_depth: int) -> RequestError:
    return RequestError(f"{where} is nested more than {max_depth} levels deep; flatten it")
