"""The passes that a policy leads to."""

from __future__ import annotations

from moe_lightning.errors import ConfigError
from moe_lightning.pipeline.task import PassShape
from moe_lightning.policy import Policy


def pass_shape(
    policy: Policy,
    num_experts: int,
    num_prefill: int,
    num_decode: int,
    *,
    preloaded: bool = True,
    num_layers: int | None = None,
) -> PassShape:
    """A pass of so many micro-batches.

    Args:
        policy: of the model.
        num_experts: in each of its layers.
        num_prefill: chunks of prompts.
        num_decode: decode micro-batches.
        preloaded: whether the pass before it has loaded its first pages.
        num_layers: the first layers only; default: all.
    """
    pages = num_experts * policy.pages_per_expert
    on_cpu = layers_on_cpu(policy)
    streamed = tuple(
        0 if layer in on_cpu else pages - resident
        for layer, resident in enumerate(policy.resident_pages[:num_layers])
    )
    return PassShape(
        len(streamed), num_prefill, num_decode, policy.group_size, policy.look_ahead, streamed, policy.num_frames,
        preloaded=preloaded, part_pages=_part_pages(policy, num_experts),
        first_part_at_once=policy.first_part_at_once, kv_every=kv_every(policy), cpu_every=cpu_every(policy),
    )  # fmt: skip


def kv_every(policy: Policy) -> int:
    """The last of every so many layers keeps its KV on the GPU: none, 0, in schedules that know no such layers."""
    return policy.kv_every if policy.schedule == "cgopipe" else 0


def layers_keeping_kv(policy: Policy) -> range:
    """The layers that have their KV on the GPU."""
    return _every(kv_every(policy), policy)


def cpu_every(policy: Policy) -> int:
    """The last of every so many layers has its experts computed on the CPU: none, 0, as above."""
    return policy.cpu_every if policy.schedule == "cgopipe" else 0


def layers_on_cpu(policy: Policy) -> range:
    """The layers whose experts the CPU computes."""
    return _every(cpu_every(policy), policy)


def _every(count: int, policy: Policy) -> range:
    return range(count - 1, len(policy.resident_pages), count) if count else range(0)


def check_ring(policy: Policy, num_experts: int) -> None:
    """Make sure that passes can be built.

    Raises:
        ConfigError: the ring cannot hold what one sweep over experts reads.
    """
    least = pass_shape(policy, num_experts, 0, 1).least_frames
    if policy.num_frames < least:
        raise ConfigError(
            f"num_frames={policy.num_frames} cannot hold the {least} streamed pages that one sweep over experts "
            "reads; give as many frames, more resident pages or, with the schedule cgopipe, more expert_parts"
        )


def experts_in(num_experts: int, num_parts: int, part: int) -> range:
    """The experts of a part: about as many in each."""
    return range(num_experts * part // num_parts, num_experts * (part + 1) // num_parts)


def pages_of_largest_part(policy: Policy, num_experts: int) -> int:
    """Pages that one sweep over experts reads at most, resident ones among them."""
    return max(_part_pages(policy, num_experts), default=num_experts * policy.pages_per_expert)


def _part_pages(policy: Policy, num_experts: int) -> tuple[int, ...]:
    """Pages of each part; empty for one, and for schedules that sweep whole layers."""
    n = policy.expert_parts if policy.schedule == "cgopipe" else 1
    return (
        tuple(len(experts_in(num_experts, n, p)) * policy.pages_per_expert for p in range(n)) if n > 1 else ()
    )
