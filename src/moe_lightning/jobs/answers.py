"""From a line of the input to a request, and from its answer to a line of the output."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from moe_lightning.config import EngineConfig
from moe_lightning.engine.request import PassStats, Request, RequestOutput, SamplingParams
from moe_lightning.jobs.lines import LINE_ID_PREFIX, BadLine, BatchLine, Envelope
from moe_lightning.protocol import ChatCall, chat_response, completion_response


class BatchLLM(Protocol):
    """What a job needs of `LLM`."""

    config: EngineConfig
    model_name: str
    tokenizer: Any

    def completion_request(
        self, request_id: str, prompt: str | Sequence[int], params: SamplingParams, seed: int | None = None
    ) -> Request:
        """The request for a prompt; RequestError if it cannot be served."""
        ...

    def chat_request(
        self, request_id: str, messages: list[dict[str, Any]], params: SamplingParams, seed: int | None = None
    ) -> Request:
        """The request for a conversation; RequestError if it cannot be served."""
        ...

    def run(
        self, requests: Iterable[Request], on_pass: Callable[[PassStats], None] | None = None
    ) -> Iterator[RequestOutput]:
        """Outputs as they finish; `requests` is pulled as there is room."""
        ...


def make_request(llm: BatchLLM, line: BatchLine) -> Request:
    """The request of a line, under the line's id.

    Raises:
        RequestError: the model cannot serve it.
    """
    call = line.call
    seed = derived_seed(llm.config.seed, line.custom_id)
    if isinstance(call, ChatCall):
        return llm.chat_request(line.line_id, list(call.messages), call.params, seed)
    return llm.completion_request(line.line_id, call.prompts[0], call.params, seed)


def derived_seed(engine_seed: int, custom_id: str) -> int:
    """A seed of 63 bits, the same in every run, so that a resumed job answers as an uninterrupted one."""
    digest = hashlib.sha256(f"{engine_seed}:{custom_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def answer_line(llm: BatchLLM, line: BatchLine, output: RequestOutput) -> dict[str, Any]:
    """Line of the output file."""
    name = line.line_id.removeprefix(LINE_ID_PREFIX)
    about: dict[str, Any] = {
        "model": llm.model_name,
        "created": int(time.time()),
        "decode": lambda ids: llm.tokenizer.decode(list(ids)),
    }
    if isinstance(line.call, ChatCall):
        body = chat_response(line.call, output, response_id=f"chatcmpl-{name}", **about)
    else:
        body = completion_response(line.call, [output], response_id=f"cmpl-{name}", **about)
    return response_line(line, 200, f"req_{name}", body)


def response_line(
    line: BatchLine | Envelope, status_code: int, request_id: str, body: dict[str, Any]
) -> dict[str, Any]:
    """Line that holds a response."""
    response = {"status_code": status_code, "request_id": request_id, "body": body}
    return {"id": line.line_id, "custom_id": line.custom_id, "response": response, "error": None}


def error_line(line: BatchLine | Envelope | BadLine, code: str, message: str) -> dict[str, Any]:
    """Line of the error file."""
    error = {"code": code, "message": message}
    return {"id": line.line_id, "custom_id": line.custom_id, "response": None, "error": error}
