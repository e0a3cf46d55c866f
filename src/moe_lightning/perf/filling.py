"""How full the passes of a job are, from its first to its last: the batcher's rules, over a sample of sequences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil
from typing import Any

import numpy as np

from moe_lightning.perf.workload import Workload, num_decoding
from moe_lightning.policy import Policy

# In a job whose prompts are no longer than so many times their answers, of those that run and so many that wait,
# sequences are admitted while there is memory: computing some anew costs less than memory that is left for them to
# grow into.
CHEAP, KNOWN = 4, 256
QUEUE = 2  # requests that wait, as a multiple of max_num_seqs: enough that memory never stays unused
_SAMPLE = 512  # sequences that stand for those that fill memory
# Of an answer, at most: several of its tokens are taken for one. Where prompts are dear each takes longer, and more
# would not tell more.
_STEPS, _STEPS_OF_DEAR = 64, 32
_TIMES = 3  # what fills memory so many times is followed; in what comes after, sequences are of all ages


@dataclass(frozen=True)
class Kinds:
    """How many passes of each extreme kind take as long as those of a job.

    Attributes:
        quiet: one sequence decodes.
        full: as many decode as fill memory.
        ramp: prompts only, as many as a pass has room for.
        crowded: both.
        steady: memory is full of sequences of all ages.
    """

    quiet: float
    full: float
    ramp: float
    crowded: float
    steady: float


def most_prompts(policy: Policy, workload: Workload) -> int:
    """Tokens of prompts in a pass in which nothing decodes, at most."""
    return min(policy.max_num_seqs + policy.prefill_tokens, ceil(policy.max_num_seqs * workload.mean_prompt))


def kinds_of_passes(policy: Policy, workload: Workload) -> Kinds:
    """Those of a job; without a number of requests, of one with twice those that fill memory."""
    n = num_decoding(policy, workload)
    times = (workload.num_requests or 2 * n) / n
    scale = min(1.0, _SAMPLE / n)
    sample = round(n * scale)
    is_dear = workload.mean_prompt > CHEAP * workload.mean_answer
    return _followed(
        _Job(
            workload.prompt_lens, workload.gen_len, workload.gen_lens,
            max(1, round(min(times, _TIMES) * sample)), sample, round(policy.num_blocks * scale),
            policy.block_size, ceil(policy.max_num_seqs * scale), round(policy.prefill_tokens * scale),
            round(most_prompts(policy, workload) * scale),
            max(1, round(KNOWN * scale)), ceil(workload.gen_len / (_STEPS_OF_DEAR if is_dear else _STEPS)),
        ),
        max(0.0, times - _TIMES) * workload.mean_answer,
        workload.longest_answer,
    )  # fmt: skip


@dataclass(frozen=True)
class _Job:
    """A sample of a job, and the limits of its passes, of which `step` are taken for one."""

    prompt_lens: tuple[int, ...]
    gen_len: int
    gen_lens: tuple[int, ...] | None
    num_requests: int
    num_seqs: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    prefill_tokens: int
    most_prompts: int
    known: int
    step: int

    @cached_property
    def shortest(self) -> int:
        """Tokens of the shortest prompt."""
        return min(self.prompt_lens)

    @cached_property
    def times(self) -> np.ndarray:
        """Passes from now at which memory is foreseen."""
        return np.arange(0, max(self.gen_lens or (self.gen_len,)), self.step)

    @cached_property
    def times_in_blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of these times whole blocks, and which of the rests is left; and the rests."""
        rests, which = np.unique(self.times % self.block_size, return_inverse=True)
        return self.times // self.block_size, which, rests

    def blocks(self, tokens: Any) -> Any:
        """That sequences hold, or one does."""
        return (tokens + (self.block_size - 1)) // self.block_size

    def sequences(self) -> np.ndarray:
        """Tokens that each holds, and has left to generate, and how dear its prompt is: [3, num_requests]."""
        gens = np.resize(self.gen_lens or self.gen_len, len(self.prompt_lens))
        lens, count = np.asarray(self.prompt_lens), self.num_requests
        pairs = np.stack([lens, gens, lens - CHEAP * gens])
        pairs = pairs[:, np.lexsort((gens, lens))]
        some = pairs[:, (2 * np.arange(count) + 1) * pairs.shape[1] // (2 * count)]
        new = np.random.default_rng(0).permutation(some, axis=1)
        if self.gen_lens:  # no more come after those that wait then: see `engine.waiting`
            waiting = max(0, count - QUEUE * self.max_num_seqs)
            new[:, waiting:] = _most_left_first(new[:, waiting:])
        return new


@lru_cache(maxsize=256)
def _followed(job: _Job, steady: float, longest: int) -> Kinds:
    queue, step = _Queue(job), job.step
    quiet = full = ramp = crowded = 0.0  # few and many sequences, few and many prompts
    while queue.has_work:
        if job.gen_lens and (decoding := queue.last()) is not None:
            shares = np.minimum(decoding / job.num_seqs, 1.0)
            full, quiet = full + step * float(shares.sum()), quiet + step * float((1 - shares).sum())
            break
        decode, prompts = queue.next()
        many = min(decode / job.num_seqs, 1.0)
        share = min(prompts / max(job.most_prompts - decode, 1), 1.0)
        quiet += step * ((1 - many) * (1 - share))
        ramp += step * ((1 - many) * share)
        full += step * (many * (1 - share))
        crowded += step * (many * share)
    # The longest answer of all may be so rare that no sample has it.
    quiet += max(0.0, longest - (quiet + full + ramp + crowded + steady))
    return Kinds(quiet, full, ramp, crowded, steady)


class _Queue:
    """Sequences that wait and that run, as `engine.batcher` has them in a job: each [3, sequences]."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._new = job.sequences()
        self._running = self._put_back = self._new[:, :0]  # those that run have most left first
        self._ahead = 0  # tokens of prompts that were more than a pass has room for

    @property
    def has_work(self) -> bool:
        """Some sequence is not finished."""
        return bool(self._new.shape[1] or self._running.shape[1] or self._put_back.shape[1])

    def last(self) -> np.ndarray | None:
        """The sequences that decode in each step until all have ended, if nobody waits and all have room."""
        if self._new.shape[1] or self._put_back.shape[1] or self._held_later().max() > self._job.num_blocks:
            return None
        left = self._running[1]
        ends = np.arange(0, left[0], self._job.step)
        return np.searchsorted(-left, -ends)

    def next(self) -> tuple[int, float]:
        """Run passes, those of a step; the sequences that decoded in each, and tokens of prompts."""
        job, step, prompts = self._job, self._job.step, 0
        held = job.blocks(self._running[0] + (step - 1)).cumsum()
        num_kept = num_running = len(held)
        if num_running and held[-1] > job.num_blocks:
            # The one that has most left runs in any case.
            num_kept = max(1, int(np.searchsorted(held, job.num_blocks, side="right")))
        if num_kept < num_running:
            going, self._running = self._running[:, num_kept:], self._running[:, :num_kept]
            self._put_back = _most_left_first(np.concatenate([self._put_back, going], axis=1))
        # Nobody is admitted in a pass that puts somebody back; in the others of a step, some may be.
        if num_kept == num_running or (step > 1 and job.gen_lens):
            prompts = self._admit(job.num_blocks - (int(held[num_kept - 1]) if num_kept else 0))
        tokens, left, _ = self._running
        tokens += step
        left -= step
        if len(left) and left[-1] <= 0:
            self._running = self._running[:, : np.count_nonzero(left > 0)]
        return num_kept, prompts / step

    def _admit(self, num_free: int) -> int:
        job, num_running = self._job, self._running.shape[1]
        # One prompt is admitted in any pass that has memory for it, however long it is.
        room = max(1, job.step * (job.max_num_seqs + job.prefill_tokens - num_running) - self._ahead)
        # Each takes a block or more, and of the room no less than the shortest prompt.
        most = min(job.max_num_seqs - num_running, num_free, room // job.shortest + 1)
        most = max(most, 0 if num_running else 1)
        waiting = np.concatenate([self._new[:, :most], self._put_back[:, :most]], axis=1)[:, :most]
        prompts = waiting[0]
        together = np.arange(num_running, num_running + len(prompts))
        fits = prompts.cumsum() - prompts < room
        fits &= job.blocks(prompts).cumsum() + job.blocks(together) <= num_free
        count = _first_false(fits)
        if count and self._foresees():
            count = _first_false(self._demand(waiting[:, :count]) <= job.num_blocks)
        if not num_running:
            count = max(count, 1)
        admitted, of_new = waiting[:, :count], min(count, self._new.shape[1])
        self._new, self._put_back = self._new[:, of_new:], self._put_back[:, count - of_new :]
        if of_new == count and self._job.gen_lens is None:  # those have more left than any that runs
            self._running = np.concatenate([admitted, self._running], axis=1)
        else:
            self._running = _most_left_first(np.concatenate([self._running, admitted], axis=1))
        taken = int(admitted[0].sum())
        self._ahead = max(0, taken - room)
        return taken

    def _foresees(self) -> bool:
        """Whether nobody is admitted who might be put back, as prompts are dear beside answers."""
        known = self._job.known
        dear = int(self._running[2].sum()) + int(self._new[2, :known].sum())
        if (rest := known - self._new.shape[1]) > 0:
            dear += int(self._put_back[2, :rest].sum())
        return dear > 0

    def _demand(self, waiting: np.ndarray) -> np.ndarray:
        """Blocks at the worst time to come if the first so many are admitted."""
        job, (tokens, left, _) = self._job, waiting[:, :, None]
        theirs = np.where(left > job.times, job.blocks(tokens + job.times), 0).cumsum(axis=0)
        worst: np.ndarray = (self._held_later() + theirs).max(axis=1)
        return worst

    def _held_later(self) -> np.ndarray:
        """Blocks of those that run, at all times to come."""
        job, (tokens, left, _) = self._job, self._running
        whole, which, rests = job.times_in_blocks
        alive = np.searchsorted(-left, -job.times)
        # Whole blocks of time are a block more for each; the rest is less than one.
        of_first = np.zeros((len(rests), len(tokens) + 1), dtype=np.int64)
        job.blocks(tokens + rests[:, None]).cumsum(axis=1, out=of_first[:, 1:])
        held: np.ndarray = of_first[which, alive] + alive * whole
        return held


def _first_false(values: np.ndarray) -> int:
    """Where it is; the length where there is none."""
    return len(values) if values.all() else int(values.argmin())


def _most_left_first(sequences: np.ndarray) -> np.ndarray:
    return sequences[:, np.argsort(-sequences[1], kind="stable")]
