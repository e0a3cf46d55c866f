"""Frozen dataclasses from parsed JSON, with every value checked."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from moe_lightning.errors import ConfigError

_T = TypeVar("_T")


def decode(cls: type[_T], values: Any, where: str = "") -> _T:
    """A dataclass of the values, its fields dataclasses, tuples, dicts of numbers, numbers, texts, flags or None.

    Every number has to be finite and above 0; an int may come for a float, nothing else for anything else.

    Raises:
        ConfigError: a key is unknown or missing, or a value cannot be used; the message names it by its path.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'the top'} is {_short(values)}; it must be an object")
    hints = get_type_hints(cls)
    names = {f.name: f.default is MISSING for f in fields(cls)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in names:
            raise ConfigError(f"{prefix}{name} is not known; known are {', '.join(names)}")
    for name, is_needed in names.items():
        if is_needed and name not in values:
            raise ConfigError(f"{prefix}{name} is missing")
    decoded = {name: _value(hints[name], value, prefix + name) for name, value in values.items()}
    try:
        return cls(**decoded)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _value(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, UnionType):
        if value is None:
            return None
        hint = next(part for part in get_args(hint) if part is not NoneType)
    if is_dataclass(hint):
        return decode(hint, value, where)  # type: ignore[arg-type]
    match get_origin(hint):
        case None:
            return _scalar(hint, value, where)
        case origin if origin is tuple:
            return _items(get_args(hint)[0], value, where)
        case _:
            return _table(get_args(hint)[1], value, where)


def _items(hint: Any, value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} is {_short(value)}; it must be a list")
    return tuple(_value(hint, item, f"{where}[{index}]") for index, item in enumerate(value))


def _table(hint: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {_short(value)}; it must be an object")
    return {name: _value(hint, item, f"{where}.{name}") for name, item in value.items()}


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{where} is {_short(value)}; it must be a number above 0")
        return float(value)
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{where} is {_short(value)}; it must be an integer above 0")
        return value
    if not isinstance(value, hint):
        raise ConfigError(
            f"{where} is {_short(value)}; it must be {'a text' if hint is str else 'true or false'}"
        )
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
