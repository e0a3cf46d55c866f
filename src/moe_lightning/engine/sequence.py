"""One answer in the making."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from moe_lightning.engine.detokenizer import Detokenizer
from moe_lightning.engine.draws import uniform
from moe_lightning.engine.request import CompletionOutput, Logprobs, Request
from moe_lightning.engine.stopping import Finish, accept_token, forbidden_token_ids, max_new_tokens
from moe_lightning.runtime.micro_batch import DecodeRow
from moe_lightning.runtime.sampling_batch import RowSampling

_UNLIMITED = 512


class Sequence:
    """One of a request's n answers: its tokens, its KV blocks and how it goes on.

    `order` is its place in arrival order; `blocks` is empty while it waits. `rank` says who goes first: the oldest,
    and background work after all other. `allowed` are the tokens that the answer may have; of one without a limit,
    more than most have.
    """

    def __init__(self, request: Request, index: int, order: int, max_model_len: int, tokenizer: Any) -> None:
        self.request = request
        self.index = index
        self.order = order
        self.rank = request.is_background, order
        self.blocks: list[int] = []
        self.output_ids: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.cumulative_logprob = 0.0
        self.finish: Finish | None = None
        self.max_new_tokens = max_new_tokens(request.params, len(request.prompt_token_ids), max_model_len)
        has_limit = request.params.max_tokens is not None
        self.allowed = self.max_new_tokens if has_limit else min(self.max_new_tokens, _UNLIMITED)
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self._form = request.form.begin() if request.form else None
        self._greedy: RowSampling | None = None  # the same for every token of most greedy answers
        p = request.params
        # Only the end of a text or its length ends it, and nobody looks at what it says before.
        self._is_simple = not (p.stop_strings or p.stop_token_ids or p.min_tokens or self._form)
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=request.params.skip_special_tokens)

    @property
    def num_left(self) -> int:
        """Tokens that its answer may still get."""
        return self.max_new_tokens - len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return self.num_prompt_tokens + len(self.output_ids)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self.request.prompt_token_ids, *self.output_ids]

    def decode_row(self, eos_token_ids: Collection[int]) -> DecodeRow:
        """Its last token, which goes in next."""
        output_ids = self.output_ids
        sampling = self._greedy or self.sampling(eos_token_ids)
        assert sampling is not None, "a sequence without tokens to generate ends with its prompt"
        last = output_ids[-1] if output_ids else self.request.prompt_token_ids[-1]
        return DecodeRow(last, self.num_prompt_tokens + len(output_ids) - 1, self.blocks, sampling)

    def sampling(self, eos_token_ids: Collection[int]) -> RowSampling | None:
        """How its next token is sampled; None if it wants none."""
        if self._greedy is not None:
            return self._greedy
        if self.max_new_tokens == 0:
            return None
        p, position = self.request.params, len(self.output_ids)
        sampling = RowSampling(
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            presence_penalty=p.presence_penalty,
            frequency_penalty=p.frequency_penalty,
            repetition_penalty=p.repetition_penalty,
            uniform=0.0 if p.is_greedy else uniform(self.request.seed, self.index, position),
            forbidden_ids=forbidden_token_ids(p, eos_token_ids, position),
            prompt_ids=self.request.prompt_token_ids,
            output_ids=self.output_ids,
            num_logprobs=p.logprobs,
            allowed=self._form.allowed() if self._form else None,
        )
        if (
            sampling.is_greedy
            and self._form is None
            and not sampling.has_penalty
            and position >= p.min_tokens
        ):
            self._greedy = sampling
        return sampling

    def accept(self, token_id: int, eos_token_ids: Collection[int], logprobs: Logprobs | None) -> None:
        """Take the next token; sets `finish` when it is the last."""
        self.output_ids.append(token_id)
        if (
            self._is_simple
            and logprobs is None
            and token_id not in eos_token_ids
            and len(self.output_ids) < self.max_new_tokens
        ):  # thousands of times a pass
            self._detokenizer.append(token_id)
            return
        if self._form:
            self._form.accept(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
            self.cumulative_logprob += logprobs[token_id].logprob
        self.finish = accept_token(
            self._detokenizer, self.request.params, eos_token_ids, self.output_ids, self.max_new_tokens
        )

    def fail(self) -> None:
        """End with what there is: the model gave no numbers to go on with."""
        self.finish = Finish("error", None, self._detokenizer.finish())

    def output(self) -> CompletionOutput:
        """What the user gets."""
        finish, wants_logprobs = self.finish, self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=finish.text if finish else self._detokenizer.text,
            token_ids=tuple(self.output_ids),
            finish_reason=finish.reason if finish else None,
            stop_reason=finish.stop_reason if finish else None,
            cumulative_logprob=self.cumulative_logprob if wants_logprobs else None,
            logprobs=self.logprobs if wants_logprobs else None,
        )
