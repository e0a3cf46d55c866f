"""Which sequences ride on the next pass."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from operator import attrgetter

from moe_lightning.engine.balance import spread
from moe_lightning.engine.forecast import AnswerLengths, Forecast
from moe_lightning.engine.sequence import Sequence
from moe_lightning.engine.waiting import Turns, Waiting
from moe_lightning.memory.blocks import BlockAllocator, num_blocks_for
from moe_lightning.perf.filling import CHEAP, KNOWN
from moe_lightning.policy import Policy
from moe_lightning.runtime.micro_batch import PrefillPiece, Step

_IN_ORDER = Turns()
# Of thousands of sequences in each pass.
_RANK, _PROMPT, _ALLOWED = attrgetter("rank"), attrgetter("num_prompt_tokens"), attrgetter("allowed")


@dataclass(frozen=True)
class Batch:
    """A step with the sequences behind it.

    `prefill[j]` are the sequences whose prompts end in chunk j with a token to sample; `scored[j]` those with
    prompt tokens to score in it, and how many; both in row order. `decode[j]` are those of decode
    micro-batch j.
    """

    step: Step
    prefill: tuple[tuple[Sequence, ...], ...]
    scored: tuple[tuple[tuple[Sequence, int], ...], ...]
    decode: tuple[tuple[Sequence, ...], ...]
    admitted: tuple[Sequence, ...]


class Batcher:
    """Continuous batching: every pass advances all running sequences and fills free memory with new prompts.

    A sequence gets the blocks its tokens need now, not those it may need. It is admitted if, as far as can be
    foreseen, all that run will have room until they end; answers are expected to be as long, measured by what
    they may be, as those before them were. When blocks run out all the same, the youngest running sequences give
    theirs back and wait at the head of the queue; their tokens are computed again later. The oldest sequence is
    never put back while a younger one runs and any one sequence fits in memory alone, so the queue always moves.

    Background work counts as younger than all other: it waits behind it, is the first to be put back, and gives its
    places and blocks to what somebody waits for.

    In a job the sequences that have most left to do keep their blocks instead, and are not foreseen if computing
    them anew is cheap; see `Turns`.

    Args:
        policy: what fits.
        eos_token_ids: that end an answer.
        turns: who goes first.
        in_batches: admit as other systems do, for comparison: when memory is full nobody is admitted until all that
            run have ended.
    """

    def __init__(
        self,
        policy: Policy,
        eos_token_ids: Collection[int],
        turns: Turns = _IN_ORDER,
        *,
        in_batches: bool = False,
    ) -> None:
        self._turns, self.waiting = turns, Waiting(turns)
        self.running: list[Sequence] = []  # in the order of their ranks
        self.num_preemptions = 0
        self.keep_to(policy)
        self._eos_token_ids = eos_token_ids
        self.allocator = BlockAllocator(policy.num_blocks)
        self._answer_lengths = AnswerLengths()
        self._in_batches, self._is_open = in_batches, True

    @property
    def has_work(self) -> bool:
        """Some sequence is not finished."""
        return bool(self.waiting or self.running)

    @property
    def policy(self) -> Policy:
        """Whose limits the next pass keeps."""
        return self._policy

    def keep_to(self, policy: Policy) -> None:
        """Keep to a policy's limits from the next pass on; the cache stays what it is.

        What runs goes on, also if it is more than would be admitted now.
        """
        self._policy = policy
        self._max_num_seqs = policy.max_num_seqs
        self._micro_batch_size = policy.micro_batch_size
        self._prefill_tokens = policy.prefill_tokens

    @property
    def turns(self) -> Turns:
        """Who goes first."""
        return self._turns

    def change_turns(self, turns: Turns) -> None:
        """Go by other turns from the next pass on."""
        self._turns = turns
        self.waiting.change_turns(turns)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.add(sequence)

    def adopt(self, sequence: Sequence) -> bool:
        """Count a sequence as running whose KV somebody has put in place; False if it finds no room."""
        needed = self._num_blocks(sequence.num_tokens)
        if needed > self.allocator.num_free or len(self.running) >= self._max_num_seqs:
            return False
        sequence.blocks = self.allocator.allocate(needed)
        self.running.append(sequence)
        return True

    def close_batch(self) -> None:
        """Admit nobody until all that run have ended."""
        assert self._in_batches, "sequences are admitted one by one"
        self._is_open = False

    def next(self) -> Batch:
        """The next pass; the new prompts are counted as running from now on."""
        preempted = self._reserve()
        # What was just put back must not take the blocks that it gave up for others.
        admitted = [] if preempted else self._admit()
        decoding = list(self.running)
        self.running = sorted(self.running + admitted, key=_RANK)
        micro_batches = self._decode_micro_batches(decoding)
        chunks = list(self._chunks(admitted))
        return Batch(
            step=Step(
                prefill=tuple(tuple(piece for _, piece in chunk) for chunk in chunks),
                decode=tuple(
                    tuple(s.decode_row(self._eos_token_ids) for s in members) for members in micro_batches
                ),
            ),
            prefill=tuple(tuple(s for s, piece in chunk if piece.sampling) for chunk in chunks),
            scored=tuple(tuple((s, len(p.next_ids)) for s, p in chunk if p.next_ids) for chunk in chunks),
            decode=tuple(tuple(members) for members in micro_batches),
            admitted=tuple(admitted),
        )

    def retire(self) -> None:
        """Let finished sequences go."""
        for sequence in self.running:
            if sequence.finish:
                self._release(sequence)
                self._answer_lengths.count(len(sequence.output_ids), sequence.allowed)
        self.running = [s for s in self.running if not s.finish]

    def remove(self, request_ids: Collection[str]) -> None:
        """Forget sequences, wherever they are."""
        for sequence in self.running:
            if sequence.request.request_id in request_ids:
                self._release(sequence)
        self.running = [s for s in self.running if s.request.request_id not in request_ids]
        self.waiting.keep(lambda s: s.request.request_id not in request_ids)

    def put_back(self) -> None:
        """Return all running sequences to the queue: a failed pass has left their KV undefined."""
        self._preempt(self.running)
        self.running = []

    def _reserve(self) -> bool:
        """Give every running sequence a slot for its next token; whether some had to be put back."""
        size = self._policy.block_size
        growing = [
            (sequence, count) for sequence in self.running
            if (count := num_blocks_for(sequence.num_tokens, size) - len(sequence.blocks)) > 0
        ]  # fmt: skip
        if sum(count for _, count in growing) <= self.allocator.num_free:  # whoever comes first
            for sequence, count in growing:
                sequence.blocks += self.allocator.allocate(count)
            return False
        kept: list[Sequence] = []
        pending = deque(sorted(self.running, key=self._turns.to_keep))
        victims: list[Sequence] = []
        while pending:
            sequence = pending.popleft()
            missing = self._num_blocks(sequence.num_tokens) - len(sequence.blocks)
            if missing == 0:
                kept.append(sequence)
                continue
            while missing > self.allocator.num_free and pending:
                victim = pending.pop()
                self._release(victim)
                victims.append(victim)
            if missing > self.allocator.num_free:
                self._release(sequence)
                victims.append(sequence)
                continue
            sequence.blocks += self.allocator.allocate(missing)
            kept.append(sequence)
        self.running = sorted(kept, key=_RANK)
        self._preempt(victims)
        return bool(victims)

    def _preempt(self, victims: Iterable[Sequence]) -> None:
        for victim in victims:
            self._release(victim)
            self.waiting.add(victim)
            self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.allocator.free(sequence.blocks)
        sequence.blocks = []

    def _admit(self) -> list[Sequence]:
        admitted: list[Sequence] = []
        self._is_open |= not self.running
        is_full = len(self.running) >= self._max_num_seqs
        if not self.waiting or not self._is_open or (is_full and not self._may_yield):
            return admitted
        # Rows that no decoding sequence needs are free for prompts: so a batch fills up in few passes.
        tokens_left = self._max_num_seqs + self._prefill_tokens - len(self.running)
        share = self._answer_lengths.share(sum(len(s.output_ids) for s in self.running))
        forecast, has_yielded = self._forecast(self.running, share), False
        while self.waiting:
            sequence = self.waiting.first
            # One prompt always runs, also if it is longer than passes may be since they were made smaller.
            if admitted and sequence.num_tokens > tokens_left:
                break
            if has_yielded and sequence.request.is_background:  # it would take back what it gave up
                break
            num_running = len(self.running) + len(admitted)
            if not self._takes(sequence, num_running, self.allocator.num_free, forecast, share):
                if not (count := self._num_yielding(sequence, admitted, share)):
                    self._is_open = not self._in_batches
                    break
                self._yield(count)
                tokens_left, has_yielded = tokens_left + count, True
                forecast = self._forecast([*self.running, *admitted], share)
                continue
            self.waiting.pop()
            sequence.blocks = self.allocator.allocate(self._num_blocks(sequence.num_tokens))
            tokens_left -= sequence.num_tokens
            admitted.append(sequence)
        if self._in_batches and len(self.running) + len(admitted) >= self._max_num_seqs:
            self._is_open = False
        return admitted

    def _takes(
        self, sequence: Sequence, num_running: int, num_free: int, forecast: Forecast | None, share: float
    ) -> bool:
        """Whether a sequence may run beside so many, with so many free blocks; the forecast counts it then."""
        if num_running >= self._max_num_seqs:
            return False
        # Blocks that running sequences will ask for in the next pass or so: without them a prompt would
        # be admitted only to be put back.
        reserve = num_blocks_for(num_running, self._policy.block_size)
        if self._num_blocks(sequence.num_tokens) + reserve > num_free:
            return False
        fits = forecast is None or forecast.take(sequence.num_tokens, _remaining(sequence, share))
        return fits or not num_running

    @property
    def _may_yield(self) -> bool:
        """Somebody waits, and background work runs."""
        if self._in_batches or not self.waiting or self.waiting.first.request.is_background:
            return False
        return bool(self.running) and self.running[-1].request.is_background

    def _num_yielding(self, sequence: Sequence, admitted: list[Sequence], share: float) -> int:
        """How many background sequences must go for another; 0 if all of them would not make room for it."""
        if not self._may_yield:
            return 0
        num_background = sum(s.request.is_background for s in self.running)

        def is_enough(count: int) -> bool:
            kept, going = self.running[: len(self.running) - count], self.running[len(self.running) - count :]
            kept = [*kept, *admitted]
            num_free = self.allocator.num_free + sum(len(s.blocks) for s in going)
            return self._takes(sequence, len(kept), num_free, self._forecast(kept, share), share)

        if not is_enough(num_background):  # as they go for nothing, they stay
            return 0
        return 1 + bisect_left(range(1, num_background), True, key=is_enough)

    def _yield(self, count: int) -> None:
        """Put the youngest sequences back."""
        going = self.running[len(self.running) - count :]
        self.running = self.running[: len(self.running) - count]
        self._preempt(going)

    def _forecast(self, running: list[Sequence], share: float) -> Forecast | None:
        """None in a job whose sequences may be put back: their prompts cost little beside what they generate."""
        if self._turns.together > 1:
            known = [*running, *self.waiting.next(KNOWN)]
            if sum(map(_PROMPT, known)) <= CHEAP * share * sum(map(_ALLOWED, known)):
                return None
        remaining = [_remaining(s, share) for s in running]
        candidates = self.waiting.next(max(1, self._max_num_seqs - len(running)))
        return Forecast(
            self._policy.num_blocks, self._policy.block_size, [s.num_tokens for s in running], remaining,
            horizon=max([*remaining, *(_remaining(s, share) for s in candidates)]),
        )  # fmt: skip

    def _num_blocks(self, num_tokens: int) -> int:
        return num_blocks_for(num_tokens, self._policy.block_size)

    def _decode_micro_batches(self, decoding: list[Sequence]) -> list[list[Sequence]]:
        if not decoding:
            return []
        size = self._micro_batch_size
        lengths = [s.num_tokens for s in decoding]
        groups = spread(lengths, -(-len(decoding) // size), size)
        return [[decoding[i] for i in sorted(group)] for group in groups if group]

    def _chunks(self, admitted: list[Sequence]) -> Iterable[list[tuple[Sequence, PrefillPiece]]]:
        """The prompts one after the other, cut into chunks that fit the workspace."""
        chunk: list[tuple[Sequence, PrefillPiece]] = []
        room = self._policy.chunk_tokens
        for sequence in admitted:
            start = 0
            while start < sequence.num_tokens:
                end = min(start + room, sequence.num_tokens)
                chunk.append((sequence, self._piece(sequence, start, end)))
                room -= end - start
                start = end
                if room == 0:
                    yield chunk
                    chunk, room = [], self._policy.chunk_tokens
        if chunk:
            yield chunk

    def _piece(self, sequence: Sequence, start: int, end: int) -> PrefillPiece:
        tokens = sequence.token_ids
        wants_scores = sequence.request.params.prompt_logprobs is not None
        wants_scores = wants_scores and sequence.index == 0 and not sequence.output_ids
        return PrefillPiece(
            token_ids=tokens[start:end],
            start=start,
            block_table=sequence.blocks,
            sampling=sequence.sampling(self._eos_token_ids) if end == len(tokens) else None,
            next_ids=tokens[start + 1 : end + 1] if wants_scores else (),
            num_prompt_logprobs=sequence.request.params.prompt_logprobs if wants_scores else None,
        )


def _remaining(sequence: Sequence, share: float) -> int:
    """Tokens that an answer will probably still get, if answers get this share of what they may."""
    return max(1, round(sequence.allowed * share) - len(sequence.output_ids))
