"""Checks of single values that a user gives, whoever reads them."""

from __future__ import annotations

from typing import Any

from moe_lightning.errors import RequestError


def text(name: str, value: Any) -> str:
    """`value`, if it is a string that UTF-8 can write.

    Raises:
        RequestError: it is none.
    """
    if not isinstance(value, str):
        raise RequestError(f"{name}={shown(value)}: give a string")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise RequestError(f"{name} holds half a surrogate pair at character {e.start}; remove it") from None
    return value


def shown(value: Any) -> str:
    """`repr` of a value, cut so that it fits in a message."""
    try:
        written = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"
    return written if len(written) <= 80 else f"{written[:77]}..."


def name_of(where: str, key: object) -> str:
    """The name of a field in `where`, escaped and cut so that it fits in a message."""
    return f"{where}.{shown(str(key))[1:].removesuffix(chr(39))}"
