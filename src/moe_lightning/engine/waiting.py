"""The queue of sequences that wait for memory or a place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain

from moe_lightning.engine.sequence import Sequence


class Waiting:
    """Sequences in the order of their ranks: background work behind all other."""

    def __init__(self) -> None:
        self._interactive: deque[Sequence] = deque()
        self._background: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._interactive) + len(self._background)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._interactive, self._background)

    @property
    def first(self) -> Sequence:
        """The sequence that is next; there must be one."""
        return (self._interactive or self._background)[0]

    def pop(self) -> Sequence:
        """Take the first sequence out."""
        return (self._interactive or self._background).popleft()

    def add(self, sequence: Sequence) -> None:
        """Queue one that has just arrived."""
        self._queue_of(sequence).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue one that arrived before all of its kind that wait."""
        self._queue_of(sequence).appendleft(sequence)

    def keep(self, is_kept: Callable[[Sequence], bool]) -> None:
        """Drop the others."""
        self._interactive = deque(filter(is_kept, self._interactive))
        self._background = deque(filter(is_kept, self._background))

    def _queue_of(self, sequence: Sequence) -> deque[Sequence]:
        return self._background if sequence.request.is_background else self._interactive
