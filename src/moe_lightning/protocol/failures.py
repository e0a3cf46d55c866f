"""Finish reasons that are no answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from moe_lightning.engine.request import RequestOutput

# vLLM's and OpenAI's clients know "stop" and "length" alone: these two become errors.
_FAILURES = {
    "abort": ("aborted", "the engine gave up on this request; {retry}"),
    "error": (
        "non_finite_logits",
        "the model computed NaN or infinity. The checkpoint may be damaged: run `moe-lightning verify`; or float16 "
        "overflowed: use --dtype bfloat16",
    ),
}


class Failure(NamedTuple):
    """Why there is no answer; `code` is for programs."""

    code: str
    message: str


def failure_of(outputs: Iterable[RequestOutput], retry: str = "send it again") -> Failure | None:
    """Why outputs are no answer; None if they are one. `retry` is what the user may do."""
    return failure_of_reasons({c.finish_reason for output in outputs for c in output.outputs}, retry)


def failure_of_reasons(reasons: Iterable[str | None], retry: str = "send it again") -> Failure | None:
    """As `failure_of`, of the finish reasons alone."""
    for reason, (code, message) in _FAILURES.items():
        if reason in reasons:
            return Failure(code, message.replace("{retry}", retry))
    return None
