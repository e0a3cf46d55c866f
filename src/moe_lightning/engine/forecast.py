"""Whether the sequences that run will still fit in the cache as they grow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_POINTS = 128  # times at which demand is known: a sequence that ends between two counts until the second


class AnswerLengths:
    """How long answers become, as a share of what they may be; until some have ended, all of it.

    Counted are the tokens of all answers for each that has ended, those that still grow among them: else the first
    to end, which are the short ones, would speak for all.
    """

    def __init__(self) -> None:
        self._generated, self._allowed = 0, 0

    def count(self, generated: int, allowed: int) -> None:
        """An answer has ended after so many of the tokens that it was allowed."""
        self._generated += generated
        self._allowed += allowed

    def share(self, growing: int) -> float:
        """The share, where the answers that still grow have so many tokens together."""
        return min(1.0, (self._generated + growing) / self._allowed) if self._allowed else 1.0


class Forecast:
    """Blocks that sequences will hold at some times to come, counted in passes from now.

    A sequence grows by a token each pass until it ends and gives everything back: of those admitted at once all are
    long at the same time, of those that arrive one after the other the old ones end while the young are short.

    Args:
        num_blocks: of the cache.
        block_size: tokens of a block.
        num_tokens: that each running sequence holds.
        remaining: tokens that each is expected to add.
        horizon: the furthest time that matters: what any of them, or any that may be taken, is expected to add.
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
        self._since = np.concatenate([[-1], self._times[:-1]])  # the time before each
        held, left = np.asarray(num_tokens, dtype=np.int64), np.asarray(remaining, dtype=np.int64)
        self._demand = np.array(
            [
                self._blocks(held[left > since] + time).sum()
                for since, time in zip(self._since, self._times, strict=True)
            ]
        )

    def take(self, num_tokens: int, remaining: int) -> bool:
        """Count a sequence more, if there will be room for it at all times."""
        alive = remaining > self._since
        demand = self._demand + np.where(alive, self._blocks(num_tokens + self._times), 0)
        if demand.max() > self._num_blocks:
            return False
        self._demand = demand
        return True

    def _blocks(self, num_tokens: np.ndarray) -> np.ndarray:
        return -(-num_tokens // self._block_size)
