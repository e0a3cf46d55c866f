"""When a sequence is finished, and what text it then has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moe_lightning.engine.detokenizer import Detokenizer
from moe_lightning.engine.request import SamplingParams


@dataclass(frozen=True)
class Finish:
    """Why a sequence ended; the token or string that stopped it (None: EOS); its text.

    `reason` is one of those that `CompletionOutput` lists.
    """

    reason: str
    stop_reason: int | str | None
    text: str


class StopMatch(NamedTuple):
    """A stop string found at text[start:end]."""

    start: int
    end: int
    stop: str


def accept_token(
    detokenizer: Detokenizer,
    params: SamplingParams,
    eos_token_ids: Collection[int],
    token_ids: Sequence[int],
    max_new_tokens: int,
) -> Finish | None:
    """Put the last of `token_ids` into the text; what ended the sequence, or None if it goes on.

    Stop tokens come first, then stop strings, then the length. Call it once for each generated token, in
    order. A stop token stays out of the text (not out of the token ids) unless `include_stop_str_in_output`
    is set, as in vLLM.

    Args:
        detokenizer: of this sequence; it has all generated tokens but the last.
        params: what the request asked for.
        eos_token_ids: of the model.
        token_ids: all generated tokens.
        max_new_tokens: see the function of that name.
    """
    token_id = token_ids[-1]
    may_stop = params.stop_token_ids or token_id in eos_token_ids
    is_stop_token = may_stop and is_stopped_by(token_id, params, eos_token_ids, len(token_ids))
    if is_stop_token and not params.include_stop_str_in_output:
        return _finish_by_token(detokenizer, params, eos_token_ids, token_id)
    detokenizer.append(token_id)
    if is_stop_token:
        return _finish_by_token(detokenizer, params, eos_token_ids, token_id)
    if params.stop_strings and len(token_ids) > params.min_tokens:
        match = find_stop_string(detokenizer.text, detokenizer.num_new_chars, params.stop_strings)
        if match:
            cut = match.end if params.include_stop_str_in_output else match.start
            return Finish("stop", match.stop, detokenizer.text[:cut])
    if len(token_ids) >= max_new_tokens:
        return Finish("length", None, detokenizer.finish())
    return None


def _finish_by_token(
    detokenizer: Detokenizer, params: SamplingParams, eos_token_ids: Collection[int], token_id: int
) -> Finish:
    is_eos = token_id in eos_token_ids and not params.ignore_eos
    return Finish("stop", None if is_eos else token_id, detokenizer.finish())


def is_stopped_by(
    token_id: int, params: SamplingParams, eos_token_ids: Collection[int], num_tokens: int
) -> bool:
    """Whether the token, the last of `num_tokens` generated ones, ends its sequence."""
    if num_tokens < params.min_tokens:
        return False
    if token_id in eos_token_ids and not params.ignore_eos:
        return True
    return token_id in (params.stop_token_ids or ())


def find_stop_string(text: str, num_new_chars: int, stop_strings: Sequence[str]) -> StopMatch | None:
    """The stop string that is complete first; of several that end at the same character, the longest.

    The first to be complete, not the first to begin: so the answer does not depend on how the text was cut
    into tokens. Only a match that ends in the last `num_new_chars` characters counts: the others were
    searched before, or were produced while `min_tokens` still forbade to stop.
    """
    searched = len(text) - num_new_chars
    best: StopMatch | None = None
    for stop in stop_strings:
        start = text.find(stop, max(0, searched - len(stop) + 1))
        if start < 0:
            continue
        end = start + len(stop)
        if best is None or (end, start) < (best.end, best.start):
            best = StopMatch(start, end, stop)
    return best


def max_new_tokens(params: SamplingParams, num_prompt_tokens: int, max_model_len: int) -> int:
    """Tokens that a sequence may generate: `max_tokens`, and no more than the context has room for."""
    room = max(0, max_model_len - num_prompt_tokens)
    return room if params.max_tokens is None else min(room, params.max_tokens)


def forbidden_token_ids(
    params: SamplingParams, eos_token_ids: Collection[int], num_tokens: int
) -> tuple[int, ...]:
    """Token ids that must not be sampled next, after `num_tokens` generated ones, because of `min_tokens`."""
    if num_tokens >= params.min_tokens:
        return ()
    return tuple(sorted({*eos_token_ids, *(params.stop_token_ids or ())}))
