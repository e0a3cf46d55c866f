"""Whether the sequences that run will still fit in the cache as they grow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_POINTS = 32  # times at which demand is known; between them it hardly turns


class AnswerLengths:
    """How long answers become, as a share of what they may be; until some have ended, all of it."""

    def __init__(self) -> None:
        self._generated, self._allowed = 1, 1

    def count(self, generated: int, allowed: int) -> None:
        """An answer has ended after so many of the tokens that it was allowed."""
        self._generated += generated
        self._allowed += allowed

    def remaining(self, generated: int, allowed: int) -> int:
        """Tokens that an answer will probably still get."""
        return max(1, allowed * self._generated // self._allowed - generated)


class Forecast:
    """Blocks that sequences will hold at some times to come, counted in passes from now.

    A sequence grows by a token each pass until it ends and gives everything back: of those admitted at once all are
    long at the same time, of those that arrive one after the other the old ones end while the young are short.

    Args:
        num_blocks: of the cache.
        block_size: tokens of a block.
        num_tokens: that each running sequence holds.
        remaining: tokens that each is expected to add.
        horizon: the furthest time that matters.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_tokens: Sequence[int],
        remaining: Sequence[int],
        horizon: int,
    ) -> None:
        self._num_blocks, self._block_size = num_blocks, block_size
        self._times = np.unique(np.linspace(0, max(horizon, 1), _POINTS, dtype=np.int64))
        held, left = np.asarray(num_tokens, dtype=np.int64), np.asarray(remaining, dtype=np.int64)
        self._demand = np.array([self._blocks(held[left >= t] + t).sum() for t in self._times])

    def take(self, num_tokens: int, remaining: int) -> bool:
        """Count a sequence more, if there will be room for it at all times."""
        demand = self._demand + np.where(remaining >= self._times, self._blocks(num_tokens + self._times), 0)
        if demand.max() > self._num_blocks:
            return False
        self._demand = demand
        return True

    def _blocks(self, num_tokens: np.ndarray) -> np.ndarray:
        return -(-num_tokens // self._block_size)
