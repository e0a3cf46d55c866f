"""Chunks of a streamed answer to /v1/completions or /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_lightning.engine.pieces import Piece
from moe_lightning.engine.request import Logprobs, RequestOutput
from moe_lightning.protocol.requests import ChatCall, CompletionCall
from moe_lightning.protocol.responses import (
    Decode,
    chat_logprobs,
    completion_logprobs,
    prompt_text,
    usage,
)
from moe_lightning.protocol.stream_options import StreamOptions


@dataclass
class Chunks:
    """Makes the chunks of one stream; remembers what each choice has had.

    Args:
        call: the checked body.
        options: what the stream holds beside the answer.
        response_id: the same in all chunks.
        model: its name.
        created: seconds since 1970.
        decode: turns token ids into text.
    """

    call: ChatCall | CompletionCall
    options: StreamOptions
    response_id: str
    model: str
    created: int
    decode: Decode
    _begun: set[int] = field(default_factory=set)
    _offsets: dict[int, int] = field(default_factory=dict)  # of each choice: characters up to its next token
    _tokens: dict[int, int] = field(default_factory=dict)  # of each choice: tokens so far
    _prompts: dict[int, int] = field(default_factory=dict)  # of each prompt: its tokens

    def of(self, position: int, output: RequestOutput, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """Chunks for the next pieces of the answers to prompt number `position`; `output` has that prompt."""
        self._prompts[position] = len(output.prompt_token_ids)
        chunks = []
        for piece in pieces:
            index = position * self.call.params.n + piece.index
            self._tokens[index] = self._tokens.get(index, 0) + len(piece.token_ids)
            if isinstance(self.call, ChatCall):
                choices = self._chat(self.call, index, piece)
            else:
                choices = [self._completion(self.call, index, output, piece)]
            chunks += [self._chunk([choice]) for choice in choices]
            self._begun.add(index)
        return chunks

    def last(self) -> list[dict[str, Any]]:
        """The chunks after the last piece: usage where that was asked for."""
        return [self._chunk([]) | {"usage": self._usage()}] if self.options.include_usage else []

    def _usage(self) -> dict[str, int]:
        return usage(sum(self._prompts.values()), sum(self._tokens.values()))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": self.response_id,
            "object": "chat.completion.chunk" if isinstance(self.call, ChatCall) else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if self.options.continuous_usage_stats:
            chunk["usage"] = self._usage()
        elif self.options.include_usage:
            chunk["usage"] = None
        return chunk

    def _chat(self, call: ChatCall, index: int, piece: Piece) -> list[dict[str, Any]]:
        top = call.params.logprobs
        logprobs = None if top is None else chat_logprobs(piece, top, self.decode)
        choice = {
            "index": index,
            "delta": {"content": piece.text},
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }
        if index in self._begun:
            return [choice]
        role = {"role": "assistant", "content": "", "refusal": None}
        return [{"index": index, "delta": role, "logprobs": None, "finish_reason": None}, choice]

    def _completion(
        self, call: CompletionCall, index: int, output: RequestOutput, piece: Piece
    ) -> dict[str, Any]:
        text, tokens = piece.text, piece.token_ids
        entries = list[Logprobs | None](piece.logprobs or [])
        if index not in self._begun:
            prompt = prompt_text(output, self.decode) if call.echo or call.params.logprobs is not None else ""
            self._offsets[index] = len(prompt)
            if call.echo:
                text, tokens = prompt + text, output.prompt_token_ids + tokens
                entries = (output.prompt_logprobs or [None] * len(output.prompt_token_ids)) + entries
                self._offsets[index] = 0
        logprobs = None
        if call.params.logprobs is not None:
            logprobs = completion_logprobs(tokens, entries, self._offsets[index], self.decode)
            self._offsets[index] += sum(map(len, logprobs["tokens"]))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
