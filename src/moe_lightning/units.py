"""Sizes and counts as people write and read them."""

from __future__ import annotations

import re

from moe_lightning.errors import ConfigError

KIB = 2**10
MIB = 2**20
GIB = 2**30

_BYTES = {
    "": 1, "b": 1,
    "k": KIB, "kb": 10**3, "kib": KIB,
    "m": MIB, "mb": 10**6, "mib": MIB,
    "g": GIB, "gb": 10**9, "gib": GIB,
    "t": 2**40, "tb": 10**12, "tib": 2**40,
}  # fmt: skip
_COUNTS = {"": 1, "k": 1024, "m": 1024**2}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes of a size such as ``16GiB``, ``24G`` (binary), ``1.5GB`` (decimal) or ``1048576``.

    Raises:
        ConfigError: the text is no size.
    """
    if isinstance(text, int):
        return text
    return _parse(text, _BYTES, "size", "16GiB, 24G, 1.5GB or a number of bytes")


def parse_count(text: str | int) -> int:
    """A count such as ``4096`` or ``16k`` (16 x 1024).

    Raises:
        ConfigError: the text is no count.
    """
    if isinstance(text, int):
        return text
    return _parse(text, _COUNTS, "count", "4096 or 16k")


def _parse(text: str, scales: dict[str, int], what: str, examples: str) -> int:
    match = _NUMBER.fullmatch(text)
    scale = scales.get(match[2].lower()) if match else None
    if match is None or scale is None:
        raise ConfigError(f"{text!r} is not a {what}; write {examples}")
    value = float(match[1]) * scale
    if value != int(value) and scale == 1:
        raise ConfigError(f"{text!r} is not a whole {what}; write {examples}")
    return int(value)


def format_bytes(num_bytes: float) -> str:
    """``87.0 GiB``: bytes with the binary unit that keeps the number short."""
    for unit, scale in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{int(num_bytes)} B"


def format_rate(per_s: float) -> str:
    """``1,366``, ``87.4`` or ``3.41``: as many digits as tell rates apart."""
    return f"{per_s:,.{0 if per_s >= 100 else 1 if per_s >= 10 else 2}f}"


def counted(count: int, one: str, several: str = "") -> str:
    """``1 request`` or ``2,000 requests``; `several` where it is not the one with an s."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def format_duration(seconds: float) -> str:
    """``1 h 02 min``, ``3 min 05 s``, ``12.3 s`` or ``4.5 ms``."""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
