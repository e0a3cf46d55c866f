"""What an answer has got since somebody last looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lightning.engine.request import CompletionOutput, Logprobs, RequestOutput, SamplingParams


@dataclass(frozen=True)
class Piece:
    """The next part of one of the n answers: text and tokens that were not in a piece before.

    `finish_reason` is None but in the last piece. Text can lag behind tokens: a character or a stop string may not
    be complete yet.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: list[Logprobs] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Pieces:
    """Cuts the growing answers to one request into pieces; together they are the answers, with no text twice.

    Text that may turn out to be the beginning of a stop string is held back: the answer ends before it.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._held_back = () if params.include_stop_str_in_output else params.stop_strings
        self._wants_logprobs = params.logprobs is not None
        self._seen: dict[int, tuple[int, int]] = {}  # of each answer: characters and tokens so far
        self._ended: set[int] = set()

    def take(self, output: RequestOutput) -> list[Piece]:
        """The pieces that came since the last call; answers of which nothing can be shown have none."""
        pieces = [self._next(c) for c in output.outputs if c.index not in self._ended]
        return [piece for piece in pieces if piece is not None]

    def _next(self, answer: CompletionOutput) -> Piece | None:
        num_chars, num_tokens = self._seen.get(answer.index, (0, 0))
        is_last = answer.finish_reason is not None
        end = len(answer.text) if is_last else len(answer.text) - open_stop(answer.text, self._held_back)
        has_tokens = len(answer.token_ids) > num_tokens
        if not is_last and not (end > num_chars or (has_tokens and self._wants_logprobs)):
            return None
        end = max(end, num_chars)
        self._seen[answer.index] = end, len(answer.token_ids)
        if is_last:
            self._ended.add(answer.index)
        return Piece(
            answer.index,
            answer.text[num_chars:end],
            answer.token_ids[num_tokens:],
            None if answer.logprobs is None else answer.logprobs[num_tokens:],
            answer.finish_reason,
            answer.stop_reason,
        )


def open_stop(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text that may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
