"""An `LLM` of a few lines: text is bytes, and an answer is made of its prompt and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from moe_lightning.config import EngineConfig
from moe_lightning.engine.request import CompletionOutput, PassStats, Request, RequestOutput, SamplingParams
from moe_lightning.errors import RequestError


class ByteTokenizer:
    def decode(self, ids: Sequence[int]) -> str:
        assert isinstance(ids, list)
        return bytes(ids).decode("utf-8", "replace")


class FakeLLM:
    """Runs `capacity` requests at once; those with an odd digest finish before the others."""

    def __init__(
        self, model: str = "fake", *, capacity: int = 4, max_model_len: int = 64, seed: int = 0, **_: Any
    ):
        self.config = EngineConfig(model=model, seed=seed)
        self.model_name = "fake-model"
        self.tokenizer = ByteTokenizer()
        self.last_trace = None
        self.capacity, self.max_model_len = capacity, max_model_len
        self.pulled: list[str] = []
        self.most_running = 0

    def completion_request(
        self, request_id: str, prompt: str | Sequence[int], params: SamplingParams, seed: int | None = None
    ) -> Request:
        ids = tuple(prompt.encode()) if isinstance(prompt, str) else tuple(prompt)
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        if len(ids) > self.max_model_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, the model takes {self.max_model_len}; shorten it"
            )
        text = prompt if isinstance(prompt, str) else None
        own = params.seed if params.seed is not None else seed
        assert own is not None
        return Request(request_id, ids, params, text, own)

    def chat_request(
        self, request_id: str, messages: list[dict[str, Any]], params: SamplingParams, seed: int | None = None
    ) -> Request:
        return self.completion_request(request_id, "".join(m["content"] for m in messages), params, seed)

    def run(
        self, requests: Iterable[Request], on_pass: Callable[[PassStats], None] | None = None
    ) -> Iterator[RequestOutput]:
        source = iter(requests)
        running: list[Request] = []
        num_tokens = 0
        while True:
            while len(running) < self.capacity and (request := next(source, None)) is not None:
                self.pulled.append(request.request_id)
                running.append(request)
            self.most_running = max(self.most_running, len(running))
            if not running:
                return
            running.sort(key=lambda r: hashlib.sha256(r.request_id.encode()).digest()[0] % 2, reverse=True)
            request = running.pop(0)
            num_tokens += 3
            if on_pass:
                on_pass(PassStats(len(running), 0, num_tokens, num_tokens, num_tokens / 10))
            yield self.answer(request)

    def answer(self, request: Request) -> RequestOutput:
        digest = hashlib.sha256(bytes(request.prompt_token_ids) + str(request.seed).encode()).hexdigest()[:8]
        reason = {"abort me": "abort", "overflow": "error"}.get(request.prompt or "", "stop")
        outputs = [
            CompletionOutput(i, f"é\u2028{digest}-{i}", (1, 2, 3), reason) for i in range(request.params.n)
        ]
        return RequestOutput(request.request_id, request.prompt, request.prompt_token_ids, outputs)
