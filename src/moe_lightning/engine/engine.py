"""The loop of passes: requests in, outputs out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moe_lightning.engine.batcher import Batch, Batcher
from moe_lightning.engine.request import Logprob, Logprobs, Request, RequestOutput
from moe_lightning.engine.sequence import Sequence
from moe_lightning.engine.stopping import Finish
from moe_lightning.engine.waiting import Turns
from moe_lightning.engine.watch import Watch
from moe_lightning.engine.worker import Worker
from moe_lightning.errors import DeviceError
from moe_lightning.perf.replan import changes, smaller
from moe_lightning.policy import Policy
from moe_lightning.runtime.micro_batch import Step
from moe_lightning.runtime.runner import MicroBatchOutput
from moe_lightning.runtime.sampler import NOT_FINITE, SampleOutput

_log = logging.getLogger(__name__)


class Engine:
    """Runs requests to their end. Every request that was added comes out of `step` exactly once.

    `turns` says who goes first, by default whoever came first. `in_batches` is for comparison with systems that do
    not admit while others run; see `Batcher`.

    Attributes:
        num_prompt_tokens: of all prompts computed so far, each counted once.
        num_generated_tokens: of all answers so far.
        watch: compares passes with their predictions; None for an engine without any.
        clock: seconds, for the watch.
    """

    def __init__(
        self,
        worker: Worker,
        policy: Policy,
        tokenizer: Any,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        *,
        turns: Turns | None = None,
        in_batches: bool = False,
    ) -> None:
        self._worker = worker
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_model_len = max_model_len
        self._batcher = Batcher(policy, self._eos_token_ids, turns or Turns(), in_batches=in_batches)
        self._unfinished: dict[str, list[Sequence]] = {}
        self._prompt_logprobs: dict[str, list[Logprobs | None]] = {}
        self._num_arrived = self._num_too_large = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._ran: Batch | None = None  # in the last pass, until somebody asks who advanced
        self._advanced: list[str] = []
        self.watch: Watch | None = None
        self._last_pass: tuple[Step, float] | None = None  # and its seconds, not yet compared
        self.clock: Callable[[], float] = time.perf_counter

    @property
    def num_unfinished(self) -> int:
        """Requests that are not finished."""
        return len(self._unfinished)

    @property
    def num_running(self) -> int:
        """Sequences that have KV in memory."""
        return len(self._batcher.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for memory or a place."""
        return len(self._batcher.waiting)

    @property
    def is_full(self) -> bool:
        """There are as many sequences as may run at once, or more."""
        return self.num_running + self.num_waiting >= self._batcher.policy.max_num_seqs

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no sequence holds."""
        return self._batcher.allocator.num_free

    @property
    def num_too_large(self) -> int:
        """Passes that did not fit in GPU memory; those after them are smaller."""
        return self._num_too_large

    @property
    def num_preemptions(self) -> int:
        """How often a sequence had to give its memory back."""
        return self._batcher.num_preemptions

    @property
    def advanced(self) -> list[str]:
        """Ids of the requests that got tokens in the last pass, those that it finished among them."""
        if self._ran is not None:
            fed = (s for sequences in (*self._ran.prefill, *self._ran.decode) for s in sequences)
            self._advanced = list(dict.fromkeys(s.request.request_id for s in fed))
            self._ran = None
        return self._advanced

    def add(self, request: Request) -> None:
        """Queue a request; its id must be new among the unfinished ones."""
        assert request.request_id not in self._unfinished, f"request id {request.request_id} twice"
        sequences = []
        for index in range(request.params.n):
            sequences.append(
                Sequence(request, index, self._num_arrived, self._max_model_len, self._tokenizer)
            )
            self._num_arrived += 1
        self._unfinished[request.request_id] = sequences
        for sequence in sequences:
            self._batcher.add(sequence)

    def expect_more(self, more: bool) -> None:
        """Say whether more requests will come: the last ones of a job have other turns."""
        if self._batcher.turns.is_ending == more:
            self._batcher.change_turns(replace(self._batcher.turns, is_ending=not more))

    def answer_in_order(self) -> None:
        """From now on whoever comes first goes first, as somebody waits for each answer."""
        self._batcher.change_turns(Turns())

    def adopt(self, request: Request, output_ids: list[int]) -> bool:
        """Take in a request as if it had been running: its KV is taken for computed. For measurements.

        Returns:
            False if the cache has no room for it.
        """
        sequence = Sequence(request, 0, self._num_arrived, self._max_model_len, self._tokenizer)
        sequence.output_ids = output_ids
        if not self._batcher.adopt(sequence):
            return False
        self._num_arrived += 1
        self._unfinished[request.request_id] = [sequence]
        return True

    def peek(self, request_id: str) -> RequestOutput | None:
        """What an unfinished request has so far; None if it is not known (any more)."""
        sequences = self._unfinished.get(request_id)
        return None if sequences is None else self._output(sequences, finished=False)

    def close_batch(self) -> None:
        """Admit nobody until all that run have ended. For measurements."""
        self._batcher.close_batch()

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now with what it has; None if it is not known (any more)."""
        sequences = self._unfinished.get(request_id)
        if sequences is None:
            return None
        self._batcher.remove({request_id})
        for sequence in sequences:
            if sequence.finish is None:
                sequence.finish = Finish("abort", None, sequence.output().text)
        return self._finish(request_id)

    def step(self) -> list[RequestOutput]:
        """One pass; the requests it finished."""
        self._ran, self._advanced = None, []
        if not self._batcher.has_work:
            return []
        self._compare()
        start = self.clock()
        batch = self._batcher.next()
        reason, outputs = "", []
        try:
            outputs = self._worker.run(batch.step)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        except BaseException:
            self._batcher.put_back()
            raise
        if reason:  # not before the error is gone: it holds what the failed task had allocated
            self._back_off(reason)
            return []
        self._take(batch, outputs)
        self._ran = batch
        ended = {s.request.request_id for s in self._batcher.running if s.finish}
        self._batcher.retire()
        done = [r for r in ended if all(s.finish for s in self._unfinished[r])]
        if self.watch:
            self._last_pass = batch.step, self.clock() - start
        return [self._finish(request_id) for request_id in sorted(done, key=self._order)]

    def _compare(self) -> None:
        """Tell the watch of the last pass, whose outputs are out; go on as it says."""
        if self.watch is None or self._last_pass is None:
            return
        (step, seconds), self._last_pass = self._last_pass, None
        try:
            revision = self.watch.note(step, seconds, self._worker.recorded)
        except Exception:  # nobody's answers depend on a prediction
            _log.exception("passes are no longer compared with the plan")
            self.watch = None
            return
        self._worker.record_next = self.watch.wants_recording
        if revision:
            self._keep_to(revision.policy)
            _log.warning(revision.message)

    def _back_off(self, reason: str) -> None:
        """Go on with smaller passes; what ran is computed again."""
        before = self._batcher.policy
        policy = smaller(before, len(self._batcher.running), self._num_too_large)
        self._num_too_large += 1
        self._batcher.put_back()
        self._worker.give_back()
        if policy is None:
            raise DeviceError(
                f"a pass of one sequence does not fit ({reason}); raise gpu_memory, or give a policy with fewer "
                "resident_pages"
            )
        self._keep_to(self.watch.shrink_to(policy) if self.watch else policy)
        changed = changes(before, self._batcher.policy)
        _log.warning("a pass did not fit in GPU memory (%s); going on with %s", reason, changed)

    def _keep_to(self, policy: Policy) -> None:
        self._batcher.keep_to(policy)
        self._worker.keep_to(policy)

    def _order(self, request_id: str) -> int:
        return self._unfinished[request_id][0].order

    def _take(self, batch: Batch, outputs: list[MicroBatchOutput]) -> None:
        for sequences, scored, output in zip(batch.prefill, batch.scored, outputs, strict=False):
            self._take_scores(scored, output)
            self._take_tokens(sequences, output.sampled)
        for sequences, output in zip(batch.decode, outputs[len(batch.prefill) :], strict=True):
            self._take_tokens(sequences, output.sampled)
        for sequence in batch.admitted:
            if not sequence.output_ids[1:] and sequence.index == 0:
                self.num_prompt_tokens += len(sequence.request.prompt_token_ids)
            if sequence.max_new_tokens == 0 and not sequence.finish:
                sequence.finish = Finish("length", None, "")

    def _take_tokens(self, sequences: tuple[Sequence, ...], sampled: SampleOutput | None) -> None:
        if sampled is None:
            return
        rows = _Rows(sampled, self._tokenizer)
        for row, (sequence, token_id) in enumerate(zip(sequences, rows.token_ids, strict=True)):
            if sequence.finish:  # its prompt's scores were not finite
                continue
            if token_id == NOT_FINITE:
                sequence.fail()
                continue
            k = sequence.request.params.logprobs
            logprobs = None if k is None else rows.logprobs(row, k)
            sequence.accept(token_id, self._eos_token_ids, logprobs)
            self.num_generated_tokens += 1

    def _take_scores(self, scored: tuple[tuple[Sequence, int], ...], output: MicroBatchOutput) -> None:
        """Scores come as parts of a chunk's positions; each piece takes its own in row order."""
        entries: list[tuple[_Rows, int]] = []
        for part in output.scored:
            rows = _Rows(part, self._tokenizer)
            entries += [(rows, row) for row in range(len(rows.token_ids))]
        position = 0
        for sequence, count in scored:
            k = sequence.request.params.prompt_logprobs
            assert k is not None
            into = self._prompt_logprobs.setdefault(sequence.request.request_id, [None])
            own = entries[position : position + count]
            position += count
            into += [rows.logprobs(row, k) for rows, row in own]
            if any(rows.is_nan(row) for rows, row in own):
                sequence.fail()

    def _finish(self, request_id: str) -> RequestOutput:
        output = self._output(self._unfinished.pop(request_id), finished=True)
        self._prompt_logprobs.pop(request_id, None)
        return output

    def _output(self, sequences: list[Sequence], *, finished: bool) -> RequestOutput:
        request = sequences[0].request
        prompt_logprobs = self._prompt_logprobs.get(request.request_id)
        if prompt_logprobs is None and request.params.prompt_logprobs is not None:
            prompt_logprobs = [None]
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[sequence.output() for sequence in sequences],
            finished=finished,
            prompt_logprobs=prompt_logprobs,
        )


class _Rows:
    """Sampler output as Python values, copied from the device once."""

    def __init__(self, output: SampleOutput, tokenizer: Any) -> None:
        self.token_ids: list[int] = output.token_ids.tolist()
        self._tokenizer = tokenizer
        self._logprobs = output.logprobs.tolist() if output.logprobs is not None else []
        self._ranks = output.ranks.tolist() if output.ranks is not None else []
        self._top_ids = output.top_ids.tolist() if output.top_ids is not None else None
        self._top = output.top_logprobs.tolist() if output.top_logprobs is not None else None

    def is_nan(self, row: int) -> bool:
        """The row's logits were no numbers to compute with."""
        return math.isnan(self._logprobs[row])

    def logprobs(self, row: int, k: int) -> Logprobs:
        """The k most likely tokens of a row and the chosen one, which comes first."""
        token = self.token_ids[row]
        entries = {token: Logprob(self._logprobs[row], self._ranks[row], self._text(token))}
        if self._top_ids is not None and self._top is not None:
            for rank, (top, value) in enumerate(
                zip(self._top_ids[row][:k], self._top[row][:k], strict=True), start=1
            ):
                entries.setdefault(top, Logprob(value, rank, self._text(top)))
        return entries

    def _text(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))
