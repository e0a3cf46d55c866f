"""Whether a body asks for its answer piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_lightning.engine.checks import name_of, shown
from moe_lightning.errors import RequestError
from moe_lightning.protocol.fields import typed

_NAMES = ("include_usage", "continuous_usage_stats")
_NEUTRAL = "include_obfuscation"  # padding against observers of the line; answers here have none


@dataclass(frozen=True)
class StreamOptions:
    """What a stream holds beside the answer: usage in a last chunk of its own, or in each chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


def split_stream(body: Mapping[str, Any]) -> tuple[dict[str, Any], StreamOptions | None]:
    """The body without its fields about streaming, and what those say; None if the answer shall come whole.

    Raises:
        RequestError: one of the fields cannot be used; the message names it.
    """
    rest = dict(body)
    stream, options = rest.pop("stream", None), rest.pop("stream_options", None)
    is_stream = stream is not None and typed("stream", stream, (bool,))
    if is_stream and rest.get("prompt_logprobs") is not None:
        raise RequestError(
            f"prompt_logprobs={shown(rest['prompt_logprobs'])} is not supported with stream=true; remove one"
        )
    if options is None:
        return rest, StreamOptions() if is_stream else None
    if not is_stream:
        raise RequestError("stream_options needs stream=true; set it or remove stream_options")
    return rest, _options(options)


def _options(options: Any) -> StreamOptions:
    if not isinstance(options, dict):
        raise RequestError(f"stream_options={shown(options)}: give an object")
    for name in options.keys() - {*_NAMES, _NEUTRAL}:
        raise RequestError(f"{name_of('stream_options', name)} is not supported; remove it")
    values = {name: value for name, value in options.items() if value is not None}
    for name, value in values.items():
        typed(f"stream_options.{name}", value, (bool,))
    return StreamOptions(**{name: values[name] for name in _NAMES if name in values})
