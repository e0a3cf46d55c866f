"""The best of the policies that a running engine can change to: those that take the memory it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.memory import HEAD_ROWS
from moe_lightning.perf.outlook import Outlook, Prediction
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.workload import Workload, num_decoding
from moe_lightning.policy import Policy

# What no arena, ring or cache depends on, as long as it does not grow. Fewer sequences never finish sooner, and
# another schedule has other buffers: the search leaves both as they are.
LIMITS = ("max_num_seqs", "micro_batch_size", "group_size", "look_ahead", "prefill_tokens", "chunk_tokens")
_GAIN = 1.03  # less is what predictions are worth, and no reason for a change
_ONE_SWEEP = 2**16
_MICRO_BATCHES = (4, 6, 8, 12, 16)
_SHARES = (1.0, 0.75, 0.5, 0.25)  # of what there is room for


@dataclass(frozen=True)
class Bounds:
    """How far limits may go.

    Attributes:
        most: no limit is larger than this policy's.
        least_prefill: prompt tokens that a pass should have room for, as far as `most` has: those of the longest
            prompt.
    """

    most: Policy
    least_prefill: int


def only_limits_differ(policy: Policy, other: Policy) -> bool:
    """Whether an engine can go over from one to the other without new memory."""
    return replace(policy, **{name: getattr(other, name) for name in LIMITS}) == other


def smaller(policy: Policy, num_seqs: int, num_failures: int) -> Policy | None:
    """The largest policy that promises to fit where a pass of this one did not; None if there is none.

    What a pass takes beside its buffers goes with chunks and with the rows that have logits at once, so these are
    halved first, which costs little. If that was not it, nobody knows what is missing, and each further failure
    makes the engine compute anew all that ran: then everything is halved.

    Args:
        policy: that was too large.
        num_seqs: that ran; 0 if that is not known.
        num_failures: of larger policies before.
    """
    n = min(policy.max_num_seqs, num_seqs or policy.max_num_seqs)
    size, chunk = min(policy.micro_batch_size, n, HEAD_ROWS), policy.chunk_tokens
    finer = replace(policy, micro_batch_size=max(1, size // 2), chunk_tokens=max(1, chunk // 2))
    if num_failures == 0 and finer != policy:
        return finer
    if policy.max_num_seqs == 1 and policy.prefill_tokens == 1:
        return None
    return replace(finer, max_num_seqs=max(1, n // 2), prefill_tokens=max(1, policy.prefill_tokens // 2))


def changes(before: Policy, now: Policy) -> str:
    """The limits that differ, in words."""
    pairs = ((name, getattr(before, name), getattr(now, name)) for name in LIMITS)
    return ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)


def replan(
    spec: ModelSpec, dtype: str, now: Policy, bounds: Bounds, rates: Rates, workload: Workload
) -> tuple[Policy, Prediction]:
    """The policy that generates fastest while memory is full, of those within bounds; `now` where none gains much.

    Args:
        spec: the model.
        dtype: of weights, activations and KV.
        now: the policy that runs.
        bounds: of what it may become.
        rates: of the machine.
        workload: what is computed.
    """

    @cache
    def predicted(policy: Policy) -> Prediction:
        return Outlook(spec, dtype, policy, rates, workload).prediction

    best, num_seqs = now, num_decoding(now, workload)
    for _ in range(2):
        for variants in _AXES:
            best = max((best, *variants(best, bounds, num_seqs)), key=lambda p: predicted(p).tokens_per_s)
    if predicted(best).tokens_per_s < _GAIN * predicted(now).tokens_per_s:
        best = now
    return best, predicted(best)


def _micro_batches(policy: Policy, bounds: Bounds, num_seqs: int) -> Iterator[Policy]:
    """Ever smaller ones; attention runs as far ahead as it did, counted in passes over the micro-batches."""
    before = _count(policy, num_seqs)
    for count in _MICRO_BATCHES:
        size = ceil(num_seqs / count)
        if size <= bounds.most.micro_batch_size:
            ahead = ceil(policy.look_ahead * ceil(num_seqs / size) / before)
            yield replace(policy, micro_batch_size=size, look_ahead=ahead)


def _look_aheads(policy: Policy, _: Bounds, num_seqs: int) -> Iterator[Policy]:
    for passes in (0.5, 1, 2):
        yield replace(policy, look_ahead=ceil(passes * _count(policy, num_seqs)))


def _groups(policy: Policy, _: Bounds, num_seqs: int) -> Iterator[Policy]:
    for size in (_ONE_SWEEP, ceil(_count(policy, num_seqs) / 2)):
        yield replace(policy, group_size=size)


def _prefills(policy: Policy, bounds: Bounds, _: int) -> Iterator[Policy]:
    for share in _SHARES:
        tokens = max(bounds.least_prefill, int(share * bounds.most.prefill_tokens))
        yield replace(policy, prefill_tokens=min(tokens, bounds.most.prefill_tokens))


def _chunks(policy: Policy, bounds: Bounds, _: int) -> Iterator[Policy]:
    for share in _SHARES:
        yield replace(policy, chunk_tokens=max(1, int(share * bounds.most.chunk_tokens)))


def _count(policy: Policy, num_seqs: int) -> int:
    return ceil(num_seqs / policy.micro_batch_size)


# Of a policy, within bounds, where so many sequences decode while memory is full.
_AXES: tuple[Callable[[Policy, Bounds, int], Iterator[Policy]], ...] = (
    _micro_batches, _prefills, _chunks, _groups, _look_aheads,
)  # fmt: skip
