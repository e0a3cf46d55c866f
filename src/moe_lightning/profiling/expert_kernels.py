"""Which kernels sweeps over experts run, and the smallest calls that compile each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from moe_lightning.kernels.expert_config import ExpertsConfig, ExpertsShape, select


@dataclass(frozen=True)
class SmallCall:
    """A call of few tokens that runs the kernels of one with more.

    Attributes:
        config: of the larger call.
        num_tokens: of this one.
        num_experts: the first ones, of whom it sweeps no others.
        room: tokens that its workspace holds, so that sums are cut into as many shares.
    """

    config: ExpertsConfig
    num_tokens: int
    num_experts: int
    room: int


def small_calls(
    sweeps: Mapping[int, Iterable[int]], shape: ExpertsShape, room: int, chunk: int
) -> list[list[SmallCall]]:
    """Calls that together run each kernel of the sweeps, by configuration: others share little with them.

    Args:
        sweeps: tokens by parts of a layer.
        shape: of the experts; its tokens do not count.
        room: tokens that the sweeps' workspace holds.
        chunk: slots that one program sorts; more take a kernel more.
    """
    found: dict[ExpertsConfig, dict[tuple[bool, int], SmallCall]] = {}
    two_chunks = chunk // shape.top_k + 1
    shares_per_token = shape.itemsize / 4  # shares are sums in float32, in the workspace's rows
    for num_parts, counts in sweeps.items():
        num_experts = shape.num_experts // num_parts
        for count in counts:
            config = select(replace(shape, num_tokens=count))
            split_k = max(1, min(config.split_k, int(room * shares_per_token / count)))
            config, few = replace(config, split_k=split_k), min(count, two_chunks)
            call = SmallCall(config, few, num_experts, max(few, round(few * split_k / shares_per_token)))
            found.setdefault(config, {}).setdefault((few < two_chunks, num_experts), call)
    return [list(calls.values()) for calls in found.values()]
