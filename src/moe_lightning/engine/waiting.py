"""The queue of sequences that wait for memory or a place, and whose turn it is."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from moe_lightning.engine.sequence import Sequence
from moe_lightning.policy import Policy

_ROUND = 8  # times the sequences that run at once: what is put back is done before others begin much later


@dataclass(frozen=True)
class Turns:
    """Who runs first, and who keeps its memory when that runs out.

    Where somebody waits for each answer (`together` 1) whoever came first does. In a job, nobody waits for single
    answers, and what counts is when the last one ends. Then of `together` requests that follow each other those
    begin first that have not begun, and those keep their memory that have most left to do: so memory is full while
    sequences are young and short, and in the end none is left over that has just begun. With prompts of 77 tokens
    on average, answers of 128 and requests that fill memory twice, 294 passes do what takes 399 in order. When no
    more will come, of those that have not begun those begin first that may get the longest answers: a long one that
    begins last would run on alone.

    Attributes:
        together: requests.
        is_ending: no more will come.
    """

    together: int = 1
    is_ending: bool = False

    @classmethod
    def of_job(cls, policy: Policy, device: torch.device) -> Turns:
        """Those of a job: answers come in any order, but within bounds.

        Without a GPU, which computes prompts beside what a pass waits for, none is to be computed twice: then in
        order.
        """
        return cls(_ROUND * policy.max_num_seqs if device.type == "cuda" else 1)

    def to_wait(self, sequence: Sequence) -> tuple[bool, int, bool, int, int]:
        """The least of those that wait is next."""
        is_job = self.together > 1
        has_begun = is_job and bool(sequence.output_ids)
        goes_by_left = has_begun or (is_job and self.is_ending)
        return (*self._round(sequence), has_begun, -sequence.num_left if goes_by_left else 0, sequence.order)

    def to_keep(self, sequence: Sequence) -> tuple[bool, int, int, int]:
        """The greatest of those that run gives its memory back."""
        return (*self._round(sequence), -sequence.num_left, sequence.order)

    def _round(self, sequence: Sequence) -> tuple[bool, int]:
        return sequence.request.is_background, sequence.order // self.together


class Waiting:
    """Sequences in the order of their turns: background work behind all other.

    Args:
        turns: that decide.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._heap: list[tuple[tuple[bool, int, bool, int, int], Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, sequence in sorted(self._heap, key=lambda entry: entry[0]))

    def next(self, count: int) -> Iterator[Sequence]:
        """The first so many, by way of the heap's own order: of thousands only those near the top are looked at."""
        near = [(self._heap[0][0], 0)] if self._heap else []
        while near and count > 0:
            _, place = heapq.heappop(near)
            yield self._heap[place][1]
            count -= 1
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(self._heap):
                    heapq.heappush(near, (self._heap[child][0], child))

    def change_turns(self, turns: Turns) -> None:
        """Wait in another order from now on."""
        self._turns = turns
        self._heap = [(turns.to_wait(sequence), sequence) for _, sequence in self._heap]
        heapq.heapify(self._heap)

    @property
    def first(self) -> Sequence:
        """The sequence that is next; there must be one."""
        return self._heap[0][1]

    def pop(self) -> Sequence:
        """Take the first sequence out."""
        return heapq.heappop(self._heap)[1]

    def add(self, sequence: Sequence) -> None:
        """Queue one that has arrived or was put back; it holds no memory."""
        heapq.heappush(self._heap, (self._turns.to_wait(sequence), sequence))

    def keep(self, is_kept: Callable[[Sequence], bool]) -> None:
        """Drop the others."""
        self._heap = [entry for entry in self._heap if is_kept(entry[1])]
        heapq.heapify(self._heap)
