"""Sequences of different lengths cut into micro-batches of near-equal token sums."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Balance(NamedTuple):
    """Indices of the sequences in each micro-batch, longest first, and of those left for the next batch."""

    micro_batches: list[list[int]]
    deferred: list[int]


def balance(
    lengths: Sequence[int], num_micro_batches: int, micro_batch_size: int, cache_tokens: int, gen_len: int
) -> Balance:
    """A static batch: micro-batches whose KV never outgrows its share of the cache.

    Args:
        lengths: prompt tokens of each sequence.
        num_micro_batches: micro-batches open at the start (n_ub).
        micro_batch_size: members that close a micro-batch (ubs).
        cache_tokens: tokens of KV that one micro-batch may hold.
        gen_len: tokens that each sequence generates.

    Source: the paper's Algorithm 2.

    Raises:
        ValueError: there is no micro-batch to put a sequence in.
    """
    micro_batches: list[list[int]] = [[] for _ in range(num_micro_batches)]
    open_sums = _open_sums(num_micro_batches, micro_batch_size)
    deferred = []
    for index in _longest_first(lengths):
        if not open_sums:
            deferred.append(index)
            continue
        prompt_tokens, target = open_sums[0]
        members, total = micro_batches[target], prompt_tokens + lengths[index]
        if total + (len(members) + 1) * gen_len > cache_tokens:
            deferred.append(index)
            continue
        members.append(index)
        _update_least_loaded(open_sums, total, is_full=len(members) == micro_batch_size)
    return Balance(micro_batches, sorted(deferred))


def spread(lengths: Sequence[int], num_micro_batches: int, micro_batch_size: int) -> list[list[int]]:
    """All running sequences over the micro-batches of one pass; some stay empty when there are few sequences.

    Args:
        lengths: tokens of context of each sequence: what its attention will read.
        num_micro_batches: micro-batches of the pass.
        micro_batch_size: members of a micro-batch at most.

    Raises:
        ValueError: the sequences do not fit; the batcher admitted too many.
    """
    capacity = num_micro_batches * micro_batch_size
    if len(lengths) > capacity:
        raise ValueError(
            f"{len(lengths)} sequences do not fit {num_micro_batches} micro-batches of {micro_batch_size}; "
            f"admit {capacity} at most"
        )
    micro_batches: list[list[int]] = [[] for _ in range(num_micro_batches)]
    open_sums = _open_sums(num_micro_batches, micro_batch_size) if lengths else []
    for index in _longest_first(lengths):
        context_tokens, target = open_sums[0]
        members = micro_batches[target]
        members.append(index)
        is_full = len(members) == micro_batch_size
        _update_least_loaded(open_sums, context_tokens + lengths[index], is_full=is_full)
    return micro_batches


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # stable: ties by lowest index


def _open_sums(num_micro_batches: int, micro_batch_size: int) -> list[tuple[int, int]]:
    """A heap of (token sum, micro-batch): the least loaded first, ties by lowest index."""
    if num_micro_batches < 1 or micro_batch_size < 1:
        raise ValueError(
            f"{num_micro_batches} micro-batches of {micro_batch_size} hold nothing; give numbers of 1 or more"
        )
    return [(0, i) for i in range(num_micro_batches)]


def _update_least_loaded(open_sums: list[tuple[int, int]], total: int, *, is_full: bool) -> None:
    if is_full:
        heapq.heappop(open_sums)
    else:
        heapq.heapreplace(open_sums, (total, open_sums[0][1]))
