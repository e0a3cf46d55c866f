"""The experts' kernels, compiled before passes need them: each that one is the first to meet holds it up."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from moe_lightning.kernels.expert_config import ExpertsConfig, ExpertsShape, select
from moe_lightning.kernels.expert_sort import CHUNK
from moe_lightning.kernels.experts import Workspace, capability, experts_
from moe_lightning.kernels.norm import rms_norm
from moe_lightning.pipeline.shape import experts_in


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


def compile_experts(
    frames: Tensor,
    page_table: Tensor,
    pages_per_expert: int,
    hidden_size: int,
    top_k: int,
    sweeps: Mapping[int, Iterable[int]],
    room: int,
    num_threads: int,
    stopped: threading.Event,
) -> None:
    """Compile what sweeps will run.

    Args:
        frames: [rows, page elements], as `experts_` is going to be given them. What they hold does not matter, nor
            that it changes meanwhile: outputs are dropped.
        page_table: [E * pages_per_expert] int32, of a layer.
        pages_per_expert: slices of each expert.
        hidden_size: H.
        top_k: experts per token.
        sweeps: tokens of each, by the parts of a layer that sweeps are over.
        room: tokens that their workspace holds.
        num_threads: that compile at once; each takes memory for a call of few tokens.
        stopped: when set, no further call is run.
    """
    num_experts, rows = len(page_table) // pages_per_expert, frames.shape[1] // (3 * hidden_size)
    dtype, device = frames.dtype, frames.device
    shape = ExpertsShape(
        1, top_k, num_experts, hidden_size, rows, pages_per_expert, dtype.itemsize, capability(device)
    )

    def run(calls: Sequence[SmallCall]) -> None:
        for call in calls:
            if stopped.is_set():
                return
            x = torch.zeros((call.num_tokens, hidden_size), dtype=dtype, device=device)
            ids = torch.arange(call.num_tokens * top_k, device=device).view(-1, top_k) % num_experts
            weights = torch.zeros((call.num_tokens, top_k), device=device)
            workspace = Workspace.allocate(  # its own: threads launch theirs between each other's
                call.room, top_k, num_experts, hidden_size, rows * pages_per_expert, dtype, device
            )
            experts_(
                torch.zeros_like(x), x, ids, weights, frames, page_table, pages_per_expert, workspace, call.config,
                range(call.num_experts),
            )  # fmt: skip

    # A small kernel first: it brings what all share, such as the driver's own helpers.
    one = torch.ones((1, hidden_size), dtype=dtype, device=device)
    rms_norm(one, one[0], 1e-5, torch.empty_like(one))

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)  # gives the thread the GPU's context, which a first launch expects

    with ThreadPoolExecutor(num_threads, "compile", begin) as threads:
        for done in [threads.submit(run, calls) for calls in small_calls(sweeps, shape, room)]:
            done.result()


def small_calls(sweeps: Mapping[int, Iterable[int]], shape: ExpertsShape, room: int) -> list[list[SmallCall]]:
    """Calls that together run each kernel of the sweeps, by configuration: others share little with them.

    Args:
        sweeps: tokens by parts of a layer.
        shape: of the experts; its tokens do not count.
        room: tokens that the sweeps' workspace holds.
    """
    found: dict[ExpertsConfig, dict[tuple[bool, int], SmallCall]] = {}
    two_chunks = CHUNK // shape.top_k + 1  # more than one program sorts: a kernel more
    shares_per_token = shape.itemsize / 4  # shares are sums in float32, in the workspace's rows
    for num_parts, counts in sweeps.items():
        swept = {len(experts_in(shape.num_experts, num_parts, part)) for part in range(num_parts)}
        for count, num_experts in product(counts, swept):
            config = select(replace(shape, num_tokens=count))
            split_k = max(1, min(config.split_k, int(room * shares_per_token / count)))
            config, few = replace(config, split_k=split_k), min(count, two_chunks)
            call = SmallCall(config, few, num_experts, max(few, round(few * split_k / shares_per_token)))
            found.setdefault(config, {}).setdefault((few < two_chunks, num_experts), call)
    return [list(calls.values()) for calls in found.values()]
